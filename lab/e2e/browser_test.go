// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
)

// Requests that a web page makes on alice's device carry alice's identity, as with a
// cookie. Each attack on the real API server comes with a control: the same request
// in an allowed form, which has to succeed.

func TestBrowser_CrossSitePostChangesNothing(t *testing.T) {
	const path = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"
	binding := func(name string) string {
		body, err := json.Marshal(map[string]any{
			"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
			"metadata": map[string]any{"name": name},
			"roleRef":  map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
			"subjects": []any{map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "mallory"}},
		})
		if err != nil {
			t.Fatal(err)
		}
		return string(body)
	}
	t.Cleanup(func() { kubectl(t, "alice", "delete", "clusterrolebinding", "--ignore-not-found", "attack", "control") })

	if resp := send(t, "alice", "80", request("POST", path, binding("control"))); resp.StatusCode != http.StatusCreated {
		t.Fatalf("the control, without a web page: %s %s; want 201", resp.Status, resp.body)
	}
	for _, page := range [][]string{
		{"Origin: https://evil.example.com"},
		{"Origin: null"},
		{"Sec-Fetch-Site: cross-site"},
		{"Sec-Fetch-Site: same-site"},
		{"Origin: https://evil.example.com", "Sec-Fetch-Site: same-origin"},
	} {
		resp := send(t, "alice", "80", request("POST", path, binding("attack"), page...))
		if resp.StatusCode != http.StatusForbidden || !strings.Contains(resp.body, "web page") {
			t.Errorf("%q: %s %s; want 403 and the reason", page, resp.Status, resp.body)
		}
	}
	if got := kubectl(t, "alice", "get", "clusterrolebinding", "attack", "--ignore-not-found"); got != "" {
		t.Errorf("the page created %s", got)
	}
}

func TestBrowser_CrossSiteWebSocketReadsNothing(t *testing.T) {
	watch := func(headers ...string) string { return handshake(secretsPath+"?watch=true", headers...) }
	// The API server accepts a WebSocket from a page of any origin.
	if status := statusOf(t, "alice", portOrigins, watch("Origin: https://dashboard.example.com")); status != http.StatusSwitchingProtocols {
		t.Fatalf("the control, with an allowed origin: %d; want 101", status)
	}
	if status := statusOf(t, "alice", "80", watch("Origin: https://evil.example.com")); status != http.StatusForbidden {
		t.Errorf("a web page's WebSocket is answered with %d; want 403", status)
	}
}

func TestBrowser_DNSRebindingIsRefused(t *testing.T) {
	const path = "/api/v1/namespaces/default/secrets"
	if resp := send(t, "alice", "80", get(path)); resp.StatusCode != http.StatusOK {
		t.Fatalf("the control, under the node's own name: %s %s; want 200", resp.Status, resp.body)
	}
	for _, host := range []string{"evil.example.com", "k8s.evil.example.com", "100.64.0.99", "localhost", "evil.example.com:80"} {
		resp := send(t, "alice", "80", get(path, "Host: "+host))
		if resp.StatusCode != http.StatusForbidden || !strings.Contains(resp.body, "allow_hosts") {
			t.Errorf("host %s: %s %s; want 403 and advice", host, resp.Status, resp.body)
		}
	}
}

func TestBrowser_ConfiguredOriginsAndHostsAreAllowed(t *testing.T) {
	for _, headers := range [][]string{
		{"Origin: https://dashboard.example.com"},
		{"Origin: https://dashboard.example.com", "Sec-Fetch-Site: cross-site"},
		{"Host: k8s.internal.example"},
		{"Sec-Fetch-Site: none"},
	} {
		if resp := send(t, "bob", portOrigins, get("/api/v1/namespaces/default/pods", headers...)); resp.StatusCode != http.StatusOK {
			t.Errorf("%q: %s %s; want 200", headers, resp.Status, resp.body)
		}
	}
	if resp := send(t, "bob", portOrigins, get("/api/v1/namespaces/default/pods", "Origin: http://dashboard.example.com")); resp.StatusCode != http.StatusForbidden {
		t.Errorf("another scheme: %s; want 403", resp.Status)
	}
}
