// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"cmp"
	"net/http"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
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
// ask. r must have its headers as the client sent them. It says nothing about whether the
// caller may.
func (a *Authenticator) target(r *http.Request) (*impersonate.Target, error) {
	if asked := caddyhttp.GetVar(r.Context(), askedKey); asked != nil && a.ActAs != StripActAs {
		return nil, apistatus.Forbidden(apistatus.Impersonation, "the request asked another tailscale_impersonate to act as another user, with the header %s, and is not sent as its caller", asked)
	}
	if a.ActAs == StripActAs {
		return nil, nil
	}
	if _, passed := impersonate.FromContext(r.Context()); passed {
		return nil, nil // the headers are another handler's
	}
	target, err := impersonate.ParseTarget(r.Header)
	if err != nil {
		return nil, apistatus.BadRequest(apistatus.Impersonation, "%v", err)
	}
	return target, nil
}

var choices = metrics.NewCounter("group_choices_total",
	"Requests that chose among the groups of their caller, by outcome.",
	"outcome", chosen, refused)

type choice string

const (
	chosen  choice = "chosen"  // the request is forwarded with the groups that it asks for
	refused choice = "refused" // it asks for a group that the caller is not granted
)

// claimed returns what r, a request of known, claims to be: known with some of its groups,
// or known and another user to act as.
func (a *Authenticator) claimed(r *http.Request, known *Caller, claims Claims) (*Caller, *impersonate.ActAsRequest, error) {
	id := known.Identity
	if err := checkFirst(r, id.User); err != nil {
		return nil, nil, err
	}
	target := claims.target
	if target != nil {
		if own, ok := a.Limits.Choose(id, target); ok {
			choices.With(chosen).Inc()
			return newCaller(known.Node, *known.Peer, *own, known.Asked), nil, nil
		}
	}
	switch {
	case claims.header == "" || a.ActAs == StripActAs:
		return known, nil, claims.err
	case a.ActAs != AuthorizeActAs:
		if target != nil && target.User == id.User && id.Missing(target) != "" {
			choices.With(refused).Inc()
			return nil, nil, apistatus.Forbidden(apistatus.Impersonation, "%s asks for the group %q, which it is not granted; it may ask for: %s", id.User, clip.String(id.Missing(target)), groupNames(id))
		}
		return nil, nil, apistatus.Forbidden(apistatus.Impersonation, "%s may not act as another user: the request asks for it with the header %s, as kubectl --as does", id.User, claims.header)
	case claims.err != nil:
		return nil, nil, claims.err
	}
	if err := a.Limits.CheckTarget(target); err != nil {
		return nil, nil, apistatus.Forbidden(apistatus.Impersonation, "no request is sent as %s: %v", clip.String(target.User), err)
	}
	return known, &impersonate.ActAsRequest{Target: target, MaxAge: a.CacheTTL}, nil
}

// maxNames is how many groups a refusal names.
const maxNames = 20

// groupNames lists the groups that a caller may ask for.
func groupNames(id *impersonate.Identity) string {
	return cmp.Or(strings.Join(clip.Strings(slices.Concat(id.Groups, id.HeldBack), maxNames), ", "), "none")
}

// checkFirst refuses r, a request of user, if it has passed another handler.
func checkFirst(r *http.Request, user string) error {
	if _, passed := impersonate.FromContext(r.Context()); passed {
		// This handler would undo the limits, prefixes and act-as check of the other.
		return apistatus.Forbidden(apistatus.Impersonation, "the request of %s passes tailscale_impersonate twice, and the second would undo what the first limits; the proxy's config has to leave one of them out", user)
	}
	return nil
}

// MustRecord reports whether request, a request's identity, must be recorded if its
// caller now has the identity now.
func (a *Authenticator) MustRecord(request, now *impersonate.Identity) bool {
	granted := now.Recording.Enforce && !now.Recording.ByGroup
	return granted || a.Limits.RecordsAny(request.Groups) || a.recordsTarget(request.ActAs)
}

// recordsTarget reports whether record_groups names a group of the user to act as.
func (a *Authenticator) recordsTarget(actAs *impersonate.ActAsRequest) bool {
	return actAs != nil && a.Limits.RecordsAny(slices.Concat(actAs.Target.Groups, actAs.Target.OwnGroups()))
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
