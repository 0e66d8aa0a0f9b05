// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

func TestActAs_AllowedUserIsImpersonated(t *testing.T) {
	useOlderVerb(t)
	kubeconfig := kubeconfigFor(t, "alice", portAuthorize)
	got := whoAmIAt(t, kubeconfig, "--as", "bob@example.com", "--as-group", "tailnet-readers")
	want := userInfo{
		Username: "bob@example.com",
		Groups:   []string{"tailnet-readers", "system:authenticated"},
		Extra: map[string][]string{
			impersonate.ExtraOriginalUser:   {"alice@example.com"},
			impersonate.ExtraOriginalGroups: {masters()},
			impersonate.ExtraNode:           {"alice." + lab.Domain},
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("kubectl auth whoami --as (-want +got):\n%s", diff)
	}
	// While alice acts as bob, she has only bob's rights.
	_, stderr, err := runKubectl(t, kubeconfig, nil, "get", "secrets", "--as", "bob@example.com")
	if err == nil || !strings.Contains(stderr, `User "bob@example.com" cannot list resource "secrets"`) {
		t.Errorf("alice reading secrets as bob: %v %s; want a refusal that names bob", err, stderr)
	}
	if _, stderr, err := runKubectl(t, kubeconfig, nil, "get", "secrets"); err != nil {
		t.Errorf("alice as herself: %v %s", err, stderr)
	}
}

// With the manifests as they are, a caller can act as a service account, as in `kubectl
// auth can-i --as`.
func TestActAs_ServiceAccountNeedsOnlyTheManifests(t *testing.T) {
	useOlderVerb(t)
	got := whoAmIAt(t, kubeconfigFor(t, "alice", portAuthorize), "--as", "system:serviceaccount:default:default")
	got.Extra = nil
	want := userInfo{
		Username: "system:serviceaccount:default:default",
		Groups:   []string{"system:serviceaccounts", "system:serviceaccounts:default", "system:authenticated"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("kubectl auth whoami --as (-want +got):\n%s", diff)
	}
}

func TestActAs_RefusalNamesMissingPermission(t *testing.T) {
	kubeconfig := kubeconfigFor(t, "dave", portAuthorize)
	for _, tt := range []struct {
		args []string
		want []string
	}{
		{[]string{"get", "--raw", "/api/v1/namespaces/default/pods", "--as", "alice@example.com"}, []string{
			`users "alice@example.com" is forbidden: User "dave@example.com" cannot impersonate resource "users" in API group "" at the cluster scope`,
			`pods is forbidden: User "dave@example.com" cannot impersonate-on:user-info:list resource "pods" in API group "" in the namespace "default"`,
		}},
		{[]string{"get", "--raw", "/version", "--as", "system:serviceaccount:kube-system:default"}, []string{
			`serviceaccounts "default" is forbidden: User "dave@example.com" cannot impersonate resource "serviceaccounts" in API group "" in the namespace "kube-system"`,
		}},
		{[]string{"get", "--raw", "/metrics", "--as", "alice@example.com"}, []string{
			`User "dave@example.com" cannot impersonate-on:user-info:get path "/metrics"`,
		}},
	} {
		_, stderr, err := runKubectl(t, kubeconfig, nil, tt.args...)
		if err == nil {
			t.Errorf("kubectl %s succeeded; want a refusal", tt.args)
		}
		for _, want := range append(tt.want, "Forbidden") {
			if !strings.Contains(stderr, want) {
				t.Errorf("kubectl %s printed %q; want %q", tt.args, stderr, want)
			}
		}
	}
}

func TestActAs_AuditLogNamesBothUsers(t *testing.T) {
	giveErinRights(t)
	giveProxyRights(t)
	const uri = "/api/v1/namespaces/default/pods?labelSelector=acting"
	log := tail(t, theLab.Cluster.AuditLog())
	send(t, "erin", portAuthorizeLimits, get(uri, "Impersonate-User: old-user", "Impersonate-Group: acted-group"))
	event := audited(t, log, uri)
	if event.ImpersonatedUser == nil {
		t.Fatalf("got event %+v; want one with an impersonated user", event)
	}
	address, nodeID, userID := device(t, "erin")
	want := userInfo{
		Username: "old-user",
		Groups:   []string{"acted-group", "system:authenticated"},
		Extra: map[string][]string{
			impersonate.ExtraOriginalUser: {"erin@example.com"}, impersonate.ExtraOriginalUID: {userID},
			impersonate.ExtraNode: {"erin." + lab.Domain}, impersonate.ExtraNodeID: {nodeID}, impersonate.ExtraAddress: {address},
			impersonate.ExtraGroupsSource: {"grants"}, impersonate.ExtraRequestID: {event.AuditID},
		},
	}
	if diff := cmp.Diff(want, *event.ImpersonatedUser); diff != "" {
		t.Errorf("impersonated user (-want +got):\n%s", diff)
	}
}

// RBAC lets erin act as more users and groups than the site's limits allow.
func TestActAs_LimitsApplyToTarget(t *testing.T) {
	giveErinRights(t)
	giveProxyRights(t)
	kubeconfig := kubeconfigFor(t, "erin", portAuthorizeLimits)
	for _, tt := range []struct {
		args    []string
		refused string
	}{
		{[]string{"--as", "old-user", "--as-group", "acted-group"}, ""},
		{[]string{"--as", "old-user", "--as-group", "system:masters"}, "nobody may be in group system:masters here, which deny_groups names"},
		{[]string{"--as", "old-user", "--as-group", "acted-group", "--as-group", "system:masters"}, "nobody may be in group system:masters here"},
		{[]string{"--as", "old-user", "--as-group", "old-group"}, "nobody may be in group old-group here, which allow_groups does not name"},
		{[]string{"--as", "system:serviceaccount:default:old-account"}, "nobody may be in group system:serviceaccounts here"},
		{[]string{"--as", "system:node:new-node"}, "nobody may be in group system:nodes here"},
	} {
		_, stderr, err := runKubectl(t, kubeconfig, nil, append([]string{"auth", "whoami"}, tt.args...)...)
		switch {
		case tt.refused == "" && err != nil:
			t.Errorf("%s: %v %s", tt.args, err, stderr)
		case tt.refused != "" && (err == nil || !strings.Contains(stderr, tt.refused)):
			t.Errorf("%s: %v %q; want %q", tt.args, err, stderr, tt.refused)
		}
	}
}

// Impersonation headers that the API server does not know, or parses in its own way,
// are refused before the API server is asked.
func TestActAs_UnusualHeadersAreRefused(t *testing.T) {
	for _, lines := range [][]string{
		{"Impersonate-Group: system:masters"},
		{"Impersonate-User: bob@example.com", "Impersonate-User: system:admin"},
		{"Impersonate-User: bob@example.com", "Impersonate-Something-New: x"},
		{"Impersonate-User: bob@example.com", "Impersonate-Extra-Tailscale-Impersonate%2Egithub%2Eio%2Foriginal-User: dave@example.com"},
		{"Impersonate-User: bob@example.com", "Impersonate-Extra-%zz: x"},
		{"Impersonate-User: "},
	} {
		if resp := send(t, "alice", portAuthorize, get("/api/v1/namespaces", lines...)); resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%q: %s %s; want 400", lines, resp.Status, resp.body)
		}
	}
}

// Caddy drops headers with dots in their names unless it is configured not to.
func TestActAs_ExtraKeyWithDotsPassesWhenCaddyAllowsIt(t *testing.T) {
	giveErinRights(t)
	giveProxyRights(t)
	resp := send(t, "erin", portAuthorize, request("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", `{"apiVersion":"authentication.k8s.io/v1","kind":"SelfSubjectReview"}`,
		"Content-Type: application/json", "Impersonate-User: old-user", "Impersonate-Extra-example.com%2Frole: old-value"))
	if want := `"example.com/role":["old-value"]`; resp.StatusCode != http.StatusCreated || !strings.Contains(resp.body, want) {
		t.Errorf("%s %s; want it to contain %s", resp.Status, resp.body, want)
	}
	resp = send(t, "erin", portAuthorize, get("/version", "Impersonate-User: old-user", "Impersonate-Extra-example.com%2Frole: nobodys"))
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("a value that erin may not use: %s %s; want 403", resp.Status, resp.body)
	}
}

func TestActAs_OtherTransportIsRefused(t *testing.T) {
	plain.take()
	resp := send(t, "alice", portAuthorizeHTTP, get("/api", "Impersonate-User: bob@example.com"))
	wantNothing(t, plain.take(), resp.StatusCode, http.StatusServiceUnavailable)
	if !strings.Contains(resp.body, "transport kubernetes, which kubectl --as needs") {
		t.Errorf("the answer is %s; want it to name the transport that is needed", resp.body)
	}
	send(t, "alice", portAuthorizeHTTP, get("/api"))
	if requests := plain.take(); len(requests) != 1 || requests[0].Header.Get("Impersonate-User") != "alice@example.com" {
		t.Errorf("without --as, %d requests arrived; want one, as alice", len(requests))
	}
}

// Dave opens a watch as a viewer, and then loses the right to act as that user.
func TestActAs_RevokedRightEndsOpenStreams(t *testing.T) {
	const rights = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: e2e-act-as-viewer}
rules:
- {apiGroups: [""], verbs: [impersonate], resources: [users], resourceNames: [e2e-viewer]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: e2e-viewer}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view}
subjects:
- {apiGroup: rbac.authorization.k8s.io, kind: User, name: e2e-viewer}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: e2e-act-as-viewer-%[1]s}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: e2e-act-as-viewer}
subjects:
- {apiGroup: rbac.authorization.k8s.io, kind: User, name: %[1]s@example.com}
`
	useOlderVerb(t)
	const object = "watched-by-proxy"
	kubectl(t, "alice", "create", "configmap", object)
	t.Cleanup(func() { kubectl(t, "alice", "delete", "configmap", object, "--ignore-not-found") })
	watch := func(caller string) *session {
		if err := theLab.Cluster.Apply(t.Context(), fmt.Appendf(nil, rights, caller)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			kubectl(t, "alice", "delete", "clusterrolebinding", "e2e-act-as-viewer-"+caller, "--ignore-not-found")
		})
		kubeconfig := kubeconfigFor(t, caller, portAuthorize)
		eventually(t, caller+" may act as the viewer", func() error {
			if _, stderr, err := runKubectl(t, kubeconfig, nil, "get", "configmaps", "--as", "e2e-viewer"); err != nil {
				return fmt.Errorf("%w: %s", err, stderr)
			}
			return nil
		})
		s := startKubectl(t, kubeconfig, nil, "get", "configmaps", "--as", "e2e-viewer", "--watch", "--output-watch-events", "--no-headers", "--field-selector", "metadata.name="+object)
		s.want(t, "ADDED")
		return s
	}
	daves, carols := watch("dave"), watch("carol")
	kubectl(t, "alice", "delete", "clusterrolebinding", "e2e-act-as-viewer-dave")
	withdrawn := time.Now()
	select {
	case <-daves.ended:
		t.Logf("ended after %.1f s", time.Since(withdrawn).Seconds())
	case <-time.After(revokedWithin):
		t.Errorf("dave's watch is still open %v after he lost the right to act as the viewer", revokedWithin)
	}
	kubectl(t, "alice", "label", "configmap", object, "seen=yes")
	carols.want(t, "MODIFIED")
}

// Without the right to create SubjectAccessReviews, the proxy refuses kubectl --as,
// and the refusal names the missing right.
func TestActAs_ProxyWithoutReviewRightRefuses(t *testing.T) {
	useOlderVerb(t)
	admin := theLab.AdminKubeconfig()
	stdout, stderr, err := runKubectl(t, admin, nil, "get", "clusterrolebinding", "tailscale-impersonate-act-as", "-o", "json")
	if err != nil {
		t.Fatal(stderr)
	}
	var binding map[string]any
	if err := json.Unmarshal([]byte(stdout), &binding); err != nil {
		t.Fatal(err)
	}
	binding["metadata"] = map[string]any{"name": "tailscale-impersonate-act-as"}
	restored, err := json.Marshal(binding)
	if err != nil {
		t.Fatal(err)
	}
	kubeconfig := kubeconfigFor(t, "alice", portAuthorize)
	asBob := func() (string, error) {
		_, stderr, err := runKubectl(t, kubeconfig, nil, "auth", "whoami", "--as", "bob@example.com")
		return stderr, err
	}
	t.Cleanup(func() {
		if err := theLab.Cluster.Apply(context.Background(), restored); err != nil {
			t.Error(err)
		}
		eventually(t, "the proxy's right to ask is restored", func() error { _, err := asBob(); return err })
	})
	if _, stderr, err := runKubectl(t, admin, nil, "delete", "clusterrolebinding", "tailscale-impersonate-act-as"); err != nil {
		t.Fatal(stderr)
	}
	log := tail(t, theLab.Log("caddy"))
	eventually(t, "the proxy's right to ask is removed", func() error {
		stderr, err := asBob()
		if err == nil || !strings.Contains(stderr, "cannot find out whether alice@example.com may act as bob@example.com; the proxy's log says why") {
			return fmt.Errorf("%w %s", err, stderr)
		}
		return nil
	})
	if lines := strings.Join(log.lines(t), "\n"); !strings.Contains(lines, `cannot create resource \"subjectaccessreviews\"`) {
		t.Errorf("the log does not say which right is missing:\n%s", lines)
	}
}
