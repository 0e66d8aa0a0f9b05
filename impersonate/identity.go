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

// Identity returns who the API server is to be told that p is, and where its groups
// come from.
//
//	device   groups in grants   user         groups
//	user's   none               login name   none
//	user's   some               login name   those
//	tagged   none               node name    the tags
//	tagged   some               node name    those
//
// It reads the grants under the first of capabilities that p has. It returns an
// error, with a zero Identity and the Explanation found so far, if the grants cannot
// be read, or if the user or a group is not a name that can be impersonated.
func (p Peer) Identity(capabilities []tailcfg.PeerCapability) (Identity, Explanation, error) {
	var why Explanation
	id := Identity{User: p.user(), Source: SourceNone, Node: p.Node}
	if err := checkUser(id.User); err != nil {
		return Identity{}, why, err
	}
	name, rules, err := p.rules(capabilities)
	why.Capability = name
	for _, value := range p.Capabilities[name] {
		why.Grants = append(why.Grants, Grant{Value: value})
	}
	if err != nil {
		return Identity{}, why, err
	}
	for i, rule := range rules {
		if err := id.Recording.add(rule); err != nil {
			return Identity{}, why, fmt.Errorf("the grants of %s cannot be read: %w", p, err)
		}
		if rule.Impersonate == nil {
			continue
		}
		for _, group := range rule.Impersonate.Groups {
			if err := checkName("group", group); err != nil {
				return Identity{}, why, err
			}
			why.Grants[i].add(group)
			if !slices.Contains(id.Groups, group) {
				id.Groups = append(id.Groups, group)
				id.Source = SourceGrants
			}
		}
	}
	// The owners of another tailnet chose the tags of a device shared in from there;
	// they have no say in this one.
	if id.Source == SourceNone && p.Tagged() && !p.Shared {
		for _, tag := range p.Tags {
			if err := checkTag(tag); err != nil {
				return Identity{}, why, err
			}
		}
		id.Groups = p.Tags
		id.Source = SourceTags
	}
	return id, why, nil
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

// checkUser returns an error unless user may be impersonated. Names that start with
// "system:", such as system:admin, belong to the cluster's own components, and no
// tailnet may use them.
func checkUser(user string) error {
	if err := checkName("user", user); err != nil {
		return err
	}
	if strings.HasPrefix(user, "system:") {
		return fmt.Errorf("user %q starts with system:, which is reserved for the cluster's own components", user)
	}
	return nil
}

// checkTag returns an error unless tag may be impersonated as a group. The prefix
// keeps a tag from being called system:masters.
func checkTag(tag string) error {
	if err := checkName("tag", tag); err != nil {
		return err
	}
	if !strings.HasPrefix(tag, "tag:") {
		return fmt.Errorf("tag %q does not start with tag:", tag)
	}
	return nil
}

// checkName returns an error unless a header carries name unaltered: name is not
// empty, holds printable ASCII only and has no blank at its ends, as HTTP trims these.
func checkName(kind, name string) error {
	if name == "" {
		return fmt.Errorf("the %s is empty", kind)
	}
	if !PrintableASCII(name) {
		return fmt.Errorf("%s %q holds a character that is not printable ASCII", kind, name)
	}
	if strings.Trim(name, " ") != name {
		return fmt.Errorf("%s %q starts or ends with a blank", kind, name)
	}
	return nil
}

// PrintableASCII reports whether s holds printable ASCII characters only, blanks
// included. Names with other characters cannot be impersonated.
func PrintableASCII(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c > '~' })
}
