// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"net/http"

	"github.com/caddyserver/caddy/v2"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

// identityFor returns the identity that r is sent on with: that of the decision,
// with an ID for r alone if the API server's audit log is to have one.
func (h *Handler) identityFor(r *http.Request, decided *decision) *impersonate.Identity {
	if !h.Audit {
		return &decided.identity
	}
	own := decided.identity
	own.RequestID = requestID(r)
	return &own
}

// requestID returns Caddy's ID of r. Asked for, it is in the access log as well,
// where the field is called uuid.
func requestID(r *http.Request) string {
	repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return ""
	}
	id, _ := repl.GetString("http.request.uuid")
	return id
}
