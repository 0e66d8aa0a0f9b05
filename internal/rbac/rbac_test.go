// SPDX-License-Identifier: Apache-2.0

package rbac_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/rbac"
)

// policy has groups in several places, and other values that look like groups.
const policy = `// a comment
{
	"groups": {"group:ops": ["alice@example.com"]},
	"tagOwners": {"tag:ci": ["group:ops"], "tag:k8s": []},
	"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
	"grants": [
		{"src": ["*"], "dst": ["tag:k8s"], "ip": ["tcp:443"]},
		{"src": ["group:ops"], "dst": ["tag:k8s"], "app": {
			"tailscale.com/cap/kubernetes": [
				{"impersonate": {"groups": ["ops", "readers"]}},
				{"recorder": ["tag:recorder"]},
			],
			"example.com/cap/other": [{"impersonate": {"groups": ["staging"]}}],
		}},
		{"src": ["*"], "dst": ["*"], "app": {"https://tailscale.com/cap/kubernetes": [{"impersonate": {"groups": ["readers", "older"]}}]}},
	],
}`

// parse returns the objects in YAML.
func parse(t *testing.T, text []byte) (role rbacv1.ClusterRole, binding rbacv1.ClusterRoleBinding) {
	t.Helper()
	first, second, ok := strings.Cut(string(text), "\n---\n")
	if !ok {
		t.Fatalf("not two documents:\n%s", text)
	}
	if err := yaml.UnmarshalStrict([]byte(first), &role); err != nil {
		t.Fatal(err)
	}
	if err := yaml.UnmarshalStrict([]byte(second), &binding); err != nil {
		t.Fatal(err)
	}
	return role, binding
}

var serviceAccount = rbac.Options{Namespace: "ns", ServiceAccount: "sa", Name: "n"}

func generate(t *testing.T, policy string, change func(*rbac.Options)) []byte {
	t.Helper()
	o := serviceAccount
	if change != nil {
		change(&o)
	}
	text, err := rbac.FromPolicy([]byte(policy), o)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// The role allows the groups that the policy file can give to callers, and no others.
func TestFromPolicy_AllowsGroupsOfThePolicyFile(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*rbac.Options)
		want   []string
	}{
		{"default", nil, []string{"older", "ops", "readers", "tag:ci", "tag:k8s"}},
		{"capability", func(o *rbac.Options) { o.Capability = "example.com/cap/other" }, []string{"staging", "tag:ci", "tag:k8s"}},
		{"group_prefix", func(o *rbac.Options) { o.GroupPrefix = "ts:"; o.Capability = "example.com/cap/other" }, []string{"ts:staging", "ts:tag:ci", "ts:tag:k8s"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			role, binding := parse(t, generate(t, policy, tt.change))
			want := []rbacv1.PolicyRule{
				{Verbs: []string{"impersonate"}, APIGroups: []string{""}, Resources: []string{"users"}},
				{Verbs: []string{"impersonate"}, APIGroups: []string{""}, Resources: []string{"groups"}, ResourceNames: tt.want},
			}
			if diff := cmp.Diff(want, role.Rules); diff != "" {
				t.Errorf("rules (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff([]rbacv1.Subject{{Kind: "ServiceAccount", Name: "sa", Namespace: "ns"}}, binding.Subjects); diff != "" || binding.RoleRef.Name != role.Name || role.Name != "n" {
				t.Errorf("the binding is %+v", binding)
			}
		})
	}
}

// An empty list of resource names would allow all groups.
func TestFromPolicy_NoRuleForGroupsWithoutGroups(t *testing.T) {
	text := generate(t, `{"grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}]}`, nil)
	role, _ := parse(t, text)
	if len(role.Rules) != 1 || !slices.Equal(role.Rules[0].Resources, []string{"users"}) {
		t.Errorf("got rules %v; want one for users", role.Rules)
	}
	if !strings.Contains(string(text), "names no groups") {
		t.Errorf("the comment does not say that there are none:\n%s", text)
	}
}

// With constrained impersonation, a rule with the older verb would lift all limits, and
// one with * would allow everything.
func TestFromPolicy_ConstrainedVerbsOnly(t *testing.T) {
	text := generate(t, policy, func(o *rbac.Options) { o.Constrained, o.Audit = true, true })
	role, _ := parse(t, text)
	for _, rule := range role.Rules {
		for _, verb := range rule.Verbs {
			if verb != "impersonate:user-info" && !strings.HasPrefix(verb, "impersonate-on:user-info:") {
				t.Errorf("verb %q of %v", verb, rule)
			}
		}
		if rule.Verbs[0] == "impersonate:user-info" && !slices.Equal(rule.APIGroups, []string{"authentication.k8s.io"}) {
			t.Errorf("API groups %v of %v", rule.APIGroups, rule)
		}
	}
	if n := len(role.Rules); n != 6 {
		t.Errorf("got %d rules; want 6: users, groups, uids, extras, objects and paths", n)
	}
	if !strings.Contains(string(text), "impersonate is left out") {
		t.Error("the comment does not say why the older verb is missing")
	}
}

// Constrained impersonation never allows system:masters.
func TestFromPolicy_ConstrainedOmitsMasters(t *testing.T) {
	masters := strings.Replace(policy, `"ops"`, `"system:masters"`, 1)
	for _, constrained := range []bool{false, true} {
		text := generate(t, masters, func(o *rbac.Options) { o.Constrained = constrained })
		role, _ := parse(t, text)
		if got := slices.Contains(role.Rules[1].ResourceNames, "system:masters"); got == constrained {
			t.Errorf("constrained %v: system:masters may be impersonated: %v", constrained, got)
		}
		if got := strings.Contains(string(text), "never allows"); got != constrained {
			t.Errorf("constrained %v: the comment says that it may not: %v", constrained, got)
		}
	}
}

func TestFromPolicy_UIDsAndExtrasOnlyForAudit(t *testing.T) {
	for _, audit := range []bool{false, true} {
		role, _ := parse(t, generate(t, policy, func(o *rbac.Options) { o.Audit = audit }))
		found := 0
		for _, rule := range role.Rules {
			for _, resource := range rule.Resources {
				if resource == "uids" || strings.HasPrefix(resource, "userextras/tailscale-impersonate.github.io/") {
					found++
				}
				if resource == "userextras" || strings.Contains(resource, "*") {
					t.Errorf("resource %q is all extras", resource)
				}
			}
		}
		if (found > 1) != audit {
			t.Errorf("audit %v: got %d resources for it", audit, found)
		}
	}
}

func TestFromPolicy_CommentNamesWhatRBACCannotLimit(t *testing.T) {
	text := string(generate(t, strings.Replace(policy, `"ops"`, `"system:masters"`, 1), nil))
	for _, want := range []string{"Users cannot be limited by name", "system:masters. Whoever"} {
		if !strings.Contains(text, want) {
			t.Errorf("the comment lacks %q:\n%s", want, text)
		}
	}
	for line := range strings.SplitSeq(text[:strings.Index(text, "apiVersion")], "\n") {
		if line != "" && !strings.HasPrefix(line, "#") || strings.HasSuffix(line, " ") {
			t.Errorf("line %q is not a comment", line)
		}
	}
}

func TestFromPolicy_RejectsInvalidPolicyFiles(t *testing.T) {
	for _, text := range []string{
		"", "{", "[]", `{"grants": {}}`,
		`{"grants": [{"app": {"tailscale.com/cap/kubernetes": [{"impersonate": {"groups": "ops"}}]}}]}`,
		`{"grants": [{"app": {"tailscale.com/cap/kubernetes": [{"impersonate": {"groups": [""]}}]}}]}`,
		// The line break would end the comment in the manifest.
		`{"grants": [{"app": {"tailscale.com/cap/kubernetes": [{"impersonate": {"groups": ["system:x\u000daggregationRule: {}"]}}]}}]}`,
	} {
		if got, err := rbac.FromPolicy([]byte(text), serviceAccount); err == nil || got != nil {
			t.Errorf("%s: got %s, %v; want an error", text, got, err)
		}
	}
}

// A grant that is misspelt is in the policy file for everyone to see, and gives nothing.
func TestProblems_NamesGrants(t *testing.T) {
	const policy = `{"grants": [
		{"app": {"tailscale.com/cap/kubernetes": [{"impersonate": {"groups": ["ops"]}}], "example.com/cap/other": [{"x": 1}]}},
		{"app": {"https://tailscale.com/cap/kubernetes": [{/* a comment */}, {"impersonate": {"group": ["ops"]}, "enforceRecorder": true, "enforceRecorder": false,}]}},
	]}`
	got, err := rbac.Problems([]byte(policy), serviceAccount)
	want := []string{
		`grant 2: https://tailscale.com/cap/kubernetes: unknown key "impersonate.group"; the nearest known key is "impersonate.groups"`,
		`grant 2: https://tailscale.com/cap/kubernetes: key "enforceRecorder" repeats "enforceRecorder"`,
	}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("error %v, problems (-want +got):\n%s", err, diff)
	}
	other := serviceAccount
	other.Capability = "example.com/cap/other"
	if got, err := rbac.Problems([]byte(policy), other); len(got) != 1 || err != nil {
		t.Errorf("got %q, %v; want the problem of the capability that counts", got, err)
	}
	if got, err := rbac.Problems([]byte("{"), serviceAccount); got != nil || err == nil {
		t.Errorf("got %q, %v; want an error", got, err)
	}
}

// The example manifest holds the output for the example policy file.
func TestFromPolicy_WritesTheExampleManifest(t *testing.T) {
	policy, err := os.ReadFile(filepath.Join("..", "..", "examples", "policy.hujson"))
	if err != nil {
		t.Fatal(err)
	}
	want, err := rbac.FromPolicy(policy, rbac.Defaults())
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join("..", "..", "examples", "kubernetes", "10-impersonator.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(string(got), "\n---\n"+string(want)) {
		t.Errorf("examples/kubernetes/10-impersonator.yaml does not end with\n%s", want)
	}
}
