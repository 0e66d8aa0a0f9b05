// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"io"
	"net/http"
	"strings"
	"testing"

	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/rewrite"
)

// A whole site, with what a config can do to a request behind a matcher's back.
func TestRequestsAreSentAsTheMatcherSawThem(t *testing.T) {
	const matcher = `route {
		tailscale_impersonate
		@refused not kubernetes {
			verb get list
			class ordinary
		}
		respond @refused "no" 403
		`
	for _, tt := range []struct {
		name, body, request string
		status              int
		answer              string
	}{
		{"nothing", "reverse_proxy $UPSTREAM {\n$KUBERNETES\n}", "GET /api/v1/pods", 200, ""},
		{"refused", "reverse_proxy $UPSTREAM {\n$KUBERNETES\n}", "DELETE /api/v1/pods", 403, "no"},
		{"refused, in another spelling", "reverse_proxy $UPSTREAM {\n$KUBERNETES\n}", "GET /api/v1/namespaces/a/pods/p/%65xec", 403, "no"},
		{"ambiguous", "reverse_proxy $UPSTREAM {\n$KUBERNETES\n}", "GET /api/v1//pods", 400, "more than one way"},
		{"reverse_proxy's method", "reverse_proxy $UPSTREAM {\nmethod DELETE\n$KUBERNETES\n}", "GET /api/v1/pods", 403, `would be sent is deletecollection`},
		{"reverse_proxy's rewrite", "reverse_proxy $UPSTREAM {\nrewrite /api/v1/secrets\n$KUBERNETES\n}", "GET /api/v1/pods", 403, `would be sent is list \"/api/v1/secrets\"`},
		{"a prefix that is stripped", "uri strip_prefix /a\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", "GET /a/api/v1/pods", 403, `would be sent is list \"/api/v1/pods\"`},
		{"a variable that is overwritten", "vars tailscale_impersonate.decided x\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", "GET /api/v1/pods", 403, "not for a config to set"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			up := newUpstream(t)
			s := startSite(t, up, false, "", matcher+tt.body+"\n}", aliceNode())
			resp := s.http1(t, aliceAddr, tt.request+" HTTP/1.1\r\nHost: k8s\r\n\r\n")
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != tt.status || !strings.Contains(string(body), tt.answer) {
				t.Errorf("got %s %s; want %d and %q", resp.Status, body, tt.status, tt.answer)
			}
			if seen := up.take(); (len(seen) > 0) != (tt.status == http.StatusOK) {
				t.Errorf("the API server saw %d requests", len(seen))
			}
		})
	}
}

// The expression of docs/matcher.md.
func TestAnExpressionDecidesByGroup(t *testing.T) {
	for _, tt := range []struct {
		group, request string
		status         int
	}{
		{"tailnet-readers", "DELETE /api/v1/namespaces/prod-a/pods/p", 200},
		{"operators", "DELETE /api/v1/namespaces/prod-a/pods/p", 403},
		{"operators", "DELETE /api/v1/namespaces/dev/pods/p", 200},
		{"operators", "GET /api/v1/namespaces/prod-a/pods/p", 200},
	} {
		up := newUpstream(t)
		s := startSite(t, up, false, "", `
			tailscale_impersonate
			@refused expression <<CEL
				kubernetes({"verb": ["delete", "deletecollection"], "namespace": ["prod-*", ""]})
				&& !{http.tailscale_impersonate.groups}.split(",").exists(g, g == "`+tt.group+`")
				CEL
			respond @refused 403
			reverse_proxy $UPSTREAM {
				$KUBERNETES
			}`, aliceNode())
		if resp := s.http1(t, aliceAddr, tt.request+" HTTP/1.1\r\nHost: k8s\r\n\r\n"); resp.StatusCode != tt.status {
			t.Errorf("%s for those in %s: got %s; want %d", tt.request, tt.group, resp.Status, tt.status)
		}
	}
}
