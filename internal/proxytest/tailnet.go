// SPDX-License-Identifier: Apache-2.0

package proxytest

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/loopback"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
	"tailscale.com/tsnet"
)

// The addresses of the tailnet.
const (
	NodeAddr    = "100.64.0.1" // the node that Caddy listens on
	AliceAddr   = "100.64.0.2" // alice's laptop
	MalloryAddr = "100.64.0.3" // mallory's phone

	NodeAddr6  = "fd7a:115c:a1e0::1"
	AliceAddr6 = "fd7a:115c:a1e0::2"
)

const nicID = 1

// netstack is the network stack that owns all addresses of the tailnet.
var netstack = sync.OnceValues(func() (*stack.Stack, error) {
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
	})
	if err := s.CreateNIC(nicID, loopback.New()); err != nil {
		return nil, errors.New(err.String())
	}
	for _, addr := range []string{NodeAddr, AliceAddr, MalloryAddr, NodeAddr6, AliceAddr6} {
		full := fullAddress(netip.AddrPortFrom(netip.MustParseAddr(addr), 0))
		a := tcpip.ProtocolAddress{Protocol: protocol(addr), AddressWithPrefix: full.Addr.WithPrefix()}
		if err := s.AddProtocolAddress(nicID, a, stack.AddressProperties{}); err != nil {
			return nil, errors.New(err.String())
		}
	}
	s.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nicID},
		{Destination: header.IPv6EmptySubnet, NIC: nicID},
	})
	return s, nil
})

func protocol(addr string) tcpip.NetworkProtocolNumber {
	if netip.MustParseAddr(addr).Is4() {
		return ipv4.ProtocolNumber
	}
	return ipv6.ProtocolNumber
}

func fullAddress(addr netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nicID, Addr: tcpip.AddrFromSlice(addr.Addr().AsSlice()), Port: addr.Port()}
}

// stackAddress returns the address of a port for the stack. Port 0 is any.
func stackAddress(addr string, port uint16) tcpip.FullAddress {
	return fullAddress(netip.AddrPortFrom(netip.MustParseAddr(addr), port))
}

// listen listens on a port of an address of the tailnet.
func listen(addr string, port uint16) (*gonet.TCPListener, error) {
	s, err := netstack()
	if err != nil {
		return nil, err
	}
	return gonet.ListenTCP(s, stackAddress(addr, port), protocol(addr))
}

// dial connects the address from to a port of the address to.
func dial(t testing.TB, from, to string, port uint16) *gonet.TCPConn {
	t.Helper()
	s, err := netstack()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	conn, err := gonet.DialTCPWithBind(ctx, s, stackAddress(from, 0), stackAddress(to, port), protocol(to))
	if err != nil {
		t.Fatalf("dialling %s from %s: %v", to, from, err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// Connect returns both ends of a connection from the address from to the address to.
func Connect(t testing.TB, from, to string) (dialled, accepted *gonet.TCPConn) {
	t.Helper()
	ln, err := listen(to, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	dialled = dial(t, from, to, netip.MustParseAddrPort(ln.Addr().String()).Port())
	return dialled, accept(t, ln)
}

func accept(t testing.TB, ln net.Listener) *gonet.TCPConn {
	t.Helper()
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c.(*gonet.TCPConn)
}

// ResetByPeer returns a connection from alice's laptop that the laptop has reset
// since the node accepted it.
func ResetByPeer(t testing.TB) net.Conn {
	t.Helper()
	ln, err := listen(NodeAddr, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	s, err := netstack()
	if err != nil {
		t.Fatal(err)
	}

	// A lingering time of zero turns the end of a connection into a reset. It has to
	// be set on the endpoint, which gonet's dialling does not hand out.
	var queue waiter.Queue
	ep, epErr := s.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, &queue)
	if epErr != nil {
		t.Fatal(epErr)
	}
	ep.SocketOptions().SetLinger(tcpip.LingerOption{Enabled: true})
	if err := ep.Bind(stackAddress(AliceAddr, 0)); err != nil {
		t.Fatal(err)
	}
	connected, done := waiter.NewChannelEntry(waiter.WritableEvents)
	queue.EventRegister(&connected)
	defer queue.EventUnregister(&connected)
	if _, ok := ep.Connect(fullAddress(netip.MustParseAddrPort(ln.Addr().String()))).(*tcpip.ErrConnectStarted); !ok {
		t.Fatal("the connection attempt did not start")
	}
	<-done

	c := accept(t, ln)
	if err := gonet.NewTCPConn(&queue, ep).Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Fatal("read from a connection that was reset")
	}
	return c
}

// tsnetListener is a listener that leads to a tsnet node, as tsnet's own does.
type tsnetListener struct {
	net.Listener
	server *tsnet.Server
}

func (l tsnetListener) Server() *tsnet.Server { return l.server }

func init() {
	// "tailnettest/<hostname>:<port>" is a port of the node, which has that hostname.
	caddy.RegisterNetwork("tailnettest", func(_ context.Context, _, host, portRange string, _ uint, _ net.ListenConfig) (any, error) {
		port, err := strconv.ParseUint(portRange, 10, 16)
		if err != nil {
			return nil, err
		}
		ln, err := listen(NodeAddr, uint16(port))
		if err != nil {
			return nil, err
		}
		// Nothing may start the node: it fails to, without a directory.
		return tsnetListener{ln, &tsnet.Server{Hostname: host, Dir: os.DevNull + "/" + host}}, nil
	})
}
