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

// All of the other tests run with the rights that caddy tailscale-impersonate rbac
// writes: those of make test with the older verb, those of make test-long with
// constrained impersonation. These are about what it leaves out.

// withoutGrant returns the lab's policy file as it would be without a group.
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

// limit has the proxy limited to what a policy file says, until the test ends.
func limit(t *testing.T, policy []byte, byConstraints bool) {
	t.Helper()
	set := func(ctx context.Context, policy []byte, byConstraints bool) {
		t.Helper()
		if err := theLab.LimitProxy(ctx, policy, byConstraints); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the proxy's rights are in force", func() error {
			// It fails where the answer is no.
			answer, stderr, err := runKubectl(t, theLab.Kubeconfig(), nil, "auth", "can-i", "impersonate", "users")
			if want := map[bool]string{true: "no", false: "yes"}[byConstraints]; strings.TrimSpace(answer) != want {
				return fmt.Errorf("whether it may impersonate by the older verb: %q (%w: %s); want %q", answer, err, stderr, want)
			}
			return nil
		})
	}
	t.Cleanup(func() {
		// Not the test's context, which is over by then.
		set(context.Background(), theLab.Policy, *constrained)
		eventually(t, "what the proxy may do is as it was", func() error { return listsPods(t, "bob") })
	})
	set(t.Context(), policy, byConstraints)
}

// useOlderVerb is for what constrained impersonation cannot do: act as service
// accounts, as nodes, and by 12-act-as.yaml.
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

func TestGroupsThatAreNotInThePolicyFileCannotBeImpersonated(t *testing.T) {
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

// cannotImpersonate returns an error unless the API server refuses to let the proxy
// act as caller.
func cannotImpersonate(t *testing.T, caller string) error {
	t.Helper()
	resp := send(t, caller, "80", get("/api/v1/namespaces/default/pods"))
	if resp.StatusCode != http.StatusForbidden || !strings.Contains(resp.body, "cannot impersonate") {
		return fmt.Errorf("got %s: %s; want it to be said that the proxy cannot impersonate", resp.Status, resp.body)
	}
	return nil
}

// Under constrained impersonation everything that the mapping table has works: users
// with groups and without, tags, reads, writes, streams and what is no object.
func TestConstrainedImpersonation(t *testing.T) {
	limit(t, theLab.Policy, true)
	if !*constrained { // or she has another group
		eventually(t, "system:masters is refused", func() error { return cannotImpersonate(t, "alice") })
	}
	for _, caller := range []string{"bob", "carol", "ci"} {
		if err := listsPods(t, caller); err != nil {
			t.Errorf("%s: %v", caller, err)
		}
	}
	if _, stderr, err := tryKubectl(t, "dave", "get", "pods"); err == nil || !strings.Contains(stderr, `"dave@example.com" cannot list`) {
		t.Errorf("dave: %v: %s; want the API server to refuse him by name", err, stderr)
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

	// Nobody else can be impersonated: what the older verb would allow is not left.
	for group, want := range map[string]string{"system:nodes": "cannot impersonate", "system:masters": "not allowed"} {
		_, stderr, err := runKubectl(t, theLab.Kubeconfig(), nil, "get", "--raw", "/version", "--as", "mallory", "--as-group", group)
		if err == nil || !strings.Contains(stderr, want) {
			t.Errorf("with the proxy's credentials, as %s: %v: %s", group, err, stderr)
		}
	}
}
