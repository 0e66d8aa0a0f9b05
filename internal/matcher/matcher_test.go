// SPDX-License-Identifier: Apache-2.0

package matcher_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/matcher"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/pin"
)

// newRequest returns the request for a line like "GET /api", as Caddy's server prepares
// it.
func newRequest(line string) *http.Request {
	method, target, _ := strings.Cut(line, " ")
	r := httptest.NewRequest(method, target, nil)
	return caddyhttp.PrepareRequest(r, caddy.NewReplacer(), httptest.NewRecorder(), nil)
}

// row has the options of a matcher as JSON, and requests that match (yes) or do not (no).
type row struct {
	options string
	yes, no []string
}

var table = []row{
	{`{"verb": ["get", "list"]}`,
		[]string{"GET /api/v1/pods", "GET /api/v1/namespaces/a/pods/p", "HEAD /api/v1/pods", "GET /version", "GET /api/v1/namespaces/a/pods/p/exec"},
		[]string{"GET /api/v1/pods?watch=true", "POST /api/v1/namespaces/a/pods", "HEAD /version", "PROPFIND /api/v1/pods"}},
	{`{"group": ["", "*.k8s.io"]}`,
		[]string{"GET /api/v1/pods", "GET /apis/rbac.authorization.k8s.io/v1/roles"},
		[]string{"GET /apis/apps/v1/deployments", "GET /version", "GET /api/v1"}},
	{`{"resource": ["secrets"]}`,
		[]string{"GET /api/v1/secrets", "GET /api/v1/namespaces/a/s%65crets/s", "GET /api/v1/namespaces/a/secrets/", "GET /apis/example.com/v1/secrets", "GET /api/v1/namespaces/a/secrets/s/status"},
		[]string{"GET /api/v1/pods", "GET /secrets", "GET /api/v1/namespaces/secrets"}},
	{`{"resource": ["*"]}`,
		[]string{"GET /api/v1/pods"},
		[]string{"GET /version", "GET /apis/apps/v1"}},
	{`{"subresource": [""]}`,
		[]string{"GET /api/v1/namespaces/a/pods/p"},
		[]string{"GET /api/v1/namespaces/a/pods/p/log", "GET /version"}},
	{`{"subresource": ["log", "stat*"]}`,
		[]string{"GET /api/v1/namespaces/a/pods/p/log", "GET /api/v1/namespaces/a/pods/p/status"},
		[]string{"GET /api/v1/namespaces/a/pods/p", "GET /api/v1/namespaces/a/pods/p/exec"}},
	{`{"namespace": ["team-*"]}`,
		[]string{"GET /api/v1/namespaces/team-a/pods", "GET /api/v1/namespaces/team-a"},
		[]string{"GET /api/v1/namespaces/a/pods", "GET /api/v1/pods", "GET /api/v1/namespaces"}},
	{`{"namespace": [""]}`,
		[]string{"GET /api/v1/pods", "GET /api/v1/nodes/n", "GET /api/v1/namespaces"},
		[]string{"GET /api/v1/namespaces/a/pods", "GET /version"}},
	{`{"name": ["p"]}`,
		[]string{"GET /api/v1/namespaces/a/pods/p", "GET /api/v1/pods?fieldSelector=metadata.name%3Dp"},
		[]string{"GET /api/v1/namespaces/a/pods/P", "GET /api/v1/namespaces/a/pods"}},
	{`{"name": [""]}`,
		[]string{"GET /api/v1/pods", "POST /api/v1/namespaces/a/pods"},
		[]string{"GET /api/v1/namespaces/a/pods/p"}},
	{`{"class": ["interactive"]}`,
		[]string{"GET /api/v1/namespaces/a/pods/p/exec", "GET /api/v1/nodes/n/proxy//run/"},
		[]string{"GET /api/v1/namespaces/a/pods/p"}},
	{`{"class": ["ordinary"]}`,
		[]string{"GET /api/v1/namespaces/a/pods/p", "GET /version"},
		[]string{"GET /api/v1/namespaces/a/pods/p/exec"}},
	{`{"class": ["ambiguous"]}`,
		[]string{"GET /api//v1/pods", "GET /api/v1/namespaces/a/pods/p%2Fexec"},
		[]string{"GET /api/v1/pods", "GET /api/v1/namespaces/a/pods/p/exec"}},
	{`{"class": ["ambiguous", "interactive"]}`,
		[]string{"GET /api//v1/pods", "GET /api/v1/namespaces/a/pods/p/exec"},
		[]string{"GET /api/v1/pods"}},
	// Every option has to match.
	{`{"verb": ["get"], "group": [""], "resource": ["pods"], "subresource": [""], "namespace": ["a"], "name": ["p"], "class": ["ordinary"]}`,
		[]string{"GET /api/v1/namespaces/a/pods/p"},
		[]string{
			"DELETE /api/v1/namespaces/a/pods/p", "GET /apis/apps/v1/namespaces/a/pods/p", "GET /api/v1/namespaces/a/secrets/p", "GET /api/v1/namespaces/a/pods/p/log",
			"GET /api/v1/namespaces/b/pods/p", "GET /api/v1/namespaces/a/pods/q", "GET /api/v1/namespaces/a/pods/p/exec",
		}},
}

func TestMatch(t *testing.T) {
	for _, tt := range table {
		t.Run(tt.options, func(t *testing.T) {
			var m matcher.Matcher
			if err := json.Unmarshal([]byte(tt.options), &m); err != nil {
				t.Fatal(err)
			}
			tt.check(t, m)
		})
	}
}

// An expression has the same options, as a map.
func TestMatch_Expression(t *testing.T) {
	for _, tt := range table {
		t.Run(tt.options, func(t *testing.T) {
			tt.check(t, expression(t, "kubernetes("+tt.options+")"))
		})
	}
	m := expression(t, `kubernetes({"verb": "get", "namespace": {http.vars.team}})`)
	for team, want := range map[string]bool{"a": true, "b": false} {
		r := newRequest("GET /api/v1/namespaces/a/pods/p")
		caddyhttp.SetVar(r.Context(), "team", team)
		if got, err := m.MatchWithError(r); err != nil || got != want {
			t.Errorf("with a placeholder for %q: got %v, %v; want %v", team, got, err, want)
		}
	}
}

func (tt row) check(t *testing.T, m caddyhttp.RequestMatcherWithError) {
	t.Helper()
	for want, lines := range map[bool][]string{true: tt.yes, false: tt.no} {
		for _, line := range lines {
			if got, err := m.MatchWithError(newRequest(line)); err != nil || got != want {
				t.Errorf("%s: got %v, %v; want %v", line, got, err, want)
			}
		}
	}
}

// expression returns a provisioned expression matcher.
func expression(t *testing.T, text string) caddyhttp.RequestMatcherWithError {
	t.Helper()
	m, err := newExpression(text)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func newExpression(text string) (caddyhttp.RequestMatcherWithError, error) {
	m := &caddyhttp.MatchExpression{Expr: text}
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	defer cancel()
	return m, m.Provision(ctx)
}

// Neither a matcher nor its negation lets an ambiguous request through.
func TestMatch_AmbiguousIsAnError(t *testing.T) {
	matchers := map[string]caddyhttp.RequestMatcherWithError{
		"matcher":            matcher.Matcher{Verb: []string{"get", "list"}},
		"ordinary":           matcher.Matcher{Class: []string{"ordinary"}},
		"ordinary or shell":  matcher.Matcher{Class: []string{"ordinary", "interactive"}},
		"not":                caddyhttp.MatchNot{MatcherSets: []caddyhttp.MatcherSet{{matcher.Matcher{Verb: []string{"delete"}}}}},
		"expression":         expression(t, `kubernetes({"verb": "list"})`),
		"negated expression": expression(t, `!kubernetes({"verb": "delete"})`),
	}
	for name, m := range matchers {
		t.Run(name, func(t *testing.T) {
			r := newRequest("GET /api//v1/pods")
			got, err := m.MatchWithError(r)
			var status *apierrors.StatusError
			if got || !errors.As(err, &status) || status.ErrStatus.Code != http.StatusBadRequest {
				t.Errorf("got %v, %v; want no match and a Status with the code 400", got, err)
			}
			if pin.Check(r) == nil {
				t.Error("the request can be sent if the error is ignored")
			}
		})
	}
	var handlerError caddyhttp.HandlerError
	if _, err := matchers["matcher"].MatchWithError(newRequest("GET /api/./v1")); !errors.As(err, &handlerError) || handlerError.StatusCode != http.StatusBadRequest {
		t.Errorf("got error %v; want one that makes Caddy answer 400", err)
	}
}

func TestMatch_OtherRequestCannotBeSent(t *testing.T) {
	for name, m := range map[string]caddyhttp.RequestMatcherWithError{
		"a match":    matcher.Matcher{Verb: []string{"list"}},
		"no match":   matcher.Matcher{Verb: []string{"delete"}},
		"expression": expression(t, `kubernetes({"verb": "list"})`),
	} {
		r := newRequest("GET /api/v1/pods")
		if _, err := m.MatchWithError(r); err != nil {
			t.Fatal(err)
		}
		if err := pin.Check(r); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		r.Method = http.MethodDelete
		if pin.Check(r) == nil {
			t.Errorf("%s: another request can be sent", name)
		}
	}
}

func TestValidate(t *testing.T) {
	for _, tt := range []struct{ options, want string }{
		{`{}`, "no option is given"},
		{`{"verb": []}`, "verb has no value"},
		{`{"verb": ["GET"]}`, `verb "GET": must be one of get, list, watch,`},
		{`{"verb": ["*"]}`, `verb "*": must be one of`},
		{`{"class": ["shell"]}`, `class "shell": must be one of ordinary, interactive, ambiguous`},
		{`{"class": ["ambiguous"], "verb": ["get"]}`, "class ambiguous goes with no other option"},
		{`{"resource": ["Pods"]}`, `resource "Pods": is always in lower case`},
		{`{"resource": ["pods/exec"]}`, `resource "pods/exec": holds no slash`},
		{`{"subresource": ["exec "]}`, `subresource "exec ": holds a character`},
		{`{"namespace": ["é"]}`, `namespace "é": holds a character`},
		{`{"group": ["apps/v1"]}`, `group "apps/v1": holds no slash`},
		{`{"name": ["a/b"]}`, `name "a/b": holds no slash`},
		{`{"name": ["system:Admin"]}`, ""},
		{`{"group": [""], "subresource": [""], "namespace": [""], "name": [""]}`, ""},
	} {
		t.Run(tt.options, func(t *testing.T) {
			var m matcher.Matcher
			if err := json.Unmarshal([]byte(tt.options), &m); err != nil {
				t.Fatal(err)
			}
			_, expressionErr := newExpression("kubernetes(" + tt.options + ")")
			for _, err := range []error{m.Validate(), expressionErr} {
				if got := fmt.Sprint(err); tt.want == "" && err != nil || !strings.Contains(got, tt.want) {
					t.Errorf("got error %s; want one that says %q", got, tt.want)
				}
			}
		})
	}
	if _, err := newExpression(`kubernetes({"verbs": "get"})`); err == nil || !strings.Contains(err.Error(), `unknown option "verbs"`) {
		t.Errorf("got error %v; want one that names the unknown option", err)
	}
	if _, err := newExpression(`kubernetes({"verb": 1})`); err == nil {
		t.Error("got no error for a verb that is a number")
	}
}

func BenchmarkMatch(b *testing.B) {
	m := matcher.Matcher{Verb: []string{"get", "list", "watch"}, Class: []string{"ordinary"}, Namespace: []string{"team-*"}}
	r := newRequest("GET /api/v1/namespaces/team-a/pods/p")
	vars := r.Context().Value(caddyhttp.VarsCtxKey).(map[string]any)
	b.ReportAllocs()
	for b.Loop() {
		clear(vars)
		if ok, err := m.MatchWithError(r); !ok || err != nil {
			b.Fatal(ok, err)
		}
	}
}
