// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// A peer can reset a connection before the server has looked at it, and gonet
// then has no remote address for it. ConnContext runs in the server's accept
// loop, where a panic would end the whole process.
func TestConnectionResetByPeerDoesNotPanic(t *testing.T) {
	s := newStack(t)
	ln := listen(t, s, node4)

	// A lingering time of zero turns the end of a connection into a reset. It
	// has to be set on the endpoint, which gonet's dialling does not hand out.
	var queue waiter.Queue
	ep, err := s.NewEndpoint(tcp.ProtocolNumber, protocol(node4), &queue)
	if err != nil {
		t.Fatal(err)
	}
	ep.SocketOptions().SetLinger(tcpip.LingerOption{Enabled: true})
	if err := ep.Bind(full(netip.AddrPortFrom(peer4, 0))); err != nil {
		t.Fatal(err)
	}
	connected, done := waiter.NewChannelEntry(waiter.WritableEvents)
	queue.EventRegister(&connected)
	defer queue.EventUnregister(&connected)
	if _, ok := ep.Connect(full(netip.AddrPortFrom(node4, 443))).(*tcpip.ErrConnectStarted); !ok {
		t.Fatal("the connection attempt did not start")
	}
	<-done

	c, acceptErr := ln.Accept()
	if acceptErr != nil {
		t.Fatal(acceptErr)
	}
	defer c.Close()
	if err := gonet.NewTCPConn(&queue, ep).Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Fatal("read from a connection that was reset")
	}
	if addr := c.RemoteAddr(); addr != nil {
		t.Fatalf("the connection still has the remote address %v; the test sees nothing", addr)
	}

	got, connErr := ConnFrom(ConnContext(t.Context(), c))
	if connErr == nil {
		t.Error("got no error; want one")
	}
	if diff := cmp.Diff((*Conn)(nil), got, equateConns); diff != "" {
		t.Errorf("connection (-want +got):\n%s", diff)
	}
}
