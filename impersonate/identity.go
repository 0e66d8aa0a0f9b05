// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"fmt"
	"slices"
	"strings"

	"tailscale.com/kube/kubetypes"
	"tailscale.com/tailcfg"
)

// Capabilities are the names under which grants for Kubernetes are looked for,
// in this order: the first that the peer has at all is the one that counts. The
// second is the older name of the first, which policy files still hold.
var Capabilities = []tailcfg.PeerCapability{
	tailcfg.PeerCapabilityKubernetes,
	"https://" + tailcfg.PeerCapabilityKubernetes,
}

// Source says where the groups of an [Identity] came from.
type Source string

// The sources of groups.
const (
	SourceGrants Source = "grants" // from the policy file's grants
	SourceTags   Source = "tags"   // from the device's tags
	SourceNone   Source = "none"   // there are none
)

// Identity is who the API server is told that the caller is.
type Identity struct {
	// User is the Kubernetes user: a login name ("alice@example.com") or the
	// name of a tagged device ("ci.example.ts.net"). Never empty.
	User string
	// Groups are the Kubernetes groups, in the order in which the grants name
	// them, each once. The API server adds system:authenticated by itself.
	Groups []string
	// UID and Extra are what the API server is told about the caller beyond that,
	// for its audit log and its admission policies: see [Peer.Audited]. Empty
	// unless that was asked for.
	UID   string
	Extra map[string][]string
	// RequestID is what the one request that the identity is used for is called in
	// the API server's audit log. Empty where the API server is to choose, and in
	// every identity that is shared among requests.
	RequestID string
	// ActAs asks to act as somebody else, for the one request that the
	// identity is used for. As long as nobody has found out whether it may, the
	// identity cannot be sent: [Identity.SetHeaders] sees to that. Nil if there is
	// none.
	ActAs *ActAsRequest
	// Source says where Groups came from.
	Source Source
	// Node is the tailnet name of the device that the caller used.
	Node string
	// Recording is what the grants say about the recording of sessions.
	Recording Recording
}

// Identity returns who the API server is to be told that p is.
//
//	device   groups in grants   user         groups
//	user's   none               login name   none
//	user's   some               login name   those
//	tagged   none               node name    the tags
//	tagged   some               node name    those
//
// Grants are read from the first of capabilities that p has. It is an error,
// with a zero Identity, if they cannot be read, or if the user or a group is not
// a name that can be impersonated.
func (p Peer) Identity(capabilities []tailcfg.PeerCapability) (Identity, error) {
	return p.Explain(capabilities, nil)
}

// Explain is [Peer.Identity] and says in why, if that is not nil, where each group
// comes from. What was found until an error stays in it.
func (p Peer) Explain(capabilities []tailcfg.PeerCapability, why *Explanation) (Identity, error) {
	id := Identity{User: p.user(), Source: SourceNone, Node: p.Node}
	if err := checkUser(id.User); err != nil {
		return Identity{}, err
	}
	name, rules, err := p.rules(capabilities)
	why.found(name, p.Capabilities[name])
	if err != nil {
		return Identity{}, err
	}
	for i, rule := range rules {
		if err := id.Recording.add(rule); err != nil {
			return Identity{}, fmt.Errorf("the grants of %s cannot be read: %w", p, err)
		}
		if rule.Impersonate == nil {
			continue
		}
		for _, group := range rule.Impersonate.Groups {
			if err := checkName("group", group); err != nil {
				return Identity{}, err
			}
			why.gives(i, group)
			if !slices.Contains(id.Groups, group) {
				id.Groups = append(id.Groups, group)
				id.Source = SourceGrants
			}
		}
	}
	// The tags of a device shared in from another tailnet were given there, by
	// people who have no say in this one.
	if id.Source == SourceNone && p.Tagged() && !p.Shared {
		for _, tag := range p.Tags {
			if err := checkTag(tag); err != nil {
				return Identity{}, err
			}
		}
		id.Groups = p.Tags
		id.Source = SourceTags
	}
	return id, nil
}

// rules returns the peer's grants under the first of capabilities that it has,
// and its name, which is empty if it has none.
func (p Peer) rules(capabilities []tailcfg.PeerCapability) (tailcfg.PeerCapability, []kubetypes.KubernetesCapRule, error) {
	for _, name := range capabilities {
		if !p.Capabilities.HasCapability(name) {
			continue
		}
		rules, err := tailcfg.UnmarshalCapJSON[kubetypes.KubernetesCapRule](p.Capabilities, name)
		if err != nil {
			return name, nil, fmt.Errorf("the grants of %s for %s cannot be read: %w", p, name, err)
		}
		return name, rules, nil
	}
	return "", nil, nil
}

// checkUser reports whether user may be impersonated as a user. The names that
// start with "system:" are the cluster's own components, among them
// system:admin, and no tailnet has a say in who they are.
func checkUser(user string) error {
	if err := checkName("user", user); err != nil {
		return err
	}
	if strings.HasPrefix(user, "system:") {
		return fmt.Errorf("user %q starts with system:, which is reserved for the cluster's own components", user)
	}
	return nil
}

// checkTag reports whether tag may be impersonated as a group. Its prefix is what
// keeps a tag from being called system:masters.
func checkTag(tag string) error {
	if err := checkName("tag", tag); err != nil {
		return err
	}
	if !strings.HasPrefix(tag, "tag:") {
		return fmt.Errorf("tag %q lacks the prefix tag: of one", tag)
	}
	return nil
}

// checkName returns an error unless name is a non-empty string of printable
// ASCII without blanks at its ends: what a header carries unaltered.
func checkName(kind, name string) error {
	if name == "" {
		return fmt.Errorf("the %s is empty", kind)
	}
	for _, b := range []byte(name) {
		if b < ' ' || b > '~' {
			return fmt.Errorf("%s %q holds a character that is not printable ASCII", kind, name)
		}
	}
	if strings.Trim(name, " ") != name {
		return fmt.Errorf("%s %q starts or ends with a blank", kind, name)
	}
	return nil
}
