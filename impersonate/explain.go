// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"fmt"
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
	// TagsLeftOut reports whether the tags of the device are not its groups because of
	// the Problems.
	TagsLeftOut bool
}

// Problems returns the problems of all grants, with the numbers of the grants from 1.
func (e *Explanation) Problems() (problems []string) {
	for i, grant := range e.Grants {
		for _, problem := range grant.Problems {
			problems = append(problems, fmt.Sprintf("grant %d: %s", i+1, problem))
		}
	}
	return problems
}

// Grant is one value of a capability.
type Grant struct {
	// Value is the value as the tailnet node reports it, in JSON.
	Value tailcfg.RawMessage
	// Groups are the groups that it gives, including those that another grant gives
	// as well.
	Groups []string
	// Problems are the keys in Value that are unknown or repeated, a sentence each.
	Problems []string
}

// add records that g gives group.
func (g *Grant) add(group string) {
	if !slices.Contains(g.Groups, group) {
		g.Groups = append(g.Groups, group)
	}
}
