// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"slices"

	"tailscale.com/tailcfg"
)

// Explanation says where the groups of an [Identity] come from. It is written by
// the code that decides ([Peer.Explain]), so that the two cannot disagree.
type Explanation struct {
	// Capability is the name under which grants were found, empty if there are
	// none.
	Capability tailcfg.PeerCapability
	// Grants are the values that the policy file's grants have under that name,
	// in their order.
	Grants []Grant
}

// Grant is one value of a capability.
type Grant struct {
	// Value is the value as the tailnet node reports it, in JSON.
	Value tailcfg.RawMessage
	// Groups are the groups that it gives, those that another one gives as well
	// included.
	Groups []string
}

// found notes what grants there are, if anybody wants to know.
func (e *Explanation) found(name tailcfg.PeerCapability, values []tailcfg.RawMessage) {
	if e == nil {
		return
	}
	e.Capability = name
	e.Grants = make([]Grant, len(values))
	for i, value := range values {
		e.Grants[i].Value = value
	}
}

// gives notes that a grant gives a group, if anybody wants to know.
func (e *Explanation) gives(i int, group string) {
	if e != nil && !slices.Contains(e.Grants[i].Groups, group) {
		e.Grants[i].Groups = append(e.Grants[i].Groups, group)
	}
}
