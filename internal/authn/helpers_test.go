// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"net/http"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// server is a handler that refuses requests, or passes them on with the identity of
// their caller.
type server struct{ *Authenticator }

// newServer returns a server that has started with these nodes.
func newServer(t testing.TB, options Options, nodes ...*tailnet.Node) server {
	t.Helper()
	if options.Capabilities == nil {
		options.Capabilities = impersonate.Capabilities
	}
	options.Logger = zap.NewNop()
	a, err := New(options)
	if err != nil {
		t.Fatal(err)
	}
	a.Start(nodes)
	return server{a}
}

func (s server) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	caller, err := s.Authenticate(r, s.Strip(r))
	if err != nil {
		return apistatus.Write(w, r, err)
	}
	caller.SetPlaceholders(r)
	caller.Identity.SetHeaders(r.Header)
	defer caller.Identity.RemoveHeaders(r.Header)
	return next.ServeHTTP(w, r)
}
