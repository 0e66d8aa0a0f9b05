// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"net/http"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

// Placeholders that another authentication handler has set are replaced: the access log
// must name the user that the API server is told of.
func TestPlaceholders_ReplaceOtherAuthentication(t *testing.T) {
	h := newServer(t, Options{Capabilities: []tailcfg.PeerCapability{"example.com/cap/none"}}, proxytest.NewChangingNode().Node)
	r := proxytest.NewConn()()
	repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	repl.Set("http.auth.user.id", "another user")
	if err := h.ServeHTTP(proxytest.NoAnswer{}, r, proxytest.NextFunc(func(*http.Request) {})); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"http.auth.user.id": "alice@example.com", "http.tailscale_impersonate.groups": "", "http.tailscale_impersonate.source": "none"} {
		if got, _ := repl.GetString(name); got != want {
			t.Errorf("{%s} is %q; want %q", name, got, want)
		}
	}
}
