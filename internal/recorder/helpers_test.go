// SPDX-License-Identifier: Apache-2.0

package recorder

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordertest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

var (
	first  = netip.MustParseAddrPort("100.64.0.7:80")
	second = netip.MustParseAddrPort("100.64.0.8:80")
	third  = netip.MustParseAddrPort("[fd7a:115c:a1e0::9]:80")
)

// network is a tailnet with a recorder at each of some addresses. It does not answer
// at others, except that it refuses connections to second if no recorder is there.
type network struct {
	recorders map[netip.AddrPort]*recordertest.Recorder
	dials     atomic.Int64
}

// newNetwork returns a network with a recorder at each address.
func newNetwork(t *testing.T, addrs ...netip.AddrPort) *network {
	t.Helper()
	nw := &network{recorders: make(map[netip.AddrPort]*recordertest.Recorder)}
	for _, addr := range addrs {
		nw.recorders[addr] = recordertest.Start(t)
	}
	return nw
}

// dial connects to the recorder at address.
func (nw *network) dial(ctx context.Context, _, address string) (net.Conn, error) {
	nw.dials.Add(1)
	addr := netip.MustParseAddrPort(address)
	if r, ok := nw.recorders[addr]; ok {
		return r.Dial(ctx)
	}
	if addr == second {
		return nil, errors.New("connection refused")
	}
	<-ctx.Done()
	return nil, ctx.Err()
}

// node returns a new node of the network.
func (nw *network) node() *tailnet.Node {
	return &tailnet.Node{
		Name:     "k8s",
		Addrs:    func() (netip.Addr, netip.Addr) { return netip.MustParseAddr("100.64.0.1"), netip.Addr{} },
		DialPeer: nw.dial,
	}
}

// newClient returns a Client that is closed when the test ends.
func newClient(t *testing.T) *Client {
	c := new(Client)
	t.Cleanup(c.Close)
	return c
}
