// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"net/http"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
)

// askedKey is the name, among a request's variables, of the impersonation header that
// its client has sent. They travel with it into the routes that Caddy starts over with
// after an answer or an error that a config does not want, where the header is gone.
const askedKey = "tailscale_impersonate.asked"

// stripClient removes from r's headers what its client may not say, and returns the
// name of an impersonation header that was among them, empty if none was.
func (h *Handler) stripClient(r *http.Request) (asked string) {
	asked = impersonate.StripClient(r.Header)
	if asked != "" && h.ClientImpersonation != caddyfile.Strip {
		caddyhttp.SetVar(r.Context(), askedKey, asked)
	}
	return asked
}

// target returns whom r asks to act as, nil if it asks for nobody, or if that is not
// what is to be done about it. It looks at r's headers as the client sent them.
func (h *Handler) target(r *http.Request) (*impersonate.Target, *apierrors.StatusError) {
	if asked := caddyhttp.GetVar(r.Context(), askedKey); asked != nil && h.ClientImpersonation != caddyfile.Strip {
		return nil, apistatus.Forbidden(apistatus.Impersonation, "the request asked another tailscale_impersonate to act as somebody else, with the header %s, and is not sent as its caller", asked)
	}
	if h.ClientImpersonation != caddyfile.Authorize {
		return nil, nil
	}
	if _, passed := impersonate.FromContext(r.Context()); passed {
		return nil, nil // the headers are another handler's
	}
	target, err := impersonate.ParseTarget(r.Header)
	if err != nil {
		return nil, apistatus.BadRequest(apistatus.Impersonation, "%v", err)
	}
	if target == nil {
		return nil, nil
	}
	if err := h.CheckTarget(target); err != nil {
		return nil, apistatus.Forbidden(apistatus.Impersonation, "no request is sent as %s: %v", target.User, err)
	}
	return target, nil
}

// mayBe returns an error, which is forbidden, if this handler lets nobody act as
// target.
func (h *Handler) mayBe(target *impersonate.Target) error {
	if h.ClientImpersonation != caddyfile.Authorize {
		return apistatus.Forbidden(apistatus.Impersonation, "callers may no longer act as somebody else")
	}
	if err := h.CheckTarget(target); err != nil {
		return apistatus.Forbidden(apistatus.Impersonation, "requests as %s are no longer sent: %v", target.User, err)
	}
	return nil
}

// checkAsked refuses r, of the caller user, if it may not hold the impersonation
// header asked. Empty, it holds none.
func (h *Handler) checkAsked(r *http.Request, asked, user string) *apierrors.StatusError {
	_, passed := impersonate.FromContext(r.Context())
	switch {
	case passed:
		// This handler would undo what that one denies, prefixes or was asked for.
		return apistatus.Forbidden(apistatus.Impersonation, "the request of %s passes tailscale_impersonate twice, and the second would undo what the first limits; the proxy's config has to leave one of them out", user)
	case asked == "":
		return nil
	case h.ClientImpersonation == caddyfile.Strip, h.ClientImpersonation == caddyfile.Authorize:
		return nil
	}
	return apistatus.Forbidden(apistatus.Impersonation, "%s may not act as somebody else: the request asks for it with the header %s, as kubectl --as does", user, asked)
}
