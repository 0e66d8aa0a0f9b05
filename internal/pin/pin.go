// SPDX-License-Identifier: Apache-2.0

// Package decided ties the request that is sent to the API server to the one that
// was decided about.
//
// Between a matcher that lets a request through and the transport that sends it,
// a config can rewrite it: handle_path, uri, method, reverse_proxy's own rewrite.
// What the matcher said would then be about another request. So whoever decides by
// what a request asks for gets that from here, where it is written down, and
// transport kubernetes reads the request again before it leaves: if that asks for
// anything else, it is not sent.
package pin

import (
	"net/http"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
)

// varKey is the name among a request's variables, which travel with it whatever
// handlers make of its URL.
const varKey = "tailscale_impersonate.decided"

// record is what was decided about a request. Its server's goroutine alone uses
// it.
type record struct {
	about   []decision
	refused bool
	events  []event
}

// event is what a recorder was told of a request besides what it asks for.
type event struct {
	query string
	body  bool // there is one
}

// decision is that a request that was spelled so asks for that.
type decision struct {
	spelling spelling
	info     requestinfo.Info
}

// spelling is all that [requestinfo.Parse] looks at.
type spelling struct {
	method, opaque, path, rawPath, query string
	upgrade                              bool
}

func spellingOf(r *http.Request) spelling {
	return spelling{r.Method, r.URL.Opaque, r.URL.Path, r.URL.RawPath, r.URL.RawQuery, requestinfo.AsksForUpgrade(r.Header)}
}

// info returns what r asks for. It is parsed only once.
func (rec *record) info(r *http.Request) requestinfo.Info {
	s := spellingOf(r)
	for _, d := range rec.about {
		if d.spelling == s {
			return d.info
		}
	}
	return requestinfo.Parse(r)
}

// On returns what r asks for, and has [Check] see to it that nothing else is sent.
// It is ambiguous if that cannot be written down.
func On(r *http.Request) requestinfo.Info {
	rec := recordOf(r)
	if rec == nil {
		info := requestinfo.Parse(r)
		info.Ambiguous = true
		return info
	}
	info := rec.info(r)
	for _, d := range rec.about {
		if d.info == info {
			return info
		}
	}
	rec.about = append(rec.about, decision{spellingOf(r), info})
	return info
}

// Recorded has [Check] see to it that r is sent with the query that it has, and, if
// body is set, not without a body: an event says so to a recorder. [On] must have
// been called.
func Recorded(r *http.Request, body bool) {
	if rec := recordOf(r); rec != nil {
		rec.events = append(rec.events, event{r.URL.RawQuery, body})
	}
}

// Refuse returns the answer to r, about which something has to be decided and
// which is ambiguous. Should whoever gets the answer not give it, Check does.
func Refuse(r *http.Request) *apierrors.StatusError {
	if rec := recordOf(r); rec != nil {
		rec.refused = true
	}
	return refuseAmbiguous(r)
}

func refuseAmbiguous(r *http.Request) *apierrors.StatusError {
	return apistatus.BadRequest(apistatus.AmbiguousPath, "the path %q can be understood in more than one way: it has empty segments, dot segments or encoded slashes, or ends early", r.URL.EscapedPath())
}

// recordOf returns the record of r, a new one if there is none, and nil if there
// can be none, because r has no variables or a config has taken that one.
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

// Check returns the answer to out, a request that is about to be sent to the API
// server, if it must not be: because it does not ask for what was decided on, or
// because nothing could be decided. A request about which nothing had to be decided
// may be sent.
func Check(out *http.Request) *apierrors.StatusError {
	value := caddyhttp.GetVar(out.Context(), varKey)
	if value == nil {
		return nil
	}
	rec, ok := value.(*record)
	switch {
	case !ok:
		return apistatus.Forbidden(apistatus.Rewritten, "the variable %s is not for a config to set", varKey)
	case rec.refused:
		return refuseAmbiguous(out)
	}
	sent := rec.info(out)
	for _, d := range rec.about {
		if d.info != sent {
			return apistatus.Forbidden(apistatus.Rewritten, "a matcher has decided about %v, and what would be sent is %v: the config rewrites requests behind the matcher", d.info, sent)
		}
	}
	for _, e := range rec.events {
		if e.query != out.URL.RawQuery || e.body && (out.Body == nil || out.Body == http.NoBody) {
			return apistatus.Forbidden(apistatus.Rewritten, "a recorder was told of another query or body than what would be sent: the config rewrites requests behind tailscale_impersonate")
		}
	}
	return nil
}
