// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/glob"
)

// Limits are what the cluster's operators allow, whatever the tailnet policy file
// grants: which devices may call, which groups callers may have, and how the names of
// callers differ from those of other authenticators. The zero value allows everything.
//
// In a pattern, `*` matches any number of characters, including none; every other
// character matches itself. Patterns match names without the prefixes that are added.
type Limits struct {
	// Patterns of the groups that callers may have. Other groups that a caller is
	// granted are removed, which is logged.
	//
	// Default: all.
	AllowGroups []string `json:"allow_groups,omitempty"`

	// Patterns of groups that no caller may have, even if `allow_groups` names them,
	// and even if the caller acts as another user (`client_impersonation authorize`).
	// With `system:masters`, nobody can be cluster-admin by that group, whatever the
	// policy file says.
	//
	// Default: none.
	DenyGroups []string `json:"deny_groups,omitempty"`

	// Patterns of groups that callers are granted and do not use until a request asks
	// for them, as `kubectl --as alice@example.com --as-group admins` does for the user
	// alice@example.com herself. Where groups come from is decided before: a tagged
	// device whose grants give it optional groups only does not get its tags as groups.
	//
	// Default: none.
	OptionalGroups []string `json:"optional_groups,omitempty"`

	// Patterns of groups whose sessions have to be recorded while a request uses one
	// of them, as with a grant's `enforceRecorder`: a session that cannot be recorded
	// is refused. It needs `record`, or grants that name recorders.
	//
	// Default: none.
	RecordGroups []string `json:"record_groups,omitempty"`

	// Refuse requests without any group. Groups that `allow_groups` or `deny_groups`
	// remove do not count, and neither do those that a request does not use.
	//
	// Default: `false`.
	RequireGroups bool `json:"require_groups,omitempty"`

	// A prefix for all users, including those of tagged devices. It keeps
	// users of the tailnet apart from users of other authenticators, like the API
	// server's `--oidc-username-prefix`.
	//
	// Default: none.
	UserPrefix string `json:"user_prefix,omitempty"`

	// Which name of a tagged device is its Kubernetes user:
	//
	// - `name` is its tailnet name, such as `ci.example.ts.net`. The device itself can
	//   change that name, and can take over the name of a device that was deleted. Do
	//   not bind roles to it: bind them to the device's tag, as a group.
	// - `id` is its stable node ID, such as `nPKaVnLfBZ11CNTRL`, which neither the
	//   device nor its owner chooses. Headscale numbers its nodes from 1, so use
	//   `device_user_prefix` as well.
	//
	// Default: `name`.
	TaggedUser string `json:"tagged_user,omitempty"`

	// A prefix for the users of tagged devices, between `user_prefix` and the name. It
	// keeps tagged devices apart from users: a user whose login name starts with it is
	// refused.
	//
	// Default: none.
	DeviceUserPrefix string `json:"device_user_prefix,omitempty"`

	// A prefix for all groups, including those that come from tags, like the API
	// server's `--oidc-groups-prefix`.
	//
	// Default: none.
	GroupPrefix string `json:"group_prefix,omitempty"`

	// Patterns of tags. A tagged device may call only if one of its tags matches.
	// Tags of a device that was shared in from another tailnet never match. Devices
	// of users have no tags and are not affected.
	//
	// Default: all.
	AllowTags []string `json:"allow_tags,omitempty"`

	// Patterns of tags. A device may not call if one of its tags matches, even if
	// `allow_tags` allows another one.
	//
	// Default: none.
	DenyTags []string `json:"deny_tags,omitempty"`

	// Refuse devices that were shared in from another tailnet. With or without this
	// option, their tags never become groups.
	//
	// Default: `false`.
	DenyShared bool `json:"deny_shared,omitempty"`
}

// The values of [Limits.TaggedUser].
const (
	TaggedUserName = "name"
	TaggedUserID   = "id"
)

// ErrNoGroup is returned by [Limits.Apply] for an identity without groups if
// require_groups is on.
var ErrNoGroup = errors.New("require_groups is on, and no group is granted")

// reserved is the prefix of the names of the cluster's own users and groups.
const reserved = "system:"

// Validate returns an error that names the option and the reason if l is invalid.
func (l *Limits) Validate() error {
	for _, list := range []struct {
		option, prefix string
		patterns       []string
	}{
		{"allow_groups", "", l.AllowGroups},
		{"deny_groups", "", l.DenyGroups},
		{"optional_groups", "", l.OptionalGroups},
		{"record_groups", "", l.RecordGroups},
		{"allow_tags", "tag:", l.AllowTags},
		{"deny_tags", "tag:", l.DenyTags},
	} {
		for _, pattern := range list.patterns {
			if err := checkPattern(pattern, list.prefix); err != nil {
				return fmt.Errorf("%s %q: %w", list.option, pattern, err)
			}
		}
	}
	for option, patterns := range map[string][]string{
		"allow_groups": l.AllowGroups, "deny_groups": l.DenyGroups,
		"optional_groups": l.OptionalGroups, "record_groups": l.RecordGroups,
	} {
		for _, pattern := range patterns {
			if bare, ok := strings.CutPrefix(pattern, l.GroupPrefix); ok && l.GroupPrefix != "" {
				return fmt.Errorf("%s %q: patterns see groups without group_prefix, so write %q", option, pattern, bare)
			}
		}
	}
	for option, prefix := range map[string]string{"user_prefix": l.UserPrefix, "group_prefix": l.GroupPrefix, "device_user_prefix": l.DeviceUserPrefix} {
		if err := checkPrefix(prefix); err != nil {
			return fmt.Errorf("%s %q: %w", option, prefix, err)
		}
	}
	if both := l.UserPrefix + l.DeviceUserPrefix; strings.HasPrefix(both, reserved) {
		return fmt.Errorf("user_prefix and device_user_prefix together start with %q: names that start with %s are reserved for the cluster's own components", both, reserved)
	}
	switch l.TaggedUser {
	case "", TaggedUserName, TaggedUserID:
	default:
		return fmt.Errorf("tagged_user %q: must be %s or %s", l.TaggedUser, TaggedUserName, TaggedUserID)
	}
	return nil
}

// CheckPeer returns an error if p's device may not call.
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
		return fmt.Errorf("the device was shared in from another tailnet, so its tags do not count for allow_tags: %s", strings.Join(p.Tags, ", "))
	}
	if !slices.ContainsFunc(p.Tags, func(tag string) bool { return glob.Any(l.AllowTags, tag) }) {
		return fmt.Errorf("the device has none of the tags that allow_tags names; its tags are %s", strings.Join(p.Tags, ", "))
	}
	return nil
}

// Apply returns id, which is p's, with the user and the groups that it may have here, and
// the groups that it removed. It holds back optional groups. The Source does not change,
// even if no group is left.
func (l *Limits) Apply(p Peer, id Identity) (limited Identity, cut []string, err error) {
	limited = id
	if limited.User, err = l.user(p, id.User); err != nil {
		return Identity{}, nil, err
	}
	limited.Groups, limited.HeldBack = nil, nil
	for i, group := range slices.Concat(id.Groups, id.HeldBack) {
		switch {
		case l.RemovedBy(group) != "":
			cut = append(cut, group)
		case i >= len(id.Groups), glob.Any(l.OptionalGroups, group):
			limited.HeldBack = append(limited.HeldBack, l.GroupPrefix+group)
		default:
			limited.Groups = append(limited.Groups, l.GroupPrefix+group)
		}
	}
	l.setEnforced(&limited)
	granted := slices.Concat(limited.Groups, limited.HeldBack)
	if l.RequireGroups && len(granted) == 0 {
		if len(cut) > 0 {
			return Identity{}, cut, fmt.Errorf("require_groups is on, and allow_groups or deny_groups removes all granted groups: %s", strings.Join(cut, ", "))
		}
		return Identity{}, nil, ErrNoGroup
	}
	if l.GroupPrefix != "" {
		for _, group := range granted {
			if strings.HasPrefix(group, reserved) {
				return Identity{}, cut, fmt.Errorf("group_prefix turns a group into %q, which is reserved for the cluster's own", group)
			}
		}
	}
	return limited, cut, nil
}

// user returns p's user, which is called name elsewhere, as it is called here.
func (l *Limits) user(p Peer, name string) (string, error) {
	prefix := l.UserPrefix
	switch {
	case p.Tagged():
		prefix += l.DeviceUserPrefix
		if l.TaggedUser == TaggedUserID {
			name = string(p.NodeID)
			if err := checkUser(name); err != nil {
				return "", fmt.Errorf("tagged_user is %s, and %w", TaggedUserID, err)
			}
		}
	case l.DeviceUserPrefix != "" && strings.HasPrefix(name, l.DeviceUserPrefix):
		return "", fmt.Errorf("user %q starts with %q, and device_user_prefix keeps such names for tagged devices", name, l.DeviceUserPrefix)
	}
	// A prefix "sys" makes a user "tem:admin" one of the cluster's own.
	if prefix != "" && strings.HasPrefix(prefix+name, reserved) {
		return "", fmt.Errorf("user_prefix or device_user_prefix turns the user into %q, which is reserved for the cluster's own components", prefix+name)
	}
	return prefix + name, nil
}

// RemovedBy returns the name of the option that removes group, or "" if callers may
// have it.
func (l *Limits) RemovedBy(group string) (option string) {
	switch {
	case glob.Any(l.DenyGroups, group):
		return "deny_groups"
	case len(l.AllowGroups) > 0 && !glob.Any(l.AllowGroups, group):
		return "allow_groups"
	}
	return ""
}

// CheckTarget returns an error if nobody may act as t, whatever RBAC allows. The limits
// for granted groups also apply to the groups that a client asks for, and to the own
// groups of a service account or node, even if the client asks for other groups: roles
// can be bound to the account's name. The names of a target include the prefixes.
func (l *Limits) CheckTarget(t *Target) error {
	for _, group := range slices.Concat(t.Groups, t.OwnGroups()) {
		bare, prefixed := strings.CutPrefix(group, l.GroupPrefix)
		if glob.Any(l.DenyGroups, group) || glob.Any(l.DenyGroups, bare) {
			return fmt.Errorf("nobody may be in group %s here, which deny_groups names", clip.String(group))
		}
		if len(l.AllowGroups) > 0 && (!prefixed || !glob.Any(l.AllowGroups, bare)) {
			return fmt.Errorf("nobody may be in group %s here, which allow_groups does not name", clip.String(group))
		}
	}
	return nil
}

// checkPattern returns an error if pattern can match no name that starts with prefix.
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
	if wildcard { // compare only what both have
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
	if _, behind, _ := strings.Cut(s, "{"); strings.Contains(behind, "}") {
		return errors.New("placeholders are not expanded here, except {$NAME} in a Caddyfile")
	}
	return nil
}
