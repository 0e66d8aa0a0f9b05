// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"net/http"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
)

// ActAs says what becomes of a request to act as another user (kubectl --as).
type ActAs string

// What can become of it.
const (
	RejectActAs    ActAs = "reject"    // it is refused, as with the zero value
	StripActAs     ActAs = "strip"     // it is forwarded as the caller
	AuthorizeActAs ActAs = "authorize" // it is forwarded as that user if the API server lets the caller impersonate it
)

// askedKey is the name of a request variable: the impersonation header that the client
// sent. Variables stay with a request that handle_errors or intercept handle again,
// where the header is gone.
const askedKey = "tailscale_impersonate.asked"

// Claims is what a client said about itself in headers that [Authenticator.Strip] has
// removed.
type Claims struct {
	// header is the name of an impersonation header, empty if there was none.
	header string
	// target is the user to act as, nil if the client asks for none or must not ask.
	target *impersonate.Target
	// err is why the request cannot be forwarded as it asks.
	err error
}

// Strip removes from r's headers everything that a client may not say about itself,
// and returns what it said.
func (a *Authenticator) Strip(r *http.Request) Claims {
	var claims Claims
	claims.target, claims.err = a.target(r)
	claims.header = clip.String(impersonate.StripClient(r.Header))
	if claims.header != "" && a.ActAs != StripActAs {
		caddyhttp.SetVar(r.Context(), askedKey, claims.header)
	}
	return claims
}

// target returns the user that r asks to act as, nil if it asks for none or must not
// ask. r must have its headers as the client sent them.
func (a *Authenticator) target(r *http.Request) (*impersonate.Target, error) {
	if asked := caddyhttp.GetVar(r.Context(), askedKey); asked != nil && a.ActAs != StripActAs {
		return nil, apistatus.Forbidden(apistatus.Impersonation, "the request asked another tailscale_impersonate to act as another user, with the header %s, and is not sent as its caller", asked)
	}
	if a.ActAs != AuthorizeActAs {
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
	if err := a.Limits.CheckTarget(target); err != nil {
		return nil, apistatus.Forbidden(apistatus.Impersonation, "no request is sent as %s: %v", clip.String(target.User), err)
	}
	return target, nil
}

// checkClaims refuses r, a request of user, if it may not make claims.
func (a *Authenticator) checkClaims(r *http.Request, claims Claims, user string) error {
	if _, passed := impersonate.FromContext(r.Context()); passed {
		// This handler would undo the limits, prefixes and act-as check of the other.
		return apistatus.Forbidden(apistatus.Impersonation, "the request of %s passes tailscale_impersonate twice, and the second would undo what the first limits; the proxy's config has to leave one of them out", user)
	}
	if claims.header != "" && a.ActAs != StripActAs && a.ActAs != AuthorizeActAs {
		return apistatus.Forbidden(apistatus.Impersonation, "%s may not act as another user: the request asks for it with the header %s, as kubectl --as does", user, claims.header)
	}
	return claims.err
}

// CheckTarget returns an error, which is forbidden, if requests of any caller as
// target are refused.
func (a *Authenticator) CheckTarget(target *impersonate.Target) error {
	if a.ActAs != AuthorizeActAs {
		return apistatus.Forbidden(apistatus.Impersonation, "callers may no longer act as another user")
	}
	if err := a.Limits.CheckTarget(target); err != nil {
		return apistatus.Forbidden(apistatus.Impersonation, "requests as %s are no longer sent: %v", clip.String(target.User), err)
	}
	return nil
}
