// SPDX-License-Identifier: Apache-2.0

package app

import (
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterModule(new(MatchUp))
}

// MatchUp is a request matcher for the readiness of this Caddy. It matches any request
// while all tailnet nodes that the config's `tailscale_impersonate` handlers use are
// connected, until Caddy begins to exit. Their state is at most a few seconds old.
type MatchUp struct{ app *App }

// CaddyModule returns the Caddy module information.
func (*MatchUp) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.matchers.tailnet_up",
		New: func() caddy.Module { return new(MatchUp) },
	}
}

// UnmarshalCaddyfile sets m from Caddyfile tokens. Syntax:
//
//	tailnet_up
func (*MatchUp) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	for d.Next() {
		if d.NextArg() || d.NextBlock(0) {
			return d.Errf("unexpected %q after tailnet_up", d.Val())
		}
	}
	return nil
}

// Provision sets up the matcher.
func (m *MatchUp) Provision(ctx caddy.Context) (err error) {
	m.app, err = Of(ctx)
	return err
}

// MatchWithError reports whether all nodes are connected and stay so.
func (m *MatchUp) MatchWithError(*http.Request) (bool, error) {
	return m.app.nodes.up() && !caddy.Exiting(), nil
}

// Interface guards
var (
	_ caddy.Module                      = (*MatchUp)(nil)
	_ caddy.Provisioner                 = (*MatchUp)(nil)
	_ caddyfile.Unmarshaler             = (*MatchUp)(nil)
	_ caddyhttp.RequestMatcherWithError = (*MatchUp)(nil)
)
