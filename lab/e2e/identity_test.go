// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// whoAmI returns a caller's user and groups as the API server sees them, without
// system:authenticated, which every user has.
func whoAmI(t *testing.T, caller string) (user string, groups []string) {
	t.Helper()
	config, err := theLab.Callers[caller].REST()
	if err != nil {
		t.Fatal(err)
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	review, err := client.AuthenticationV1().SelfSubjectReviews().Create(t.Context(), &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatalf("asking the API server who %s is: %v", caller, err)
	}
	who := review.Status.UserInfo
	if len(who.Extra) > 0 || who.UID != "" {
		t.Errorf("%s has uid %q and extra %v; want neither", caller, who.UID, who.Extra)
	}
	return who.Username, slices.DeleteFunc(who.Groups, func(g string) bool { return g == "system:authenticated" })
}

func TestIdentity_OfEachCallerAtAPIServer(t *testing.T) {
	for _, tt := range []struct {
		why, caller string
		user        string
		groups      []string
	}{
		{"a user without a grant has the login name only", "carol", "carol@example.com", nil},
		{"a user with a grant has its groups", "bob", "bob@example.com", []string{"tailnet-readers"}},
		{"a user granted system:masters has it", "alice", "alice@example.com", []string{masters()}},
		{"a tagged device without a grant has its tags", "ci", "ci." + lab.Domain, []string{"tag:k8s-readers"}},
		{"a tagged device with a grant has the grant's groups only", "ops", "ops." + lab.Domain, []string{"ops"}},
		{"several grants add up in order", "erin", "erin@example.com", []string{"b", "a", "c"}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			user, groups := whoAmI(t, tt.caller)
			if user != tt.user || !slices.Equal(groups, tt.groups) {
				t.Errorf("%s is %s in %q; want %s in %q", tt.caller, user, groups, tt.user, tt.groups)
			}
		})
	}
}

func TestIdentity_ChangedGrantAppliesToNextRequest(t *testing.T) {
	if _, groups := whoAmI(t, "dave"); len(groups) > 0 {
		t.Fatalf("dave starts with groups %q; want none", groups)
	}
	wantGroups := func(want ...string) func() error {
		return func() error {
			if _, groups := whoAmI(t, "dave"); !slices.Equal(groups, want) {
				return fmt.Errorf("dave has groups %q; want %q", groups, want)
			}
			return nil
		}
	}
	withdraw := grantTo(t, "dave@example.com", "granted")
	eventually(t, "the grant is in force", wantGroups("granted"))
	withdraw()
	eventually(t, "the grant is withdrawn", wantGroups())
}

// grantTo adds a grant of groups to the policy file, until withdraw is called or the
// test ends.
func grantTo(t *testing.T, login string, groups ...string) (withdraw func()) {
	t.Helper()
	return grantRuleTo(t, login, map[string]any{"impersonate": map[string]any{"groups": groups}})
}

// grantRuleTo is [grantTo] for any rule.
func grantRuleTo(t *testing.T, login string, rule map[string]any) (withdraw func()) {
	t.Helper()
	var policy map[string]any
	if err := json.Unmarshal(theLab.Policy, &policy); err != nil {
		t.Fatal(err)
	}
	policy["grants"] = append(policy["grants"].([]any), map[string]any{
		"src": []string{login}, "dst": []string{"tag:k8s"},
		"app": map[string]any{"tailscale.com/cap/kubernetes": []any{rule}},
	})
	changed, err := json.Marshal(policy)
	if err != nil {
		t.Fatal(err)
	}
	set := func(policy []byte) {
		// Not the test's context, which has ended when cleanups run.
		if err := theLab.Headscale.SetPolicy(context.Background(), policy); err != nil {
			t.Fatal(err)
		}
	}
	// As an operator would: first the cluster allows the proxy to impersonate the
	// groups, then callers are granted them.
	if err := theLab.LimitProxy(t.Context(), changed, *constrained); err != nil {
		t.Fatal(err)
	}
	withdraw = sync.OnceFunc(func() { set(theLab.Policy) })
	t.Cleanup(withdraw)
	set(changed)
	return withdraw
}

func TestIdentity_KubectlAsIsRefusedWithReason(t *testing.T) {
	_, stderr, err := tryKubectl(t, "alice", "get", "pods", "--as", "bob@example.com")
	if err == nil {
		t.Fatal("kubectl --as succeeded; want a refusal")
	}
	for _, want := range []string{"Forbidden", "alice@example.com may not act as another user", "kubectl --as"} {
		if !strings.Contains(stderr, want) {
			t.Errorf("kubectl printed %q; want %q", stderr, want)
		}
	}
}

func TestIdentity_KubectlAsIsIgnoredWithStrip(t *testing.T) {
	kubeconfig := theLab.Callers["bob"].Kubeconfig + ".strip"
	if err := theLab.Callers["bob"].WriteKubeconfig(kubeconfig, "http://"+lab.ProxyName+":"+portStrip); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, err := runKubectl(t, kubeconfig, nil, "auth", "whoami", "--as", "system:admin", "--as-group", "system:masters", "-o", "jsonpath={.status.userInfo.username} {.status.userInfo.groups}")
	if err != nil {
		t.Fatalf("%v: %s", err, stderr)
	}
	if want := `bob@example.com ["tailnet-readers","system:authenticated"]`; stdout != want {
		t.Errorf("the API server says %s; want %s", stdout, want)
	}
}
