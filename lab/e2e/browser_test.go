// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
)

// What a web page on alice's device sends carries alice's identity like a cookie.
// Each attack is made against the real API server, next to the same request from
// where it is allowed, which has to work for the attack to have been one.

func TestACrossSitePostChangesNothing(t *testing.T) {
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
		t.Fatalf("without a page in between: %s %s; want 201, or the attack shows nothing", resp.Status, resp.body)
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

func TestACrossSiteWebSocketReadsNothing(t *testing.T) {
	watch := func(headers ...string) string {
		return get("/api/v1/namespaces/default/secrets?watch=true", append(headers,
			"Connection: Upgrade", "Upgrade: websocket",
			"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13")...)
	}
	// The API server takes a WebSocket from any page, as long as it is from one.
	if status := statusOf(t, "alice", portOrigins, watch("Origin: https://dashboard.example.com")); status != http.StatusSwitchingProtocols {
		t.Fatalf("where the config allows the page: %d; want 101, or the attack shows nothing", status)
	}
	if status := statusOf(t, "alice", "80", watch("Origin: https://evil.example.com")); status != http.StatusForbidden {
		t.Errorf("a web page's WebSocket is answered with %d; want 403", status)
	}
}

func TestDNSRebindingIsRefused(t *testing.T) {
	const path = "/api/v1/namespaces/default/secrets"
	if resp := send(t, "alice", "80", get(path)); resp.StatusCode != http.StatusOK {
		t.Fatalf("under the node's own name: %s %s; want 200, or the attack shows nothing", resp.Status, resp.body)
	}
	for _, host := range []string{"evil.example.com", "k8s.evil.example.com", "100.64.0.99", "localhost", "evil.example.com:80"} {
		resp := send(t, "alice", "80", get(path, "Host: "+host, "Sec-Fetch-Site: same-origin"))
		if resp.StatusCode != http.StatusForbidden || !strings.Contains(resp.body, "allow_hosts") {
			t.Errorf("host %s: %s %s; want 403 and what to change", host, resp.Status, resp.body)
		}
	}
}

func TestOriginsAndHostsThatTheConfigAllows(t *testing.T) {
	for _, headers := range [][]string{
		{"Origin: https://dashboard.example.com"},
		{"Origin: https://dashboard.example.com", "Sec-Fetch-Site: cross-site"},
		{"Host: k8s.internal.example"},
		{"Sec-Fetch-Site: none"},
		{"Sec-Fetch-Site: same-origin"},
	} {
		if resp := send(t, "bob", portOrigins, get("/api/v1/namespaces/default/pods", headers...)); resp.StatusCode != http.StatusOK {
			t.Errorf("%q: %s %s; want 200", headers, resp.Status, resp.body)
		}
	}
	if resp := send(t, "bob", portOrigins, get("/api/v1/namespaces/default/pods", "Origin: http://dashboard.example.com")); resp.StatusCode != http.StatusForbidden {
		t.Errorf("another scheme: %s; want 403", resp.Status)
	}
}
