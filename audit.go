// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"net/http"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
)

// identityFor returns the identity that r is sent on with: that of the decision,
// with what is r's alone, if there is anything: its ID in the API server's audit
// log, and whom it wants to act as.
func (h *Handler) identityFor(r *http.Request, decided *decision, target *impersonate.Target) *impersonate.Identity {
	if !h.Audit && target == nil {
		return &decided.identity
	}
	own := decided.identity
	if h.Audit {
		own.RequestID = apistatus.RequestID(r)
	}
	if target != nil {
		own.ActAs = &impersonate.ActAsRequest{Target: target, MaxAge: h.TTL()}
	}
	return &own
}
