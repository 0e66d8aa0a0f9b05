// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/tailcfg"
)

// Peer is what a tailnet node says about one of its peers.
type Peer struct {
	// Node is the peer's tailnet name without the final dot
	// ("laptop.example.ts.net").
	Node string
	// NodeID is what the control server calls it, for good: a new name does not
	// change it.
	NodeID tailcfg.StableNodeID
	// Tags are the peer's tags ("tag:k8s-readers"). A device with tags belongs
	// to no user.
	Tags []string
	// Login is the login name of the user that the peer belongs to, empty for a
	// tagged device.
	Login string
	// UserID is what the control server calls that user, whatever the login name
	// becomes. Zero for a tagged device.
	UserID tailcfg.UserID
	// Shared reports whether the peer was shared in from another tailnet. Its
	// tags are that tailnet's and mean nothing in this one.
	Shared bool
	// Capabilities are those that the peer was granted on the address it dialled.
	Capabilities tailcfg.PeerCapMap
}

// PeerFrom returns the peer that a WhoIs answer describes. It is an error if the
// answer leaves out who that is, or if the peer's key has expired.
func PeerFrom(who *apitype.WhoIsResponse) (Peer, error) {
	if who == nil || who.Node == nil {
		return Peer{}, errors.New("the tailnet node's answer names no peer")
	}
	if who.Node.Expired {
		return Peer{}, fmt.Errorf("the key of device %s has expired", strings.TrimSuffix(who.Node.Name, "."))
	}
	p := Peer{
		Node:         strings.TrimSuffix(who.Node.Name, "."),
		NodeID:       who.Node.StableID,
		Tags:         slices.Clone(who.Node.Tags),
		Shared:       who.Node.Sharer != 0 || (who.Node.Hostinfo.Valid() && who.Node.Hostinfo.ShareeNode()),
		Capabilities: who.CapMap,
	}
	if p.Tagged() {
		return p, nil
	}
	if who.UserProfile == nil {
		return Peer{}, errors.New("the tailnet node's answer names no user for an untagged device")
	}
	p.Login = who.UserProfile.LoginName
	p.UserID = who.UserProfile.ID
	return p, nil
}

// Tagged reports whether the peer is a tagged device rather than a user's.
func (p Peer) Tagged() bool { return len(p.Tags) > 0 }

// user returns the Kubernetes user that the peer is: the login name of a user's
// device, the name of a tagged one. It is not checked yet.
func (p Peer) user() string {
	if p.Tagged() {
		return p.Node
	}
	return p.Login
}

// Describe returns what the peer's own user is told that it was taken for.
func (p Peer) Describe() string {
	switch {
	case p.Tagged():
		return fmt.Sprintf("device %s (%s)", p.Node, strings.Join(p.Tags, ", "))
	case p.Login != "" && p.Node != "":
		return p.Login + " on " + p.Node
	}
	return p.String()
}

// String returns what messages call the peer: its user, or the name of its
// device if it has none.
func (p Peer) String() string {
	if user := p.user(); user != "" {
		return user
	}
	return "device " + p.Node
}
