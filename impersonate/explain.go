// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"slices"

	"tailscale.com/tailcfg"
)

// Explanation says where the groups of an [Identity] come from. [Peer.Identity]
// records it while it decides, so that the two cannot disagree.
type Explanation struct {
	// Capability is the name under which the peer has grants, empty if it has none.
	Capability tailcfg.PeerCapability
	// Grants are the values of that capability, in the order of the policy file.
	Grants []Grant
}

// Grant is one value of a capability.
type Grant struct {
	// Value is the value as the tailnet node reports it, in JSON.
	Value tailcfg.RawMessage
	// Groups are the groups that it gives, including those that another grant gives
	// as well.
	Groups []string
}

// add records that g gives group.
func (g *Grant) add(group string) {
	if !slices.Contains(g.Groups, group) {
		g.Groups = append(g.Groups, group)
	}
}
