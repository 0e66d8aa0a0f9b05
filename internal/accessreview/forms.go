// SPDX-License-Identifier: Apache-2.0

package accessreview

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apiserver/pkg/authentication/user"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

// form is one of the sets of permissions that allow acting as a target. Every step has
// to pass.
type form struct {
	steps []step
	// groups are the groups to send for the target.
	groups []string
}

// step passes if wildcard is allowed, or else if each permission is.
type step struct {
	wildcard *permission // nil if there is none
	each     []permission
	// never says why the step fails whatever is allowed. Empty if it can pass.
	never string
}

// permission is the use of a verb on a resource or on a path.
type permission struct {
	resource *authorizationv1.ResourceAttributes
	path     *authorizationv1.NonResourceAttributes
}

// The forms for users. Those for nodes and service accounts differ.
var (
	legacy      = attributes{verb: "impersonate", users: "users"}
	constrained = attributes{verb: "impersonate:user-info", group: authenticationv1.GroupName, users: "users", constrained: true}
)

// forms returns the sets of permissions that allow acting as t in a request, in the
// order in which the API server tries them.
//
// It omits the constrained form for the node that a service account runs on
// (associated-node): no caller is a service account. It also omits the groups of a
// service account: the API server adds them itself, and the proxy's account would need
// permission to send them.
func forms(t *impersonate.Target, request requestinfo.Info) []form {
	legacy, constrained, name := legacy, constrained, "user-info"
	groups := t.Groups
	if _, ok := t.NodeName(); ok {
		constrained.verb, constrained.users, name = "impersonate:arbitrary-node", "nodes", "arbitrary-node"
		groups = t.OwnGroups() // which the API server adds under the constrained form only
	}
	if _, _, ok := t.ServiceAccount(); ok {
		constrained.verb, constrained.users, name = "impersonate:serviceaccount", "serviceaccounts", "serviceaccount"
		legacy.users = "serviceaccounts"
	}
	all := []form{{steps: legacy.steps(t), groups: t.Groups}}
	// The API server applies the constrained forms for service accounts and nodes only
	// to a target that has no other attributes.
	if name != "user-info" && !t.OnlyUser() {
		return all
	}
	return slices.Insert(all, 0, form{
		steps:  append([]step{{each: []permission{to("impersonate-on:"+name+":", request)}}}, constrained.steps(t)...),
		groups: groups,
	})
}

// to returns the permission that a request itself needs, with prefix added to the verb.
func to(prefix string, request requestinfo.Info) permission {
	if !request.IsResourceRequest {
		return permission{path: &authorizationv1.NonResourceAttributes{Verb: prefix + request.Verb, Path: request.Path}}
	}
	return permission{resource: &authorizationv1.ResourceAttributes{
		Verb:        prefix + request.Verb,
		Group:       request.APIGroup,
		Version:     request.APIVersion,
		Resource:    request.Resource,
		Subresource: request.Subresource,
		Namespace:   request.Namespace,
		Name:        request.Name,
	}}
}

// attributes names the permissions on a target's attributes in one form.
type attributes struct {
	verb string
	// group is the API group of users and groups, users the resource of the user.
	group, users string
	// constrained selects the newer form, in which the API server checks wildcards
	// first and refuses some targets outright.
	constrained bool
}

// wildcardFrom is the number of values from which the API server checks a wildcard
// first, in the newer form.
const wildcardFrom = 4

// steps returns the steps for t, in the order in which the API server checks them.
func (a attributes) steps(t *impersonate.Target) []step {
	steps := []step{{each: []permission{a.user(t)}}}
	if t.UID != "" {
		steps = append(steps, step{each: []permission{a.permission(authenticationv1.GroupName, "uids", "", t.UID)}})
	}
	if len(t.Groups) > 0 {
		steps = append(steps, a.groups(t))
	}
	if len(t.Extra) > 0 {
		steps = append(steps, a.extra(t))
	}
	return steps
}

func (a attributes) user(t *impersonate.Target) permission {
	p := a.permission(a.group, a.users, "", t.User)
	switch a.users {
	case "serviceaccounts":
		p.resource.Namespace, p.resource.Name, _ = t.ServiceAccount()
	case "nodes":
		p.resource.Name, _ = t.NodeName()
	}
	return p
}

func (a attributes) groups(t *impersonate.Target) step {
	var s step
	for _, group := range t.Groups {
		s.each = append(s.each, a.permission(a.group, "groups", "", group))
	}
	if !a.constrained {
		return s
	}
	if slices.Contains(t.Groups, user.SystemPrivilegedGroup) {
		return step{
			each:  []permission{a.permission(a.group, "groups", "", user.SystemPrivilegedGroup)},
			never: "impersonating the system:masters group is not allowed",
		}
	}
	if len(t.Groups) >= wildcardFrom {
		all := a.permission(a.group, "groups", "", "*")
		s.wildcard = &all
	}
	return s
}

func (a attributes) extra(t *impersonate.Target) step {
	var s step
	for _, key := range slices.Sorted(maps.Keys(t.Extra)) {
		for _, value := range t.Extra[key] {
			s.each = append(s.each, a.permission(authenticationv1.GroupName, "userextras", key, value))
		}
	}
	if !a.constrained {
		return s
	}
	for key := range t.Extra {
		if err := checkKey(key); err != nil {
			return step{each: []permission{a.permission(authenticationv1.GroupName, "userextras", "", "")}, never: err.Error()}
		}
	}
	if len(s.each) >= wildcardFrom {
		all := a.permission(authenticationv1.GroupName, "userextras", "*", "*")
		s.wildcard = &all
	}
	return s
}

func (a attributes) permission(group, resource, subresource, name string) permission {
	return permission{resource: &authorizationv1.ResourceAttributes{
		Verb:        a.verb,
		Group:       group,
		Version:     "v1",
		Resource:    resource,
		Subresource: subresource,
		Name:        name,
	}}
}

// checkKey returns an error unless the newer form accepts key as the key of an extra
// field.
func checkKey(key string) error {
	if err := validation.IsDomainPrefixedPath(field.NewPath("extra", "key"), key).ToAggregate(); err != nil {
		return fmt.Errorf("impersonating an invalid key in extra is not allowed: %w", err)
	}
	if key != strings.ToLower(key) {
		return fmt.Errorf("impersonating a non-lowercase key in extra is not allowed: %q", key)
	}
	return nil
}
