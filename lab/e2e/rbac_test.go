// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
)

// All other tests run with the rights that caddy tailscale-impersonate rbac writes:
// in make test with the older verb, in make test-long with constrained
// impersonation. These tests are about the rights that it does not give.

// withoutGrant returns the lab's policy file without a group.
func withoutGrant(t *testing.T, group string) []byte {
	t.Helper()
	var policy map[string]any
	if err := json.Unmarshal(theLab.Policy, &policy); err != nil {
		t.Fatal(err)
	}
	var kept []any
	for _, grant := range policy["grants"].([]any) {
		text, err := json.Marshal(grant)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), `"`+group+`"`) {
			kept = append(kept, grant)
		}
	}
	policy["grants"] = kept
	changed, err := json.Marshal(policy)
	if err != nil {
		t.Fatal(err)
	}
	return changed
}

// limit gives the proxy only the rights for a policy file, until the test ends.
func limit(t *testing.T, policy []byte, byConstraints bool) {
	t.Helper()
	set := func(ctx context.Context, policy []byte, byConstraints bool) {
		t.Helper()
		if err := theLab.LimitProxy(ctx, policy, byConstraints); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the proxy's rights are in force", func() error {
			// kubectl fails if the answer is no.
			answer, stderr, err := runKubectl(t, theLab.Kubeconfig(), nil, "auth", "can-i", "impersonate", "users")
			if want := map[bool]string{true: "no", false: "yes"}[byConstraints]; strings.TrimSpace(answer) != want {
				return fmt.Errorf("may impersonate by the older verb: %q (%w: %s); want %q", answer, err, stderr, want)
			}
			return nil
		})
	}
	t.Cleanup(func() {
		// Not the test's context, which has ended.
		set(context.Background(), theLab.Policy, *constrained)
		eventually(t, "the proxy's rights are restored", func() error { return listsPods(t, "bob") })
	})
	set(t.Context(), policy, byConstraints)
}

// useOlderVerb is for tests of what constrained impersonation cannot do: acting as
// service accounts, as nodes, and by 12-act-as.yaml.
func useOlderVerb(t *testing.T) {
	t.Helper()
	if *constrained {
		limit(t, theLab.Policy, false)
	}
}

// listsPods returns an error unless caller may list pods.
func listsPods(t *testing.T, caller string) error {
	t.Helper()
	if _, stderr, err := tryKubectl(t, caller, "get", "pods"); err != nil {
		return fmt.Errorf("%w: %s", err, stderr)
	}
	return nil
}

func TestRBAC_GroupsOutsidePolicyCannotBeImpersonated(t *testing.T) {
	for _, byConstraints := range []bool{false, true} {
		t.Run(fmt.Sprintf("constrained %v", byConstraints), func(t *testing.T) {
			limit(t, withoutGrant(t, "tailnet-readers"), byConstraints)
			eventually(t, "bob's group is refused", func() error { return cannotImpersonate(t, "bob") })
			if err := listsPods(t, "ci"); err != nil {
				t.Errorf("a group that is in the policy file: %v", err)
			}
		})
	}
}

// cannotImpersonate returns an error unless the API server refuses the proxy to act
// as caller.
func cannotImpersonate(t *testing.T, caller string) error {
	t.Helper()
	resp := send(t, caller, "80", get("/api/v1/namespaces/default/pods"))
	if resp.StatusCode != http.StatusForbidden || !strings.Contains(resp.body, "cannot impersonate") {
		return fmt.Errorf("got %s: %s; want the API server to refuse the impersonation", resp.Status, resp.body)
	}
	return nil
}

// Under constrained impersonation, everything in the mapping table works: users with
// and without groups, tags, reads, writes, streams and requests without a resource.
func TestRBAC_ConstrainedImpersonationCoversMapping(t *testing.T) {
	limit(t, theLab.Policy, true)
	if !*constrained { // with -constrained, alice has another group
		eventually(t, "system:masters is refused", func() error { return cannotImpersonate(t, "alice") })
	}
	for _, caller := range []string{"bob", "carol", "ci"} {
		if err := listsPods(t, caller); err != nil {
			t.Errorf("%s: %v", caller, err)
		}
	}
	if _, stderr, err := tryKubectl(t, "dave", "get", "pods"); err == nil || !strings.Contains(stderr, `"dave@example.com" cannot list`) {
		t.Errorf("dave: %v: %s; want the API server's refusal, which names him", err, stderr)
	}
	admin := func(args ...string) {
		t.Helper()
		if _, stderr, err := runKubectl(t, theLab.AdminKubeconfig(), nil, args...); err != nil {
			t.Fatalf("kubectl %v: %v: %s", args, err, stderr)
		}
	}
	admin("create", "rolebinding", "constrained", "--clusterrole=edit", "--group=a")
	t.Cleanup(func() { admin("delete", "rolebinding", "constrained") })
	eventually(t, "erin's group may edit", func() error { return listsPods(t, "erin") })
	if got := kubectl(t, "erin", "exec", "web", "--", "echo", "hello"); got != "hello\n" {
		t.Errorf("exec printed %q", got)
	}
	kubectl(t, "erin", "create", "configmap", "constrained", "--from-literal=a=b")
	kubectl(t, "erin", "patch", "configmap", "constrained", "-p", `{"data":{"a":"c"}}`)
	kubectl(t, "erin", "delete", "configmap", "constrained")
	kubectl(t, "erin", "get", "--raw", "/version")

	// Other groups cannot be impersonated: rights by the older verb are gone.
	for group, want := range map[string]string{"system:nodes": "cannot impersonate", "system:masters": "not allowed"} {
		_, stderr, err := runKubectl(t, theLab.Kubeconfig(), nil, "get", "--raw", "/version", "--as", "mallory", "--as-group", group)
		if err == nil || !strings.Contains(stderr, want) {
			t.Errorf("with the proxy's credentials, as %s: %v: %s", group, err, stderr)
		}
	}
}
