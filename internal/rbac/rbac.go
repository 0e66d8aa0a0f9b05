// SPDX-License-Identifier: Apache-2.0

// Package rbac writes the minimal RBAC for the proxy's service account, from the tailnet
// policy file that grants groups to callers.
package rbac

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/tailscale/hujson"
	authenticationv1 "k8s.io/api/authentication/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
	"tailscale.com/kube/kubetypes"
	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

// Options describe the proxy.
type Options struct {
	// Constrained is for API servers with constrained impersonation.
	Constrained bool
	// Audit, Capability and GroupPrefix are the handler's options.
	Audit                   bool
	Capability, GroupPrefix string
	// Namespace and ServiceAccount name the proxy's service account.
	Namespace, ServiceAccount string
	// Name is the name of the ClusterRole and of its binding.
	Name string
}

// Defaults returns the options for the manifests in examples/kubernetes.
func Defaults() Options {
	return Options{Namespace: "tailscale-impersonate", ServiceAccount: "proxy", Name: "tailscale-impersonate"}
}

// masters is the group with all rights.
const masters = "system:masters"

// The verbs of requests for resources, and of requests for other paths.
var (
	resourceVerbs = []string{"create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"}
	pathVerbs     = []string{"delete", "get", "head", "options", "patch", "post", "put"}
)

// FromPolicy returns manifests, in YAML, that allow the proxy to impersonate any user, and
// the groups that the tailnet policy file can give to callers.
func FromPolicy(policy []byte, o Options) ([]byte, error) {
	parsed, err := parse(policy)
	if err != nil {
		return nil, err
	}
	groups, err := parsed.groups(o)
	if err != nil {
		return nil, err
	}
	impersonable := groups
	if o.Constrained {
		// The API server refuses to impersonate it, whatever RBAC allows.
		impersonable = slices.DeleteFunc(slices.Clone(groups), func(g string) bool { return g == masters })
	}
	role := rbacv1.ClusterRole{
		TypeMeta:   metav1.TypeMeta{APIVersion: rbacv1.SchemeGroupVersion.String(), Kind: "ClusterRole"},
		ObjectMeta: metav1.ObjectMeta{Name: o.Name},
	}
	// In constrained impersonation, users and groups are resources of
	// authentication.k8s.io, with their own verbs.
	verb, group := "impersonate", ""
	if o.Constrained {
		verb, group = "impersonate:user-info", authenticationv1.GroupName
	}
	allow := func(group, resource string, names ...string) {
		role.Rules = append(role.Rules, rbacv1.PolicyRule{Verbs: []string{verb}, APIGroups: []string{group}, Resources: []string{resource}, ResourceNames: names})
	}
	allow(group, "users")
	if len(impersonable) > 0 {
		allow(group, "groups", impersonable...)
	}
	if o.Audit {
		allow(authenticationv1.GroupName, "uids")
		extras := rbacv1.PolicyRule{Verbs: []string{verb}, APIGroups: []string{authenticationv1.GroupName}}
		for _, key := range slices.Sorted(slices.Values(impersonate.AuditExtras)) {
			extras.Resources = append(extras.Resources, "userextras/"+key)
		}
		role.Rules = append(role.Rules, extras)
	}
	if o.Constrained {
		role.Rules = append(
			role.Rules,
			rbacv1.PolicyRule{Verbs: on(resourceVerbs), APIGroups: []string{"*"}, Resources: []string{"*"}},
			rbacv1.PolicyRule{Verbs: on(pathVerbs), NonResourceURLs: []string{"*"}},
		)
	}
	binding := rbacv1.ClusterRoleBinding{
		TypeMeta:   metav1.TypeMeta{APIVersion: rbacv1.SchemeGroupVersion.String(), Kind: "ClusterRoleBinding"},
		ObjectMeta: metav1.ObjectMeta{Name: o.Name},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: o.Name},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: o.ServiceAccount, Namespace: o.Namespace}},
	}

	var out bytes.Buffer
	out.WriteString(comment(groups, o))
	for i, object := range []any{role, binding} {
		if i > 0 {
			out.WriteString("---\n")
		}
		text, err := yaml.Marshal(object)
		if err != nil {
			return nil, err
		}
		out.Write(text)
	}
	return out.Bytes(), nil
}

// on returns the verbs that allow impersonation in requests with these verbs.
func on(verbs []string) []string {
	out := make([]string, len(verbs))
	for i, verb := range verbs {
		out[i] = "impersonate-on:user-info:" + verb
	}
	return out
}

// comment returns the comment of the manifests, for their readers.
func comment(groups []string, o Options) string {
	text := `What the service account ` + o.Namespace + `/` + o.ServiceAccount + ` may do: impersonate, and nothing else.

Groups are limited to those that the tailnet policy file names. A caller with any
other is answered with 403 by the API server.

Users cannot be limited by name: they are whoever is on the tailnet, and which names
that will be is not known beforehand. The proxy refuses those that start with system:,
but RBAC cannot express that: whoever holds this account's token can be any user.
`
	if len(groups) == 0 {
		text += `
The policy file names no groups and has no tags, so callers are users and nothing more.
`
	}
	if o.Constrained && slices.Contains(groups, masters) {
		text += `
The policy file names ` + masters + `, which constrained impersonation never allows: callers
that have it are refused by the API server. Grant them a group of your own instead, and
bind that to cluster-admin.
`
	} else if reserved := slices.DeleteFunc(slices.Clone(groups), func(g string) bool { return !strings.HasPrefix(g, "system:") }); len(reserved) > 0 {
		text += `
The policy file names groups of the cluster's own: ` + strings.Join(reserved, ", ") + `. Whoever
holds this account's token has their rights.
`
	}
	if o.Constrained {
		text += `
Constrained impersonation (Kubernetes 1.36 and later): impersonate:user-info says who may
be impersonated, impersonate-on:user-info what for. The latter may be narrowed down, for
instance to leave out secrets for everybody who comes through the proxy. The older verb
impersonate is left out: the API server falls back to it where the others do not allow a
request, so that with it they would limit nothing. Nodes and service accounts cannot be
impersonated this way.
`
	}
	if o.Audit {
		text += `
uids and userextras are for what the handler's option audit tells the audit log.
`
	}
	return "# " + strings.TrimSuffix(strings.ReplaceAll(strings.ReplaceAll(text, "\n", "\n# "), "# \n", "#\n"), "# ") + "\n"
}

// policyFile is the part of a tailnet policy file that is about Kubernetes.
type policyFile struct {
	Grants []struct {
		App map[tailcfg.PeerCapability][]json.RawMessage `json:"app"`
	} `json:"grants"`
	TagOwners map[string]json.RawMessage `json:"tagOwners"`
}

func parse(policy []byte) (parsed policyFile, err error) {
	standard, err := hujson.Standardize(slices.Clone(policy))
	if err != nil {
		return parsed, fmt.Errorf("not a tailnet policy file: %w", err)
	}
	if err := json.Unmarshal(standard, &parsed); err != nil {
		return parsed, fmt.Errorf("not a tailnet policy file: %w", err)
	}
	return parsed, nil
}

// capabilities returns the names under which callers have grants.
func (o *Options) capabilities() []tailcfg.PeerCapability {
	if o.Capability == "" {
		return impersonate.Capabilities
	}
	return []tailcfg.PeerCapability{tailcfg.PeerCapability(o.Capability)}
}

// Problems returns which grants of a tailnet policy file do not give what they seem to,
// because of an unknown or repeated key, a sentence for each key.
func Problems(policy []byte, o Options) (problems []string, err error) {
	parsed, err := parse(policy)
	if err != nil {
		return nil, err
	}
	for i, grant := range parsed.Grants {
		for _, capability := range o.capabilities() {
			for _, value := range grant.App[capability] {
				found, err := impersonate.GrantProblems(value)
				if err != nil {
					return nil, fmt.Errorf("grant %d: %s: %w", i+1, capability, err)
				}
				for _, problem := range found {
					problems = append(problems, fmt.Sprintf("grant %d: %s: %s", i+1, capability, problem))
				}
			}
		}
	}
	return problems, nil
}

// groups returns the groups that a policy file can give to callers: those that its
// grants name, and its tags.
func (parsed *policyFile) groups(o Options) (groups []string, err error) {
	for i, grant := range parsed.Grants {
		for _, capability := range o.capabilities() {
			for _, value := range grant.App[capability] {
				var rule kubetypes.KubernetesCapRule
				if err := json.Unmarshal(value, &rule); err != nil {
					return nil, fmt.Errorf("grant %d: %s: %w", i+1, capability, err)
				}
				if rule.Impersonate != nil {
					groups = append(groups, rule.Impersonate.Groups...)
				}
			}
		}
	}
	for tag := range parsed.TagOwners {
		groups = append(groups, tag)
	}
	for _, group := range groups {
		switch {
		case group == "":
			return nil, errors.New("a grant names a group without a name")
		case !impersonate.PrintableASCII(group):
			// A line break would end the comment in the manifest.
			return nil, fmt.Errorf("group %q holds a character that is not printable ASCII, so no caller can have it", group)
		}
	}
	slices.Sort(groups)
	groups = slices.Compact(groups)
	for i := range groups {
		groups[i] = o.GroupPrefix + groups[i]
	}
	return groups, nil
}
