// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"tailscale.com/tsnet"
)

// Nodes are the tailnet nodes that one server listens on.
type Nodes []*Node

// FromListeners returns the tsnet nodes at the bottom of a server's listeners, each once.
// It skips listeners that end in anything else.
func FromListeners(listeners []net.Listener) Nodes {
	var nodes Nodes
	seen := make(map[*tsnet.Server]bool)
	for _, ln := range listeners {
		s := server(ln)
		if s == nil || seen[s] {
			continue
		}
		seen[s] = true
		n := FromServer(s)
		n.Services, n.ServicesOnly = servicesOf(s, listeners)
		nodes = append(nodes, n)
	}
	return nodes
}

// server returns the tsnet node that ln listens on, or nil.
//
// Caddy, crypto/tls, the plugin that opened a listener and the config may all wrap it.
// This looks through every layer, which is safe because listeners only propose nodes:
// [ConnContext] decides whether a connection is a node's and unaltered.
func server(ln any) *tsnet.Server {
	if s := bottom(ln); s != nil {
		return s.Server()
	}
	return nil
}

// onNode is a listener that tells the tsnet node it listens on, as tsnet's own does.
type onNode interface{ Server() *tsnet.Server }

// bottom returns the layer of ln that tells its node, or nil.
func bottom(ln any) onNode {
	for ln != nil {
		if s, ok := ln.(onNode); ok {
			return s
		}
		if u, ok := ln.(interface{ Unwrap() net.Listener }); ok {
			ln = u.Unwrap()
			continue
		}
		ln = field(ln, "Listener", false) // that of the PROXY protocol does not embed it
	}
	return nil
}

// Own reports whether addr is an address of one of the nodes, or of a service that one
// of them hosts.
func (nodes Nodes) Own(addr netip.Addr) bool {
	return slices.ContainsFunc(nodes, func(n *Node) bool { return n.Is(addr) })
}

// ServiceAddrs returns the addresses and ports of the services that the nodes host.
func (nodes Nodes) ServiceAddrs() (all []netip.AddrPort) {
	for _, n := range nodes {
		for _, s := range n.Services {
			_, addrs := s.Service()
			all = append(all, addrs...)
		}
	}
	return all
}

// Accepting returns the node that owns the address local, its own or that of a service
// that it hosts on this server.
//
// It is an error if no node does, or more than one: every Headscale tailnet starts at
// 100.64.0.1, so two nodes of one server can own the same address, and a connection does
// not tell which of them accepted it. So can two nodes that host a service with that
// address one after the other. The error is [ErrNotConnected] if the owner may be a node
// that is not connected.
func (nodes Nodes) Accepting(local netip.Addr) (*Node, error) {
	var owner *Node
	for _, n := range nodes {
		switch {
		case !n.Is(local) && !n.had(local):
		case owner != nil:
			return nil, fmt.Errorf("nodes %q and %q of this server both own the address %v, so it cannot be told which of them accepted the connection; give each a server of its own", owner.Name, n.Name, local)
		default:
			owner = n
		}
	}
	if owner != nil && owner.Is(local) {
		return owner, nil
	}
	for _, n := range nodes {
		if !n.connected() {
			return nil, fmt.Errorf("tailnet node %q: %w", n.Name, ErrNotConnected)
		}
	}
	return nil, fmt.Errorf("no tailnet node of this server owns the address %v", local)
}
