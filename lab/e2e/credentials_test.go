// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"net/http"
	"strings"
	"testing"
	"time"
)

// The site's kubeconfig is the administrator's, with a client certificate in
// system:masters. Callers must not profit from it.
func TestClientCredentials_DecideTheUser(t *testing.T) {
	const review = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
	const body = `{"apiVersion":"authentication.k8s.io/v1","kind":"SelfSubjectReview"}`
	secrets := get("/api/v1/namespaces/default/secrets")

	resp := send(t, "alice", portNoAuth, secrets)
	anonymous := resp.StatusCode == http.StatusForbidden && strings.Contains(resp.body, "system:anonymous")
	if resp.StatusCode != http.StatusUnauthorized && !anonymous {
		t.Errorf("without credentials: %s %s; want 401, or 403 for system:anonymous", resp.Status, resp.body)
	}
	if resp := send(t, "alice", portNoAuth, get("/api/v1/namespaces/default/secrets", "X-Remote-User: system:admin", "X-Remote-Group: system:masters")); resp.StatusCode == http.StatusOK {
		t.Errorf("with X-Remote-User: %s; want a refusal", resp.Status)
	}
	token, err := theLab.Cluster.ServiceAccountToken(t.Context(), "tailscale-impersonate", "proxy", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	resp = send(t, "dave", portNoAuth, request("POST", review, body, "Content-Type: application/json", "Authorization: Bearer "+token))
	if want := `"username":"system:serviceaccount:tailscale-impersonate:proxy"`; resp.StatusCode != http.StatusCreated || !strings.Contains(resp.body, want) {
		t.Errorf("with a token: %s %s; want %s", resp.Status, resp.body, want)
	}
	// The API server alone decides about the caller's own impersonation.
	resp = send(t, "dave", portNoAuth, request("POST", review, body, "Content-Type: application/json", "Authorization: Bearer "+token, "Impersonate-User: erin@example.com"))
	if want := `"username":"erin@example.com"`; resp.StatusCode != http.StatusCreated || !strings.Contains(resp.body, want) {
		t.Errorf("with a token and Impersonate-User: %s %s; want %s", resp.Status, resp.body, want)
	}
}
