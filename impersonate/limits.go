// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/glob"
)

// Limits are the options. The zero value lets everything through as it is.
//
// In a pattern, `*` stands for any characters, none included; everything else
// stands for itself. Patterns see names without the prefixes that are added here.
type Limits struct {
	// Patterns of the groups that callers may have. A caller that is granted
	// others goes without them, which is logged.
	//
	// Default: all.
	AllowGroups []string `json:"allow_groups,omitempty"`

	// Patterns of groups that no caller may have, even if allow_groups names them,
	// and even if it acts as somebody else (`client_impersonation authorize`).
	// `system:masters` keeps everybody from being cluster-admin by that group,
	// whatever the policy file says.
	//
	// Default: none.
	DenyGroups []string `json:"deny_groups,omitempty"`

	// Whether a caller without any group is refused rather than sent on as a
	// user and nothing more. What counts is what is left of its groups.
	//
	// Default: `false`.
	RequireGroups bool `json:"require_groups,omitempty"`

	// What is put in front of every user, node names of tagged devices included,
	// so that no user of the tailnet can be taken for one that the cluster knows
	// by other means. As the API server's `--oidc-username-prefix`.
	//
	// Default: nothing.
	UserPrefix string `json:"user_prefix,omitempty"`

	// What is put in front of every group, those that tags become included. As
	// the API server's `--oidc-groups-prefix`.
	//
	// Default: nothing.
	GroupPrefix string `json:"group_prefix,omitempty"`

	// Patterns of tags. A tagged device may call only if one of its tags matches,
	// and was given in this tailnet: those of a device that was shared in never do.
	// Devices of users have no tags and are not concerned.
	//
	// Default: all.
	AllowTags []string `json:"allow_tags,omitempty"`

	// Patterns of tags. A device may not call if one of its tags matches, even if
	// another one is allowed.
	//
	// Default: none.
	DenyTags []string `json:"deny_tags,omitempty"`

	// Whether devices that were shared in from another tailnet are refused. Their
	// tags never become groups, with or without this.
	//
	// Default: `false`.
	DenyShared bool `json:"deny_shared,omitempty"`
}

// ErrNoGroup is returned by [Limits.Apply] for an identity without groups where
// require_groups is on.
var ErrNoGroup = errors.New("require_groups is on, and no group is granted")

// reserved starts the names of the cluster's own users and groups.
const reserved = "system:"

// Validate returns an error that names the option and the reason if r cannot be
// used.
func (l *Limits) Validate() error {
	for _, list := range []struct {
		option, prefix string
		patterns       []string
	}{
		{"allow_groups", "", l.AllowGroups},
		{"deny_groups", "", l.DenyGroups},
		{"allow_tags", "tag:", l.AllowTags},
		{"deny_tags", "tag:", l.DenyTags},
	} {
		for _, pattern := range list.patterns {
			if err := checkPattern(pattern, list.prefix); err != nil {
				return fmt.Errorf("%s %q: %w", list.option, pattern, err)
			}
		}
	}
	for option, patterns := range map[string][]string{"allow_groups": l.AllowGroups, "deny_groups": l.DenyGroups} {
		for _, pattern := range patterns {
			if bare, ok := strings.CutPrefix(pattern, l.GroupPrefix); ok && l.GroupPrefix != "" {
				return fmt.Errorf("%s %q: patterns see groups without group_prefix, so write %q", option, pattern, bare)
			}
		}
	}
	for option, prefix := range map[string]string{"user_prefix": l.UserPrefix, "group_prefix": l.GroupPrefix} {
		if err := checkPrefix(prefix); err != nil {
			return fmt.Errorf("%s %q: %w", option, prefix, err)
		}
	}
	return nil
}

// CheckPeer returns an error if p's device may not call at all.
func (l *Limits) CheckPeer(p Peer) error {
	if l.DenyShared && p.Shared {
		return errors.New("the device was shared in from another tailnet, and deny_shared is on")
	}
	for _, tag := range p.Tags {
		if glob.Any(l.DenyTags, tag) {
			return fmt.Errorf("the device has the tag %s, which deny_tags names", tag)
		}
	}
	if len(l.AllowTags) == 0 || !p.Tagged() {
		return nil
	}
	if p.Shared {
		return fmt.Errorf("the device was shared in from another tailnet, so that its tags, %s, are none that allow_tags names", strings.Join(p.Tags, ", "))
	}
	if !slices.ContainsFunc(p.Tags, func(tag string) bool { return glob.Any(l.AllowTags, tag) }) {
		return fmt.Errorf("the device has none of the tags that allow_tags names, but %s", strings.Join(p.Tags, ", "))
	}
	return nil
}

// Apply returns id with the groups that it may have and with the prefixes, and the
// groups that were cut. Where the groups came from stays as it was: a grant of
// which nothing is left does not count as none.
func (l *Limits) Apply(id Identity) (limited Identity, cut []string, err error) {
	limited = id
	limited.User = l.UserPrefix + id.User
	limited.Groups = nil
	for _, group := range id.Groups {
		if l.RemovedBy(group) != "" {
			cut = append(cut, group)
			continue
		}
		limited.Groups = append(limited.Groups, l.GroupPrefix+group)
	}
	if l.RequireGroups && len(limited.Groups) == 0 {
		if len(cut) > 0 {
			return Identity{}, cut, fmt.Errorf("require_groups is on, and none of the groups that are granted may be had: %s", strings.Join(cut, ", "))
		}
		return Identity{}, nil, ErrNoGroup
	}
	// "sys" and "tem:admin" are harmless until they meet.
	if l.UserPrefix != "" && strings.HasPrefix(limited.User, reserved) {
		return Identity{}, cut, fmt.Errorf("user_prefix makes it user %q, which is reserved for the cluster's own components", limited.User)
	}
	if l.GroupPrefix != "" {
		for _, group := range limited.Groups {
			if strings.HasPrefix(group, reserved) {
				return Identity{}, cut, fmt.Errorf("group_prefix makes one of its groups %q, which is reserved for the cluster's own", group)
			}
		}
	}
	return limited, cut, nil
}

// RemovedBy returns the option because of which nobody may have group, empty if callers
// may.
func (l *Limits) RemovedBy(group string) (option string) {
	switch {
	case glob.Any(l.DenyGroups, group):
		return "deny_groups"
	case len(l.AllowGroups) > 0 && !glob.Any(l.AllowGroups, group):
		return "allow_groups"
	}
	return ""
}

// CheckTarget returns an error if nobody may act as t, whatever RBAC says. A caller
// that asks for a group is subject to the same limits as one that is granted it, and
// so is one that asks for a service account or a node, for the groups that these
// are in, even if it asks for others instead: what is bound to an account goes by its
// name. A target's names are those that the cluster knows, prefixes included.
func (l *Limits) CheckTarget(t *Target) error {
	for _, group := range slices.Concat(t.Groups, t.OwnGroups()) {
		bare, prefixed := strings.CutPrefix(group, l.GroupPrefix)
		if glob.Any(l.DenyGroups, group) || (prefixed && glob.Any(l.DenyGroups, bare)) {
			return fmt.Errorf("nobody may be in group %s here, which deny_groups names", group)
		}
		if len(l.AllowGroups) > 0 && (!prefixed || !glob.Any(l.AllowGroups, bare)) {
			return fmt.Errorf("nobody may be in group %s here, which allow_groups does not name", group)
		}
	}
	return nil
}

// checkPattern returns an error if pattern matches no name that starts with prefix.
func checkPattern(pattern, prefix string) error {
	if pattern == "" {
		return errors.New("an empty pattern matches nothing")
	}
	if err := checkCharacters(pattern); err != nil {
		return err
	}
	if strings.Trim(pattern, " ") != pattern {
		return errors.New("no name starts or ends with a blank, so it matches nothing")
	}
	literal, _, wildcard := strings.Cut(pattern, "*")
	if wildcard {
		literal = literal[:min(len(literal), len(prefix))]
		prefix = prefix[:len(literal)]
	}
	if !strings.HasPrefix(literal, prefix) || literal == "tag:" && !wildcard {
		return errors.New("every tag starts with tag: and has a name, so it matches none")
	}
	return nil
}

// checkPrefix returns an error if prefix cannot start a name.
func checkPrefix(prefix string) error {
	if prefix == "" {
		return nil
	}
	if strings.HasPrefix(prefix, reserved) {
		return fmt.Errorf("names that start with %s are reserved for the cluster's own components", reserved)
	}
	if strings.HasPrefix(prefix, " ") {
		return errors.New("a name cannot start with a blank")
	}
	return checkCharacters(prefix)
}

// checkCharacters returns an error unless s is printable ASCII, as all names are, and
// holds no placeholder.
func checkCharacters(s string) error {
	if !PrintableASCII(s) {
		return errors.New("names hold printable ASCII characters only")
	}
	if _, behind, ok := strings.Cut(s, "{"); ok && strings.Contains(behind, "}") {
		return errors.New("placeholders are not replaced here, only {$NAME}, when a Caddyfile is read")
	}
	return nil
}
