// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"net/netip"
	"testing"

	"tailscale.com/tsnet"
	"tailscale.com/types/logger"
	"tailscale.com/wgengine/filter"
)

// lab/e2e shows it with a policy file that changes.
func TestAdmits_AsksCurrentPacketFilter(t *testing.T) {
	node := offline(t)
	listenOn(t, node)
	n := FromServer(node)
	for name, tt := range map[string]struct {
		filter *filter.Filter
		want   bool
	}{
		"all may":  {filter.NewAllowAllForTest(logger.Discard), true},
		"none may": {filter.NewAllowNone(logger.Discard, nil), false},
	} {
		t.Run(name, func(t *testing.T) {
			node.Sys().Engine.Get().SetFilter(tt.filter)
			for _, addr := range [][2]netip.Addr{{peer4, node4}, {peer6, node6}} {
				if got, err := n.Admits(addr[0], netip.AddrPortFrom(addr[1], 443)); err != nil || got != tt.want {
					t.Errorf("from %v to %v: got %v, %v; want %v", addr[0], addr[1], got, err, tt.want)
				}
			}
		})
	}
}

func TestAdmits_UnknownIsAnError(t *testing.T) {
	if ok, err := FromServer(new(tsnet.Server)).Admits(peer4, netip.AddrPortFrom(node4, 443)); ok || err == nil {
		t.Errorf("a node that has not been started: got %v, %v; want an error", ok, err)
	}
}
