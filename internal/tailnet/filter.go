// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"errors"
	"net/netip"

	"tailscale.com/tsd"
	"tailscale.com/tsnet"
	"tailscale.com/wgengine/filter"
)

// admits returns a function that asks the packet filter of node whether the peer at
// remote may open a connection to dialled.
//
// The filter decides about the first packet of a TCP connection, and lets all others
// pass: a peer that may no longer open a connection keeps those that it has.
func admits(node *tsnet.Server) func(remote netip.Addr, dialled netip.AddrPort) (bool, error) {
	return func(remote netip.Addr, dialled netip.AddrPort) (bool, error) {
		packets, err := filterOf(node.Sys())
		if err != nil {
			return false, err
		}
		return packets.CheckTCP(remote, dialled.Addr(), dialled.Port()) == filter.Accept, nil
	}
}

// filterOf returns the packet filter of the node whose system is sys.
func filterOf(sys *tsd.System) (*filter.Filter, error) {
	if sys == nil {
		return nil, errors.New("the node has not been started")
	}
	engine, ok := sys.Engine.GetOK()
	if !ok {
		return nil, errors.New("the node has no packet filter")
	}
	packets := engine.GetFilter()
	if packets == nil {
		return nil, errors.New("the node has no packet filter yet")
	}
	return packets, nil
}
