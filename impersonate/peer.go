// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/tailcfg"
)

// Peer is what a tailnet node reports about one of its peers.
type Peer struct {
	// Node is the peer's tailnet name without the final dot
	// ("laptop.example.ts.net").
	Node string
	// NodeID is the peer's stable ID, which does not change when it is renamed.
	NodeID tailcfg.StableNodeID
	// Tags are the peer's tags ("tag:k8s-readers"). A tagged device belongs to no user.
	Tags []string
	// Login is the login name of the user that owns the peer, empty for a tagged
	// device.
	Login string
	// UserID is the stable ID of that user, which does not change with the login
	// name. It is zero for a tagged device.
	UserID tailcfg.UserID
	// Shared reports whether the peer was shared in from another tailnet. Its tags
	// belong to that tailnet and mean nothing in this one.
	Shared bool
	// Capabilities are what the peer is granted on the address that it dialled.
	Capabilities tailcfg.PeerCapMap
}

// PeerFrom returns the peer that a WhoIs answer describes. It returns an error if the
// answer does not say who the peer is, or if the peer's key has expired.
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

// Equal reports whether p and other are the same in all that an identity follows from.
func (p Peer) Equal(other Peer) bool {
	return p.Node == other.Node && p.NodeID == other.NodeID && slices.Equal(p.Tags, other.Tags) &&
		p.Login == other.Login && p.UserID == other.UserID && p.Shared == other.Shared &&
		maps.EqualFunc(p.Capabilities, other.Capabilities, slices.Equal[[]tailcfg.RawMessage])
}

// Tagged reports whether the peer is a tagged device rather than a user's.
func (p Peer) Tagged() bool { return len(p.Tags) > 0 }

// user returns the peer's Kubernetes user, unchecked: the login name of the user that
// owns it, or the node name of a tagged device.
func (p Peer) user() string {
	if p.Tagged() {
		return p.Node
	}
	return p.Login
}

// Describe returns who the peer is, for messages to its user.
func (p Peer) Describe() string {
	switch {
	case p.Tagged():
		return fmt.Sprintf("device %s (%s)", p.Node, strings.Join(p.Tags, ", "))
	case p.Login != "" && p.Node != "":
		return p.Login + " on " + p.Node
	}
	return p.String()
}

// String returns the peer's user, or the name of its device if it has none.
func (p Peer) String() string {
	if user := p.user(); user != "" {
		return user
	}
	return "device " + p.Node
}
