// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/revocation"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

var badRequest = refusedWith{http.StatusBadRequest, metav1.StatusReasonBadRequest, ""}

func TestAWishIsPassedOnAndNothingThatCouldBeSent(t *testing.T) {
	ttl := caddy.Duration(700 * time.Millisecond)
	h := newHandler(t, caddyfile.Config{ClientImpersonation: caddyfile.Authorize, CacheTTL: &ttl}, aliceNode())
	r := newRequest("GET", "http://k8s/api", "Impersonate-User", "bob", "Impersonate-Group", "viewers")
	resp, got := serve(t, h, r)
	if got == nil {
		t.Fatalf("refused: %v", resp.Status)
	}
	for name, values := range protected(got.Header) {
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
		t.Error("nobody wants to know that the wish is granted")
	}
	if len(protected(r.Header)) > 0 {
		t.Errorf("headers remain on the request: %v", protected(r.Header))
	}

	// The next request of the same caller is about nobody else.
	_, got = serve(t, h, newRequest("GET", "http://k8s/api"))
	if got == nil {
		t.Fatal("refused")
	}
	if diff := cmp.Diff(aliceHeaders, protected(got.Header)); diff != "" {
		t.Errorf("headers of a request without a wish (-want +got):\n%s", diff)
	}
}

func TestWishesThatAreRefusedUnasked(t *testing.T) {
	denying := impersonate.Limits{DenyGroups: []string{"system:masters"}}
	for _, tt := range []struct {
		name    string
		rails   impersonate.Limits
		headers []string
		want    refusedWith
		words   []string
	}{
		{"no user", impersonate.Limits{}, []string{"Impersonate-Group", "a"}, badRequest, []string{"without a user"}},
		{"a header that does not exist", impersonate.Limits{}, []string{"Impersonate-User", "bob", "Impersonate-Future", "a"}, badRequest, []string{"Impersonate-Future"}},
		{"an alias", impersonate.Limits{}, []string{"Impersonate_User", "bob"}, badRequest, []string{"Impersonate_user"}},
		{"a denied group", denying, []string{"Impersonate-User", "bob", "Impersonate-Group", "system:masters"}, forbidden, []string{"bob", "system:masters", "deny_groups"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRequest("GET", "http://k8s/api", tt.headers...)
			resp, got := serve(t, newHandler(t, caddyfile.Config{ClientImpersonation: caddyfile.Authorize, Limits: tt.rails}, aliceNode()), r)
			if got != nil {
				t.Errorf("the next handler was called, with %v", got.Header)
			}
			checkRefused(t, resp, tt.want, tt.words...)
			if left := protected(r.Header); len(left) > 0 {
				t.Errorf("the refused request still holds %v", left)
			}
		})
	}
}

// Whoever is nobody cannot be somebody else either.
func TestAWishNeedsAnIdentity(t *testing.T) {
	r := newRequest("GET", "http://k8s/api", "Impersonate-User", "bob")
	resp, got := serve(t, newHandler(t, caddyfile.Config{ClientImpersonation: caddyfile.Authorize}, newNode(nil, nil)), r)
	if got != nil {
		t.Errorf("the next handler was called, with %v", got.Header)
	}
	checkRefused(t, resp, forbidden, aliceAddr)
}

// A route that Caddy starts over with after an error or an unwanted answer has the
// request without the header that the first handler has removed, and without its
// context. Who asked to be somebody else is not sent as itself for that.
func TestWhatWasAskedForIsNotForgottenInAnotherRoute(t *testing.T) {
	for _, first := range []string{caddyfile.Authorize, caddyfile.Reject} {
		for _, second := range []string{caddyfile.Authorize, caddyfile.Reject} {
			for _, headers := range [][]string{{"Impersonate-User", "bob"}, nil} {
				r := newRequest("GET", "http://k8s/api", headers...)
				r = r.WithContext(context.WithValue(r.Context(), caddyhttp.VarsCtxKey, make(map[string]any)))
				serve(t, newHandler(t, caddyfile.Config{ClientImpersonation: first}, aliceNode()), r)
				resp, got := serve(t, newHandler(t, caddyfile.Config{ClientImpersonation: second}, aliceNode()), r)
				if headers == nil {
					if got == nil {
						t.Errorf("%s, then %s: a request that asks for nothing is answered %s", first, second, resp.Status)
					}
					continue
				}
				if got != nil {
					t.Errorf("%s, then %s: sent with %v", first, second, protected(got.Header))
				}
				checkRefused(t, resp, forbidden, "another tailscale_impersonate", "Impersonate-User")
			}
		}
	}
}

// The same through Caddy.
func TestWhatIsRefusedIsNotSentByAnotherRoute(t *testing.T) {
	const proxy = "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}\n"
	up := newUpstream(t)
	s := startSite(t, up, false, "", "route {\nintercept {\n@no status 403\nhandle_response @no {\n"+proxy+"}\n}\n"+proxy+"}", aliceNode())
	resp := s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\nImpersonate-User: bob\r\n\r\n")
	checkRefused(t, resp, forbidden, "Impersonate-User")
	up.checkSeen(t, nil)
}

// A second handler would undo what the first one denies, and send a request as its
// caller, who asked to be somebody with fewer rights perhaps.
func TestNoRequestPassesTwoHandlers(t *testing.T) {
	first := newHandler(t, caddyfile.Config{ClientImpersonation: caddyfile.Authorize, Limits: impersonate.Limits{DenyGroups: []string{"readers"}}}, aliceNode())
	for _, mode := range []string{caddyfile.Authorize, caddyfile.Strip, caddyfile.Reject} {
		second := newHandler(t, caddyfile.Config{ClientImpersonation: mode}, aliceNode())
		for _, headers := range [][]string{{"Impersonate-User", "bob"}, nil} {
			_, between := serve(t, first, newRequest("GET", "http://k8s/api", headers...))
			if between == nil {
				t.Fatal("the first handler refused")
			}
			resp, got := serve(t, second, between)
			if got != nil {
				t.Errorf("%s: the next handler was called, with %v", mode, got.Header)
			}
			checkRefused(t, resp, forbidden, "alice@example.com", "twice")
		}
	}
}

func TestWhomRequestsMayGoOnAs(t *testing.T) {
	target := &impersonate.Target{User: "bob", Groups: []string{"a"}}
	for _, tt := range []struct {
		name string
		cfg  caddyfile.Config
		ok   bool
	}{
		{"authorize", caddyfile.Config{ClientImpersonation: caddyfile.Authorize}, true},
		{"reject", caddyfile.Config{}, false},
		{"strip", caddyfile.Config{ClientImpersonation: caddyfile.Strip}, false},
		{"a group is denied", caddyfile.Config{ClientImpersonation: caddyfile.Authorize, Limits: impersonate.Limits{DenyGroups: []string{"a"}}}, false},
	} {
		if err := newHandler(t, tt.cfg, aliceNode()).mayBe(target); (err == nil) != tt.ok || (err != nil && !apierrors.IsForbidden(err)) {
			t.Errorf("%s: got %v; want no error: %t", tt.name, err, tt.ok)
		}
	}
}

// From the client to the API server, of which the first has the right and the other
// has not.
func TestKubectlAsThroughCaddy(t *testing.T) {
	up := newUpstream(t)
	s := startSite(t, up, false, "", "tailscale_impersonate {\nclient_impersonation authorize\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", aliceNode())
	// This API server answers 200 to everything, which is no answer to a review.
	resp := s.http1(t, aliceAddr, "GET /api/v1/pods HTTP/1.1\r\nHost: k8s\r\nImpersonate-User: bob\r\n\r\n")
	checkRefused(t, resp, refusedWith{http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, ""}, "alice@example.com", "bob", "200 OK")
	for _, r := range up.take() {
		if !strings.HasSuffix(r.URL.Path, "/subjectaccessreviews") {
			t.Errorf("%s %s arrived, with %v", r.Method, r.URL, protected(r.Header))
		}
		if diff := cmp.Diff(http.Header{"Authorization": {proxyToken}}, protected(r.Header)); diff != "" {
			t.Errorf("headers of a review (-want +got):\n%s", diff)
		}
	}
	s.http1(t, aliceAddr, "GET /api/v1/pods HTTP/1.1\r\nHost: k8s\r\n\r\n")
	up.checkSeen(t, aliceAsProxy)
}

func TestOtherTransportsSendNoWish(t *testing.T) {
	up := newUpstream(t)
	s := startSite(t, up, false, "&(plain) {\nreverse_proxy $UPSTREAM {\n$HTTP\n}\n}\n", "tailscale_impersonate {\nclient_impersonation authorize\n}\ninvoke plain", aliceNode())
	resp := s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\nImpersonate-User: bob\r\n\r\n")
	checkRefused(t, resp, refusedWith{http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, ""}, "transport kubernetes, which kubectl --as needs")
	up.checkSeen(t, nil)
	s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\n\r\n")
	up.checkSeen(t, aliceHeaders)
}

func TestAuthorizeWithoutTransportKubernetesIsNoConfig(t *testing.T) {
	for _, tt := range []struct {
		name, body string
		ok         bool
	}{
		{"transport http", "tailscale_impersonate {\nclient_impersonation authorize\n}\nreverse_proxy 127.0.0.1:9", false},
		{"transport http in a handle", "tailscale_impersonate {\nclient_impersonation authorize\n}\nhandle /api/* {\nreverse_proxy 127.0.0.1:9\n}", false},
		{"transport http, and not authorize", "tailscale_impersonate\nreverse_proxy 127.0.0.1:9", true},
		{"transport kubernetes", "tailscale_impersonate {\nclient_impersonation authorize\n}\nreverse_proxy 127.0.0.1:9 {\ntransport kubernetes {\nin_cluster\n}\n}", true},
		{"transport http, and a route that is invoked", "tailscale_impersonate {\nclient_impersonation authorize\n}\nhandle /api/* {\ninvoke elsewhere\n}\nreverse_proxy 127.0.0.1:9", true},
		{"the shortcut", "tailscale_kubernetes {\nin_cluster\nclient_impersonation authorize\n}", true},
		{"transport kubernetes beside another", "tailscale_impersonate {\nclient_impersonation authorize\n}\nhandle /api/* {\nreverse_proxy 127.0.0.1:9 {\ntransport kubernetes {\nin_cluster\n}\n}\n}\nhandle {\nreverse_proxy 127.0.0.1:9\n}", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			config := new(caddy.Config)
			if err := json.Unmarshal(adapt(t, fmt.Sprintf("{\nadmin off\npersist_config off\nauto_https off\nstorage file_system %s\nlog {\noutput discard\n}\n}\n&(elsewhere) {\nrespond 204\n}\nhttp://127.0.0.1:%d {\n%s\n}", t.TempDir(), freePort(t), tt.body)), config); err != nil {
				t.Fatal(err)
			}
			err := caddy.Validate(config)
			if (err == nil) != tt.ok || (err != nil && !strings.Contains(err.Error(), "client_impersonation authorize needs transport kubernetes")) {
				t.Errorf("got error %v; want none: %t", err, tt.ok)
			}
		})
	}
}

// A stream in which alice acts as somebody else ends when she may no longer.
func TestAGrantedWishIsRechecked(t *testing.T) {
	interval := caddy.Duration(100 * time.Millisecond)
	h := newHandler(t, caddyfile.Config{ClientImpersonation: caddyfile.Authorize, RecheckInterval: &interval}, aliceNode())
	r := newRequest("GET", "http://k8s/api", "Impersonate-User", "bob")
	ended := make(chan error, 1)
	err := h.ServeHTTP(noAnswer{}, r, nextFunc(func(_ http.ResponseWriter, r *http.Request) error {
		id, _ := impersonate.FromContext(r.Context())
		id.ActAs.Granted(func(_ context.Context, caller *impersonate.Identity, _ time.Time) error {
			return apierrors.NewForbidden(schema.GroupResource{Resource: "users"}, "bob", fmt.Errorf("%s may no longer", caller.User))
		})
		select {
		case <-r.Context().Done():
			ended <- context.Cause(r.Context())
		case <-time.After(30 * time.Second):
			ended <- nil
		}
		return nil
	}))
	if err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "alice@example.com may no longer") {
		t.Errorf("the request ended with %v; want the reason", err)
	}
}

// What was granted under one config ends under the next, if that lets nobody act as
// somebody else.
func TestAGrantedWishIsJudgedByTheNewConfig(t *testing.T) {
	interval := caddy.Duration(100 * time.Millisecond)
	before := newHandler(t, caddyfile.Config{ClientImpersonation: caddyfile.Authorize, RecheckInterval: &interval}, aliceNode())
	before.sites.Run()
	var ended error
	err := before.ServeHTTP(noAnswer{}, newRequest("GET", "http://k8s/api", "Impersonate-User", "bob"), nextFunc(func(_ http.ResponseWriter, r *http.Request) error {
		id, _ := impersonate.FromContext(r.Context())
		id.ActAs.Granted(func(context.Context, *impersonate.Identity, time.Time) error { return nil })
		after := newHandler(t, caddyfile.Config{RecheckInterval: &interval}, aliceNode())
		defer func() {
			if err := after.Cleanup(); err != nil {
				t.Error(err)
			}
		}()
		if err := (started{after, new(caddyhttp.Server)}).Handle(t.Context(), caddy.Event{}); err != nil {
			t.Error(err)
		}
		select {
		case <-r.Context().Done():
			ended = context.Cause(r.Context())
		case <-time.After(30 * time.Second):
		}
		return nil
	}))
	if err != nil {
		t.Fatal(err)
	}
	if ended == nil || !strings.Contains(ended.Error(), "callers may no longer act as somebody else") {
		t.Errorf("the request ended with %v; want the reason", ended)
	}
}

// A server may have several handlers, and what one of them allows is not up to
// another.
func TestAGrantedWishIsJudgedByTheHandlerWithItsSettings(t *testing.T) {
	interval := caddy.Duration(100 * time.Millisecond)
	// load returns the second of two handlers of a config that runs.
	load := func() (h *Handler) {
		sites := new(revocation.Config)
		for _, impersonation := range []string{caddyfile.Strip, caddyfile.Authorize} {
			h = &Handler{Config: caddyfile.Config{ClientImpersonation: impersonation, RecheckInterval: &interval}, logger: zap.NewNop()}
			if err := h.setUp(sites, []string{t.Name()}); err != nil {
				t.Fatal(err)
			}
			h.setReady(tailnet.Nodes{aliceNode()})
		}
		sites.Run()
		return h
	}
	err := load().ServeHTTP(noAnswer{}, newRequest("GET", "http://k8s/api", "Impersonate-User", "bob"), nextFunc(func(_ http.ResponseWriter, r *http.Request) error {
		rechecked := make(chan struct{})
		id, _ := impersonate.FromContext(r.Context())
		id.ActAs.Granted(func(ctx context.Context, _ *impersonate.Identity, _ time.Time) error {
			select {
			case rechecked <- struct{}{}:
			case <-ctx.Done():
			}
			return nil
		})
		load()
		for range 2 { // the first may have begun before
			select {
			case <-r.Context().Done():
				t.Errorf("the request ended with %v; want it to go on", context.Cause(r.Context()))
				return nil
			case <-rechecked:
			case <-time.After(30 * time.Second):
				t.Error("the request is not rechecked")
			}
		}
		return nil
	}))
	if err != nil {
		t.Fatal(err)
	}
}

// nextFunc is a next handler.
type nextFunc func(http.ResponseWriter, *http.Request) error

func (f nextFunc) ServeHTTP(w http.ResponseWriter, r *http.Request) error { return f(w, r) }
