// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// The identity in the context says which user the caller asks to act as. No header
// does that could be sent: a transport that knows nothing of it must fail.
func TestActAs_RequestIsPassedOnWithoutSendableHeaders(t *testing.T) {
	ttl := caddy.Duration(700 * time.Millisecond)
	h := newHandler(t, caddyfile.Config{ClientImpersonation: caddyfile.Authorize, CacheTTL: &ttl}, proxytest.AliceNode())
	r := proxytest.NewRequest("GET", "http://k8s/api", "Impersonate-User", "bob", "Impersonate-Group", "viewers")
	resp, got := proxytest.Serve(t, h, r)
	if got == nil {
		t.Fatalf("refused: %v", resp.Status)
	}
	for name, values := range proxytest.Protected(got.Header) {
		if name != "Impersonate-Uid" || !strings.Contains(values[0], "\x00") {
			t.Errorf("the next handler got %s: %q; want nothing that can be sent", name, values)
		}
	}
	id, _ := impersonate.FromContext(got.Context())
	want := &impersonate.Identity{
		User: "alice@example.com", Groups: []string{"tailnet-readers"}, Source: impersonate.SourceGrants, Node: "laptop.example.ts.net",
		ActAs: &impersonate.ActAsRequest{Target: &impersonate.Target{User: "bob", Groups: []string{"viewers"}}, MaxAge: 700 * time.Millisecond},
	}
	if diff := cmp.Diff(want, id, cmpopts.IgnoreFields(impersonate.ActAsRequest{}, "Granted")); diff != "" {
		t.Errorf("identity in the context (-want +got):\n%s", diff)
	}
	if id.ActAs.Granted == nil {
		t.Error("the request is not tracked: nothing is to be called when it is authorized")
	}
	if len(proxytest.Protected(r.Header)) > 0 {
		t.Errorf("headers remain on the request: %v", proxytest.Protected(r.Header))
	}

	// The next request of the same caller asks for nothing.
	_, got = proxytest.Serve(t, h, proxytest.NewRequest("GET", "http://k8s/api"))
	if got == nil {
		t.Fatal("refused")
	}
	if diff := cmp.Diff(proxytest.AliceHeaders, proxytest.Protected(got.Header)); diff != "" {
		t.Errorf("headers of a request that does not act as another user (-want +got):\n%s", diff)
	}
}

// Neither does a handler in handle_response send what the first handler refused.
func TestActAs_RefusedRequestIsNotSentByOtherRoute(t *testing.T) {
	const proxy = "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}\n"
	up := proxytest.NewAPIServer(t)
	s := proxytest.StartSite(t, up, "route {\nintercept {\n@no status 403\nhandle_response @no {\n"+proxy+"}\n}\n"+proxy+"}", proxytest.AliceNode())
	resp := s.Get(t, "/api", "Impersonate-User: bob\r\n")
	proxytest.CheckRefused(t, resp, proxytest.Forbidden, "Impersonate-User")
	up.CheckNone(t)
}

// A caller is not sent as another user if the API server does not say that it may be.
func TestActAs_WithoutReviewIsNotSent(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	s := proxytest.StartSite(t, up, "tailscale_impersonate {\nclient_impersonation authorize\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", proxytest.AliceNode())
	// This API server answers 200 to everything, which is no answer to a review.
	resp := s.Get(t, "/api/v1/pods", "Impersonate-User: bob\r\n")
	proxytest.CheckRefused(t, resp, proxytest.Unavailable, "alice@example.com", "bob")
	reviews := up.Take()
	if len(reviews) == 0 {
		t.Error("the API server was not asked")
	}
	for _, r := range reviews {
		if !strings.HasSuffix(r.URL.Path, "/subjectaccessreviews") {
			t.Errorf("%s %s arrived, with %v", r.Method, r.URL, proxytest.Protected(r.Header))
		}
		if diff := cmp.Diff(http.Header{"Authorization": {proxytest.ProxyToken}}, proxytest.Protected(r.Header)); diff != "" {
			t.Errorf("headers of a review (-want +got):\n%s", diff)
		}
	}
	s.Get(t, "/api/v1/pods", "")
	up.CheckOne(t, proxytest.AliceAsProxy)
}

func TestActAs_OtherTransportsSendNothing(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	s := proxytest.Config{
		API:    up,
		Global: "&(plain) {\nreverse_proxy $UPSTREAM {\n$HTTP\n}\n}\n",
		Body:   "tailscale_impersonate {\nclient_impersonation authorize\n}\ninvoke plain",
		Nodes:  []*tailnet.Node{proxytest.AliceNode()},
	}.Start(t)
	resp := s.Get(t, "/api", "Impersonate-User: bob\r\n")
	proxytest.CheckRefused(t, resp, proxytest.Unavailable, "transport kubernetes, which kubectl --as needs")
	up.CheckNone(t)
	s.Get(t, "/api", "")
	up.CheckOne(t, proxytest.AliceHeaders)
}

func TestActAs_NeedsTransportKubernetes(t *testing.T) {
	for _, tt := range []struct {
		name, body string
		ok         bool
	}{
		{"transport http", "tailscale_impersonate {\nclient_impersonation authorize\n}\nreverse_proxy 127.0.0.1:9", false},
		{"transport http in a handle", "tailscale_impersonate {\nclient_impersonation authorize\n}\nhandle /api/* {\nreverse_proxy 127.0.0.1:9\n}", false},
		{"transport http without authorize", "tailscale_impersonate\nreverse_proxy 127.0.0.1:9", true},
		{"transport kubernetes", "tailscale_impersonate {\nclient_impersonation authorize\n}\nreverse_proxy 127.0.0.1:9 {\ntransport kubernetes {\nin_cluster\n}\n}", true},
		{"transport http and an invoked route", "tailscale_impersonate {\nclient_impersonation authorize\n}\nhandle /api/* {\ninvoke elsewhere\n}\nreverse_proxy 127.0.0.1:9", true},
		{"the shortcut", "tailscale_kubernetes {\nin_cluster\nclient_impersonation authorize\n}", true},
		{"transport kubernetes beside another", "tailscale_impersonate {\nclient_impersonation authorize\n}\nhandle /api/* {\nreverse_proxy 127.0.0.1:9 {\ntransport kubernetes {\nin_cluster\n}\n}\n}\nhandle {\nreverse_proxy 127.0.0.1:9\n}", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			config := new(caddy.Config)
			if err := json.Unmarshal(proxytest.Adapt(t, fmt.Sprintf("{\nadmin off\npersist_config off\nauto_https off\nstorage file_system %s\nlog {\noutput discard\n}\n}\n&(elsewhere) {\nrespond 204\n}\nhttp://127.0.0.1:%d {\n%s\n}", t.TempDir(), proxytest.FreePort(t), tt.body)), config); err != nil {
				t.Fatal(err)
			}
			err := caddy.Validate(config)
			if (err == nil) != tt.ok || (err != nil && !strings.Contains(err.Error(), "client_impersonation authorize needs transport kubernetes")) {
				t.Errorf("got error %v; want none: %t", err, tt.ok)
			}
		})
	}
}

// actAsBob has h handle a request of alice's to act as bob. The next handler has check
// called whenever access is checked, and calls during. It returns what during returns.
func actAsBob(t *testing.T, h *Handler, check func(context.Context, *impersonate.Identity, time.Time) error, during func(context.Context) error) (result error) {
	t.Helper()
	r := proxytest.NewRequest("GET", "http://k8s/api", "Impersonate-User", "bob")
	called := false
	err := h.ServeHTTP(proxytest.NoAnswer{}, r, proxytest.NextFunc(func(r *http.Request) {
		called = true
		id, _ := impersonate.FromContext(r.Context())
		id.ActAs.Granted(check)
		result = during(r.Context())
	}))
	if err != nil || !called {
		t.Fatalf("the next handler was called: %v; error %v", called, err)
	}
	return result
}

// untilEnd returns why ctx ends, nil if it does not.
func untilEnd(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(30 * time.Second):
		return nil
	}
}

// A stream in which alice acts as another user ends when she may no longer.
func TestActAs_IsRechecked(t *testing.T) {
	interval := caddy.Duration(100 * time.Millisecond)
	h := newHandler(t, caddyfile.Config{ClientImpersonation: caddyfile.Authorize, RecheckInterval: &interval}, proxytest.AliceNode())
	refuse := func(_ context.Context, caller *impersonate.Identity, _ time.Time) error {
		return apierrors.NewForbidden(schema.GroupResource{Resource: "users"}, "bob", fmt.Errorf("%s may no longer", caller.User))
	}
	if err := actAsBob(t, h, refuse, untilEnd); err == nil || !strings.Contains(err.Error(), "alice@example.com may no longer") {
		t.Errorf("the request ended with %v; want the reason", err)
	}
}

// What one config allowed ends under the next, if that lets nobody act as another user.
func TestActAs_ReloadUsesNewConfig(t *testing.T) {
	interval := caddy.Duration(100 * time.Millisecond)
	registry := newRegistry()
	// load returns a handler of a config that runs.
	load := func(impersonation string) *Handler {
		generation := registry.NewGeneration()
		h := newUnstartedHandler(t, caddyfile.Config{ClientImpersonation: impersonation, RecheckInterval: &interval}, generation, zap.NewNop())
		h.UseNodes(tailnet.Nodes{proxytest.AliceNode()})
		generation.Run()
		return h
	}
	allow := func(context.Context, *impersonate.Identity, time.Time) error { return nil }
	err := actAsBob(t, load(caddyfile.Authorize), allow, func(ctx context.Context) error {
		load(caddyfile.Reject)
		return untilEnd(ctx)
	})
	if err == nil || !strings.Contains(err.Error(), "callers may no longer act as another user") {
		t.Errorf("the request ended with %v; want the reason", err)
	}
}

// A server may have several handlers, and what one of them allows does not depend on
// another.
func TestActAs_ReloadUsesMatchingHandler(t *testing.T) {
	interval := caddy.Duration(100 * time.Millisecond)
	registry := newRegistry()
	// load returns the second of two handlers of a config that runs.
	load := func() (h *Handler) {
		generation := registry.NewGeneration()
		for _, impersonation := range []string{caddyfile.Strip, caddyfile.Authorize} {
			h = newUnstartedHandler(t, caddyfile.Config{ClientImpersonation: impersonation, RecheckInterval: &interval}, generation, zap.NewNop())
			h.UseNodes(tailnet.Nodes{proxytest.AliceNode()})
		}
		generation.Run()
		return h
	}
	rechecked := make(chan struct{})
	check := func(ctx context.Context, _ *impersonate.Identity, _ time.Time) error {
		select {
		case rechecked <- struct{}{}:
		case <-ctx.Done():
		}
		return nil
	}
	err := actAsBob(t, load(), check, func(ctx context.Context) error {
		load()
		for range 2 { // the first may have begun before
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-rechecked:
			case <-time.After(30 * time.Second):
				return errors.New("the request is not rechecked")
			}
		}
		return nil
	})
	if err != nil {
		t.Errorf("the request ended with %v; want it to go on", err)
	}
}
