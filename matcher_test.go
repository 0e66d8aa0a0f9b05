// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/matcher"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

// A matcher returns an error that the handler turns into an answer.
func TestMatcher_AmbiguousPathIsExplained(t *testing.T) {
	core, logs := observer.New(zap.WarnLevel)
	h := newLoggingHandler(t, caddyfile.Config{}, zap.New(core), proxytest.AliceNode())
	rec := httptest.NewRecorder()
	err := h.ServeHTTP(rec, proxytest.NewRequest("GET", "https://k8s/api//v1"), caddyhttp.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) error {
		_, err := matcher.Matcher{Verb: []string{"get"}}.MatchWithError(r)
		return err
	}))
	if err != nil {
		t.Fatal(err)
	}
	proxytest.CheckRefused(t, rec.Result(), proxytest.BadRequest, "more than one way")
	if entries := logs.FilterMessage("request refused").All(); len(entries) != 1 {
		t.Errorf("logged %v; want that the request was refused", logs.All())
	}
}

// A request that the config rewrites after a matcher has decided about it is refused.
func TestMatcher_RewrittenRequestIsRefused(t *testing.T) {
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
			up := proxytest.NewAPIServer(t)
			s := proxytest.StartSite(t, up, matcher+tt.body+"\n}", proxytest.AliceNode())
			resp := s.HTTP1(t, proxytest.AliceAddr, tt.request+" HTTP/1.1\r\nHost: k8s\r\n\r\n")
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != tt.status || !strings.Contains(string(body), tt.answer) {
				t.Errorf("got %s %s; want %d and %q", resp.Status, body, tt.status, tt.answer)
			}
			if tt.status == http.StatusOK {
				up.CheckOne(t, proxytest.AliceAsProxy)
			} else {
				up.CheckNone(t)
			}
		})
	}
}

// The expression of docs/matcher.md. A group that contains a comma is one group.
func TestMatcher_ExpressionDecidesByGroup(t *testing.T) {
	const prod, dev = "/api/v1/namespaces/prod-a/pods/p", "/api/v1/namespaces/dev/pods/p"
	for _, tt := range []struct {
		groups, request, lines string
		status                 int
	}{
		{`"operators"`, "DELETE " + prod, "", 200},
		{`"readers","operators"`, "DELETE " + prod, "", 200},
		{`"readers"`, "DELETE " + prod, "", 403},
		{``, "DELETE " + prod, "", 403},
		{`"readers,operators"`, "DELETE " + prod, "", 403},
		{`"readers, operators"`, "DELETE " + prod, "", 403},
		{`"operators,readers"`, "DELETE " + prod, "", 403},
		{`"Operators"`, "DELETE " + prod, "", 403},
		{`"readers"`, "DELETE " + prod, "Impersonate_Group: operators\r\nImpersonate.Group: operators\r\n", 403},
		{`"readers"`, "DELETE " + dev, "", 200},
		{`"readers"`, "GET " + prod, "", 200},
	} {
		up := proxytest.NewAPIServer(t)
		s := proxytest.StartSite(t, up, `
			tailscale_impersonate {
				client_impersonation strip
			}
			@refused expression <<CEL
				kubernetes({"verb": ["delete", "deletecollection"], "namespace": ["prod-*", ""]})
				&& !header({"Impersonate-Group": "operators"})
				CEL
			respond @refused 403
			reverse_proxy $UPSTREAM {
				$KUBERNETES
			}`, proxytest.NewNode(proxytest.WhoIs(`{"impersonate":{"groups":[`+tt.groups+`]}}`), nil))
		if resp := s.HTTP1(t, proxytest.AliceAddr, tt.request+" HTTP/1.1\r\nHost: k8s\r\n"+tt.lines+"\r\n"); resp.StatusCode != tt.status {
			t.Errorf("%s by a member of %s: got %s; want %d", tt.request, tt.groups, resp.Status, tt.status)
		}
		if arrived := len(up.Take()) > 0; arrived != (tt.status == http.StatusOK) {
			t.Errorf("%s by a member of %s: arrived: %t", tt.request, tt.groups, arrived)
		}
	}
}
