// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"testing"

	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/encode"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/encode/gzip"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/encode/zstd"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/intercept"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/rewrite"
	_ "github.com/caddyserver/caddy/v2/modules/logging"
	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/quota"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/revocation"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// newHandler returns a handler that is ready to serve, without a Caddy around it.
func newHandler(t testing.TB, cfg caddyfile.Config, nodes ...*tailnet.Node) *Handler {
	t.Helper()
	return newLoggingHandler(t, cfg, zap.NewNop(), nodes...)
}

// newLoggingHandler is newHandler with a logger.
func newLoggingHandler(t testing.TB, cfg caddyfile.Config, logger *zap.Logger, nodes ...*tailnet.Node) *Handler {
	t.Helper()
	h := newUnstartedHandler(t, cfg, newGeneration(), logger)
	h.UseNodes(nodes)
	return h
}

// newUnstartedHandler returns a handler of a config that has not started yet.
func newUnstartedHandler(t testing.TB, cfg caddyfile.Config, generation *revocation.Generation, logger *zap.Logger) *Handler {
	t.Helper()
	h := &Handler{Config: cfg, memory: new(quota.Budget)}
	if err := h.Validate(); err != nil {
		t.Fatal(err)
	}
	if err := h.setUp(generation, logger, []string{t.Name()}); err != nil {
		t.Fatal(err)
	}
	return h
}

// newGeneration returns what tracks the requests of a config that is the only one.
func newGeneration() *revocation.Generation { return newRegistry().NewGeneration() }

func newRegistry() *revocation.Registry {
	return &revocation.Registry{Hold: func() {}, Release: func() {}}
}

// UseNodes starts h with these nodes.
func (h *Handler) UseNodes(nodes tailnet.Nodes) { h.auth.Start(nodes) }
