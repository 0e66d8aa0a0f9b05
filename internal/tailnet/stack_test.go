// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/loopback"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// Addresses of the test's network stack: the node that listens and a peer.
var (
	node4 = netip.MustParseAddr("100.64.0.1")
	node6 = netip.MustParseAddr("fd7a:115c:a1e0::1")
	peer4 = netip.MustParseAddr("100.64.0.2")
	peer6 = netip.MustParseAddr("fd7a:115c:a1e0::2")
)

const nicID = 1

// newStack returns a network stack of the kind that tsnet runs on, which owns the
// addresses of both ends.
func newStack(t *testing.T) *stack.Stack {
	t.Helper()
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
	})
	t.Cleanup(s.Destroy)
	if err := s.CreateNIC(nicID, loopback.New()); err != nil {
		t.Fatalf("creating the network interface: %v", err)
	}
	for _, addr := range []netip.Addr{node4, node6, peer4, peer6} {
		err := s.AddProtocolAddress(nicID, tcpip.ProtocolAddress{
			Protocol:          protocol(addr),
			AddressWithPrefix: tcpip.AddrFromSlice(addr.AsSlice()).WithPrefix(),
		}, stack.AddressProperties{})
		if err != nil {
			t.Fatalf("adding address %v: %v", addr, err)
		}
	}
	s.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nicID},
		{Destination: header.IPv6EmptySubnet, NIC: nicID},
	})
	return s
}

func protocol(addr netip.Addr) tcpip.NetworkProtocolNumber {
	if addr.Is4() {
		return ipv4.ProtocolNumber
	}
	return ipv6.ProtocolNumber
}

func full(addr netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nicID, Addr: tcpip.AddrFromSlice(addr.Addr().AsSlice()), Port: addr.Port()}
}

// listen listens on port 443 of the node's address.
func listen(t *testing.T, s *stack.Stack, node netip.Addr) *gonet.TCPListener {
	t.Helper()
	ln, err := gonet.ListenTCP(s, full(netip.AddrPortFrom(node, 443)), protocol(node))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// dial connects peer to port 443 of node.
func dial(t *testing.T, s *stack.Stack, peer, node netip.Addr) *gonet.TCPConn {
	t.Helper()
	c, err := gonet.DialTCPWithBind(t.Context(), s, full(netip.AddrPortFrom(peer, 0)), full(netip.AddrPortFrom(node, 443)), protocol(node))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// connect returns both ends of a connection from peer to node.
func connect(t *testing.T, peer, node netip.Addr) (dialled, accepted *gonet.TCPConn) {
	t.Helper()
	s := newStack(t)
	ln := listen(t, s, node)
	dialled = dial(t, s, peer, node)
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return dialled, c.(*gonet.TCPConn)
}
