// SPDX-License-Identifier: Apache-2.0

// Package pin ensures that the request sent to the API server is the one that was
// decided about.
//
// Between a matcher that lets a request through and the transport that sends it, a
// config can rewrite it: handle_path, uri, method, reverse_proxy's own rewrite. The
// matcher's decision would then be about another request. So whoever decides by what a
// request asks for records a condition here, and transport kubernetes sends the request
// only if it meets every condition.
package pin

import (
	"net/http"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade"
)

// varKey is the key of the record among a request's variables. These stay with the
// request whatever handlers do to its URL.
const varKey = "tailscale_impersonate.decided"

// record is what was decided about a request. Only the goroutine that serves the
// request uses it.
type record struct {
	conditions []func(out *http.Request) error
	parsed     []parsed // what On has returned
}

// parsed is what a request asks for, and how it was spelled.
type parsed struct {
	spelling spelling
	info     requestinfo.Info
}

// spelling is all that [requestinfo.Parse] looks at.
type spelling struct {
	method, opaque, path, rawPath, query string
	upgrade                              bool
}

func spellingOf(r *http.Request) spelling {
	return spelling{r.Method, r.URL.Opaque, r.URL.Path, r.URL.RawPath, r.URL.RawQuery, upgrade.Requested(r.Header)}
}

// info returns what r asks for. It parses each spelling that On has seen only once.
func (rec *record) info(r *http.Request) requestinfo.Info {
	s := spellingOf(r)
	for _, p := range rec.parsed {
		if p.spelling == s {
			return p.info
		}
	}
	return requestinfo.Parse(r)
}

// Require makes [Check] return the error that holds returns for the request that is
// about to be sent in place of r, if any. It returns false if it cannot record holds:
// then refuse r.
func Require(r *http.Request, holds func(out *http.Request) error) bool {
	rec := recordOf(r)
	if rec == nil {
		return false
	}
	rec.conditions = append(rec.conditions, holds)
	return true
}

// On returns what r asks for, and requires that the request that is sent asks for the
// same. The result is ambiguous if that cannot be recorded.
func On(r *http.Request) requestinfo.Info {
	rec := recordOf(r)
	if rec == nil {
		info := requestinfo.Parse(r)
		info.Ambiguous = true
		return info
	}
	info := rec.info(r)
	for _, p := range rec.parsed {
		if p.info == info {
			return info
		}
	}
	rec.parsed = append(rec.parsed, parsed{spellingOf(r), info})
	decided := info // so that info itself stays off the heap
	Require(r, func(out *http.Request) error {
		sent := rec.info(out)
		if sent != decided {
			return apistatus.Forbidden(apistatus.Rewritten, "a matcher has decided about %v, and what would be sent is %v: the config rewrites requests behind the matcher", decided, sent)
		}
		return nil
	})
	return info
}

// Recorded requires that r is sent with the query that it has, and, if body is set,
// with a body: an event tells a recorder both. Call [On] first, and refuse r if that
// could not record its condition.
func Recorded(r *http.Request, body bool) {
	query := r.URL.RawQuery
	Require(r, func(out *http.Request) error {
		if query != out.URL.RawQuery || body && (out.Body == nil || out.Body == http.NoBody) {
			return apistatus.Forbidden(apistatus.Rewritten, "a recorder was told of another query or body than what would be sent: the config rewrites requests behind tailscale_impersonate")
		}
		return nil
	})
}

// Refuse returns the refusal of r, which is ambiguous while something has to be decided
// about it. Check refuses r as well, in case a config ignores the refusal.
func Refuse(r *http.Request) error {
	Require(r, refuseAmbiguous)
	return refuseAmbiguous(r)
}

func refuseAmbiguous(r *http.Request) error {
	return apistatus.BadRequest(apistatus.AmbiguousPath, "the path %q can be understood in more than one way: it has empty segments, dot segments or encoded slashes, or ends early", clip.String(r.URL.EscapedPath()))
}

// recordOf returns the record of r, and makes one if there is none. It returns nil if r
// has no variables or a config has set this one.
func recordOf(r *http.Request) *record {
	if _, ok := r.Context().Value(caddyhttp.VarsCtxKey).(map[string]any); !ok {
		return nil
	}
	value := caddyhttp.GetVar(r.Context(), varKey)
	if value == nil {
		value = new(record)
		caddyhttp.SetVar(r.Context(), varKey, value)
	}
	rec, _ := value.(*record)
	return rec
}

// Check returns why out, a request that is about to be sent to the API server, must not
// be sent: it does not meet every condition that was required of it. A request without
// conditions may be sent.
func Check(out *http.Request) error {
	value := caddyhttp.GetVar(out.Context(), varKey)
	if value == nil {
		return nil
	}
	rec, ok := value.(*record)
	if !ok {
		return apistatus.Forbidden(apistatus.Rewritten, "the variable %s is not for a config to set", varKey)
	}
	for _, holds := range rec.conditions {
		if err := holds(out); err != nil {
			return err
		}
	}
	return nil
}
