// SPDX-License-Identifier: Apache-2.0

package pin_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/pin"
)

// newRequest returns a request with variables, as Caddy's server adds them.
func newRequest(method, target string) *http.Request {
	r := httptest.NewRequest(method, target, nil)
	return r.WithContext(context.WithValue(r.Context(), caddyhttp.VarsCtxKey, make(map[string]any)))
}

func TestCheck_SentRequestMatchesDecision(t *testing.T) {
	for _, tt := range []struct {
		name    string
		rewrite func(*http.Request)
		refused bool
	}{
		{"nothing", func(*http.Request) {}, false},
		{"another host", func(r *http.Request) { r.URL.Scheme, r.URL.Host, r.Host = "https", "k8s", "k8s" }, false},
		{"another spelling", func(r *http.Request) { r.URL.RawPath = "/api/v1/namespaces/a/p%6Fds/p" }, false},
		{"another header", func(r *http.Request) { r.Header.Set("Upgrade", "websocket") }, false},
		{"another query", func(r *http.Request) { r.URL.RawQuery = "pretty=1" }, false},
		{"another method", func(r *http.Request) { r.Method = http.MethodDelete }, true},
		{"another path", func(r *http.Request) { r.URL.Path = "/api/v1/namespaces/b/pods/p" }, true},
		{"an opaque URL", func(r *http.Request) { r.URL.Opaque = "/api/v1/namespaces/b/pods/p" }, true},
		{"an ambiguous spelling", func(r *http.Request) { r.URL.RawPath = "/api/v1/namespaces/a/pods%2Fp" }, true},
		{"an upgrade", func(r *http.Request) {
			r.Header.Set("Connection", "Upgrade")
			r.Header.Set("Upgrade", "websocket")
		}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRequest("GET", "/api/v1/namespaces/a/pods/p")
			tt.rewrite(r)
			if err := pin.Check(r); err != nil {
				t.Fatalf("without a decision: %v", err)
			}

			r = newRequest("GET", "/api/v1/namespaces/a/pods/p")
			if got := pin.On(r); got.Name != "p" || got.Ambiguous {
				t.Fatalf("got %+v; want a GET of pod p", got)
			}
			tt.rewrite(r)
			err := pin.Check(r)
			if (err != nil) != tt.refused {
				t.Fatalf("got error %v; want one: %v", err, tt.refused)
			}
			if err == nil {
				return
			}
			if status, ok := apistatus.From(err); !ok || status.Code != http.StatusForbidden || !strings.Contains(status.Message, `get "/api/v1/namespaces/a/pods/p" (ordinary)`) {
				t.Errorf("got %v; want a 403 that says what was decided about", err)
			}
		})
	}
}

// The query makes a watch of a list.
func TestCheck_QueryThatChangesVerb(t *testing.T) {
	r := newRequest("GET", "/api/v1/pods")
	if got := pin.On(r).Verb; got != "list" {
		t.Fatalf("got verb %s; want list", got)
	}
	r.URL.RawQuery = "watch=1"
	if pin.Check(r) == nil {
		t.Error("got no error for a watch; a list was decided about")
	}
}

// An event contains the query and the body. Either can make the request a dry run.
func TestRecorded_QueryAndBodyAreSent(t *testing.T) {
	for _, tt := range []struct {
		name   string
		body   bool
		change func(*http.Request)
		sent   bool
	}{
		{"nothing changes", true, func(*http.Request) {}, true},
		{"no body is recorded and none sent", false, func(r *http.Request) { r.Body = nil }, true},
		{"another query", false, func(r *http.Request) { r.URL.RawQuery = "" }, false},
		{"the body is dropped", true, func(r *http.Request) { r.Body = nil }, false},
		{"the body is taken away", true, func(r *http.Request) { r.Body = http.NoBody }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRequest("DELETE", "/api/v1/namespaces/a/pods/b?dryRun=All")
			r.Body = io.NopCloser(strings.NewReader(`{"dryRun":["All"]}`))
			pin.On(r)
			pin.Recorded(r, tt.body)
			tt.change(r)
			err := pin.Check(r)
			if (err == nil) != tt.sent {
				t.Fatalf("got %v; want it to be sent: %v", err, tt.sent)
			}
			if err != nil && !strings.Contains(err.Error(), "recorder") {
				t.Errorf("got %q; want it to mention the recorder", err)
			}
		})
	}
}

func TestOn_EveryDecisionCounts(t *testing.T) {
	r := newRequest("GET", "/cluster/api/v1/pods")
	pin.On(r)
	r.URL.Path = "/api/v1/pods"
	if got := pin.On(r).Resource; got != "pods" {
		t.Fatalf("got resource %q; want pods", got)
	}
	if pin.Check(r) == nil {
		t.Error("got no error; the request is not the one that the first decision was about")
	}
	// Nor is it after the first path is restored.
	r.URL.Path = "/cluster/api/v1/pods"
	if pin.Check(r) == nil {
		t.Error("got no error; the request is not the one that the second decision was about")
	}
}

func TestRefuse_IsKept(t *testing.T) {
	r := newRequest("GET", "/api/v1//pods")
	if !pin.On(r).Ambiguous {
		t.Fatal("got an unambiguous request")
	}
	if err := pin.Check(r); err != nil {
		t.Errorf("got %v before it was refused; want no error", err)
	}
	err := pin.Refuse(r)
	if status, ok := apistatus.From(err); !ok || status.Code != http.StatusBadRequest || !strings.Contains(status.Message, `"/api/v1//pods"`) {
		t.Errorf("got %v; want a 400 that names the path", err)
	}
	if pin.Check(r) == nil {
		t.Error("got no error for the refused request")
	}
	// It stays refused with an unambiguous path.
	r.URL.Path = "/api/v1/pods"
	if pin.Check(r) == nil {
		t.Error("got no error for the refused request with another path")
	}
}

func TestOn_AmbiguousIfNotRecorded(t *testing.T) {
	r := httptest.NewRequest("GET", "/api/v1/pods", nil)
	if !pin.On(r).Ambiguous {
		t.Error("without variables: got an unambiguous request")
	}
	if pin.Refuse(r) == nil {
		t.Error("without variables: got no refusal")
	}

	r = newRequest("GET", "/api/v1/pods")
	caddyhttp.SetVar(r.Context(), "tailscale_impersonate.decided", "a config's own")
	if !pin.On(r).Ambiguous {
		t.Error("with the variable taken: got an unambiguous request")
	}
	if pin.Check(r) == nil {
		t.Error("with the variable overwritten: got no error")
	}
}

// Requests without conditions cost a lookup in a map.
func TestCheck_AllocatesNothing(t *testing.T) {
	r := newRequest("GET", "/api/v1/pods")
	if n := testing.AllocsPerRun(100, func() { _ = pin.Check(r) }); n > 0 {
		t.Errorf("got %v allocations without a decision; want none", n)
	}
	pin.On(r)
	if n := testing.AllocsPerRun(100, func() { _, _ = pin.On(r), pin.Check(r) }); n > 0 {
		t.Errorf("got %v allocations where the request has been parsed; want none", n)
	}
}

func TestRequire_EveryConditionHolds(t *testing.T) {
	bad := errors.New("bad")
	for _, tt := range []struct {
		results []error
		want    error
	}{
		{[]error{nil, nil}, nil},
		{[]error{bad, nil}, bad},
		{[]error{nil, bad}, bad},
	} {
		r := newRequest("GET", "/api/v1/pods")
		for _, result := range tt.results {
			if !pin.Require(r, func(out *http.Request) error {
				if out.Method != http.MethodDelete {
					t.Errorf("got a %s; want the request that is sent", out.Method)
				}
				return result
			}) {
				t.Fatal("the condition was not recorded")
			}
		}
		r.Method = http.MethodDelete
		if got := pin.Check(r); !errors.Is(got, tt.want) {
			t.Errorf("results %v: got %v; want %v", tt.results, got, tt.want)
		}
	}
}

func TestRequire_ReportsThatNothingWasRecorded(t *testing.T) {
	holds := func(*http.Request) error { return nil }
	if pin.Require(httptest.NewRequest("GET", "/", nil), holds) {
		t.Error("without variables: got true; want false")
	}
	r := newRequest("GET", "/")
	caddyhttp.SetVar(r.Context(), "tailscale_impersonate.decided", "a config's own")
	if pin.Require(r, holds) {
		t.Error("with the variable taken: got true; want false")
	}
}
