// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"fmt"
	"slices"
	"strings"

	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
)

// Capabilities are the default names of the capability for Kubernetes. Only the first
// one that a peer has counts. The second is the older name, which policy files still use.
var Capabilities = []tailcfg.PeerCapability{
	tailcfg.PeerCapabilityKubernetes,
	"https://" + tailcfg.PeerCapabilityKubernetes,
}

// Source says where the groups of an [Identity] come from.
type Source string

// The sources of groups.
const (
	SourceGrants Source = "grants" // from the policy file's grants
	SourceTags   Source = "tags"   // from the device's tags
	SourceNone   Source = "none"   // no groups
)

// Identity is the Kubernetes user that the API server sees as the caller.
type Identity struct {
	// User is the Kubernetes user: a login name ("alice@example.com") or the
	// name of a tagged device ("ci.example.ts.net"). Never empty.
	User string
	// Groups are the Kubernetes groups without duplicates, in the order of the
	// grants. The API server adds system:authenticated.
	Groups []string
	// HeldBack are the groups that the caller is granted and does not use: optional
	// groups that the request does not ask for, and groups that it leaves out.
	HeldBack []string
	// Chosen reports whether the request asks for Groups. See [Limits.Choose].
	Chosen bool
	// UID and Extra describe the caller for audit logs and admission policies. They
	// are empty unless [Peer.Audited] has set them.
	UID   string
	Extra map[string][]string
	// RequestID is the ID of a request in the API server's audit log. It is empty if
	// the API server is to choose one, and in an identity that requests share.
	RequestID string
	// ActAs is set if the request asks to act as another user and the API server has
	// not authorized it yet. The identity cannot be sent then: see
	// [Identity.SetHeaders].
	ActAs *ActAsRequest
	// Source says where Groups come from.
	Source Source
	// Node is the tailnet name of the caller's device.
	Node string
	// Recording is what the grants say about the recording of sessions.
	Recording Recording
}

// Identity returns the Kubernetes user that p is, and where its groups come from.
//
//	device   groups in grants   user         groups
//	user's   none               login name   none
//	user's   some               login name   those
//	tagged   none               node name    the tags
//	tagged   some               node name    those
//
// A tagged device has no groups, rather than its tags, if its grants give none and one of
// them has an unknown or repeated key.
//
// It reads the grants under the first of capabilities that p has. It returns an
// error, with a zero Identity and the Explanation found so far, if the grants cannot
// be read, or if the user or a group is not a name that can be impersonated.
func (p Peer) Identity(capabilities []tailcfg.PeerCapability) (Identity, Explanation, error) {
	var why Explanation
	id := Identity{User: p.user(), Source: SourceNone, Node: p.Node}
	if err := checkUser(id.User); err != nil {
		return Identity{}, Explanation{}, err
	}
	why.Capability = p.capability(capabilities)
	if why.Capability != "" {
		for _, value := range p.Capabilities[why.Capability] {
			why.Grants = append(why.Grants, Grant{Value: value})
		}
	}
	for i := range why.Grants {
		rule, err := why.Grants[i].read(&id.Recording)
		if err != nil {
			return Identity{}, why, fmt.Errorf("the grants of %s for %s cannot be read: grant %d: %w", p, why.Capability, i+1, err)
		}
		if rule.Impersonate == nil {
			continue
		}
		for _, group := range rule.Impersonate.Groups {
			if err := checkName("group", group); err != nil {
				return Identity{}, why, err
			}
			why.Grants[i].add(group)
			id.Source = SourceGrants
			groups := &id.Groups
			if rule.Impersonate.Optional {
				groups = &id.HeldBack
			}
			if !slices.Contains(*groups, group) {
				*groups = append(*groups, group)
			}
		}
	}
	// A grant that does not hold the group back gives it.
	id.HeldBack = slices.DeleteFunc(id.HeldBack, func(group string) bool { return slices.Contains(id.Groups, group) })
	// The owners of another tailnet chose the tags of a device shared in from there;
	// they have no say in this one.
	if id.Source == SourceNone && p.Tagged() && !p.Shared {
		// A grant with a key that is misspelt may have been meant to give fewer rights
		// than the tags.
		if len(why.Problems()) > 0 {
			why.TagsLeftOut = true
			return id, why, nil
		}
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

// capability returns the first of capabilities that the peer has, empty if it has none.
func (p Peer) capability(capabilities []tailcfg.PeerCapability) tailcfg.PeerCapability {
	for _, name := range capabilities {
		if p.Capabilities.HasCapability(name) {
			return name
		}
	}
	return ""
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
		return fmt.Errorf("tag %q lacks the prefix \"tag:\"", tag)
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
		return fmt.Errorf("%s %q holds a character that is not printable ASCII", kind, clip.String(name))
	}
	if strings.Trim(name, " ") != name {
		return fmt.Errorf("%s %q starts or ends with a blank", kind, clip.String(name))
	}
	return nil
}

// PrintableASCII reports whether s holds printable ASCII characters only, blanks
// included. Names with other characters cannot be impersonated.
func PrintableASCII(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c > '~' })
}
