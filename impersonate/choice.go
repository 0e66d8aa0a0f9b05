// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/glob"
)

// The keys of the extra fields that say which groups a request uses. They are set with
// audit only.
const (
	ExtraChosenGroups   = extraDomain + "chosen-groups"    // the groups that the request asks for
	ExtraHeldBackGroups = extraDomain + "held-back-groups" // granted groups that the request does not use
)

// Choose returns id with those of its groups that t asks for, and no others. ok is false
// if t asks for anything that id does not have: another user, a UID, extra fields, or a
// group that was not granted. A t without groups asks for none.
//
// Whatever t holds, the result has no group that was not granted to id.
func (l *Limits) Choose(id *Identity, t *Target) (chosen *Identity, ok bool) {
	if t.User != id.User || t.UID != "" || len(t.Extra) > 0 {
		return nil, false
	}
	granted := slices.Concat(id.Groups, id.HeldBack)
	for _, group := range t.Groups {
		if !slices.Contains(granted, group) {
			return nil, false
		}
	}
	out := *id
	out.Chosen = true
	out.Groups, out.HeldBack = nil, nil
	for _, group := range granted {
		if slices.Contains(t.Groups, group) {
			out.Groups = append(out.Groups, group)
		} else {
			out.HeldBack = append(out.HeldBack, group)
		}
	}
	if out.Extra != nil {
		out.Extra = maps.Clone(out.Extra)
		out.setGroupExtras()
	}
	l.setEnforced(&out)
	return &out, true
}

// Missing returns the first group that t asks for and id was not granted, or "".
func (id *Identity) Missing(t *Target) string {
	for _, group := range t.Groups {
		if !slices.Contains(id.Groups, group) && !slices.Contains(id.HeldBack, group) {
			return group
		}
	}
	return ""
}

// setGroupExtras sets the extra fields that say which groups id uses.
func (id *Identity) setGroupExtras() {
	delete(id.Extra, ExtraChosenGroups)
	delete(id.Extra, ExtraHeldBackGroups)
	if id.Chosen && len(id.Groups) > 0 {
		id.Extra[ExtraChosenGroups] = id.Groups
	}
	if len(id.HeldBack) > 0 {
		id.Extra[ExtraHeldBackGroups] = id.HeldBack
	}
}

// CheckUse returns an error if require_groups is on and id, which [Limits.Apply] or
// [Limits.Choose] returned, uses no group.
func (l *Limits) CheckUse(id *Identity) error {
	if !l.RequireGroups || len(id.Groups) > 0 {
		return nil
	}
	return fmt.Errorf("require_groups is on, and the request uses none of its groups; ask for one with kubectl --as=%s --as-group=%s", id.User, strings.Join(id.HeldBack, " or "))
}

// setEnforced makes recording enforced for id if record_groups names a group that it
// uses, and takes that back if not.
func (l *Limits) setEnforced(id *Identity) {
	if id.Recording.ByGroup {
		id.Recording.Enforce, id.Recording.ByGroup = false, false
	}
	if !id.Recording.Enforce && l.RecordsAny(id.Groups) {
		id.Recording.Enforce, id.Recording.ByGroup = true, true
	}
}

// RecordsAny reports whether record_groups names one of groups, which have the prefixes
// that requests are sent with.
func (l *Limits) RecordsAny(groups []string) bool {
	if len(l.RecordGroups) == 0 {
		return false
	}
	return slices.ContainsFunc(groups, func(group string) bool {
		return glob.Any(l.RecordGroups, group) || glob.Any(l.RecordGroups, strings.TrimPrefix(group, l.GroupPrefix))
	})
}
