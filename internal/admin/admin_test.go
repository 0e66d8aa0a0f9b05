// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"tailscale.com/client/tailscale/apitype"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/app"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/revocation"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

// ask sends a request to the admin API. It reads the answer into v, or returns the error.
func ask(t *testing.T, method, path string, v any) error {
	t.Helper()
	for _, route := range new(Admin).Routes() {
		if route.Pattern != path && (!strings.HasSuffix(route.Pattern, "/") || !strings.HasPrefix(path, route.Pattern)) {
			continue
		}
		rec := httptest.NewRecorder()
		if err := route.Handler.ServeHTTP(rec, httptest.NewRequest(method, path, nil)); err != nil {
			return err
		}
		if err := json.NewDecoder(rec.Body).Decode(v); err != nil {
			t.Fatalf("%s %s: %v", method, path, err)
		}
		return nil
	}
	t.Fatalf("the admin API has no route for %s", path)
	return nil
}

// listed returns the callers that the admin API lists.
func listed(t *testing.T) []peer {
	t.Helper()
	var answer struct{ Peers []peer }
	if err := ask(t, "GET", "/tailscale_impersonate/peers", &answer); err != nil {
		t.Fatal(err)
	}
	return answer.Peers
}

// status returns the status of an error of the admin API.
func status(err error) int {
	var apiErr caddy.APIError
	if errors.As(err, &apiErr) {
		return apiErr.HTTPStatus
	}
	return 0
}

// handler is a handler of a running config, as far as the admin API knows one.
type handler struct {
	auth    *authn.Authenticator
	tracker *revocation.Tracker
	stop    func()
}

// newHandler runs a config with a handler until the test is over.
func newHandler(t *testing.T, node *tailnet.Node) *handler {
	t.Helper()
	ctx, err := caddy.ProvisionContext(&caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}})
	if err != nil {
		t.Fatal(err)
	}
	a, err := app.Of(ctx)
	if err != nil {
		t.Fatal(err)
	}
	listen := []string{t.Name()}
	h := new(handler)
	h.auth, err = authn.New(authn.Options{Capabilities: impersonate.Capabilities, CacheTTL: time.Hour, Listen: listen, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	h.tracker = a.Generation().NewTracker(listen, nil, revocation.Policy{
		Interval: time.Minute,
		Grace:    time.Minute,
		Identify: h.auth.Identify,
		Revoked:  func(*revocation.Revoked) {},
	})
	a.OnStarted(h.auth, func() { h.auth.Start(tailnet.Nodes{node}) })
	started, err := caddy.NewEvent(ctx, "started", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Handle(ctx, started); err != nil {
		t.Fatal(err)
	}
	h.stop = sync.OnceFunc(func() {
		if err := a.Cleanup(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(h.stop)
	return h
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	caller, err := h.auth.Authenticate(r, h.auth.Strip(r))
	if err != nil {
		return apistatus.Write(w, r, err)
	}
	open := h.tracker.Track(r, caller)
	defer open.Close()
	caller.Identity.SetHeaders(r.Header)
	defer caller.Identity.RemoveHeaders(r.Header)
	return next.ServeHTTP(w, r.WithContext(open))
}

// whoIsAlice returns what a node says about alice's laptop, with its ID.
func whoIsAlice() *apitype.WhoIsResponse {
	who := proxytest.WhoIs(proxytest.Readers)
	who.Node.StableID = "nodeid1"
	return who
}

func TestAdmin_NoCallersAreAnEmptyList(t *testing.T) {
	var answer map[string]json.RawMessage
	if err := ask(t, "GET", "/tailscale_impersonate/peers", &answer); err != nil {
		t.Fatal(err)
	}
	if got := string(answer["peers"]); got != "[]" {
		t.Errorf("got peers %s; want []", got)
	}
}

func TestAdmin_ListsCallers(t *testing.T) {
	if got := listed(t); len(got) > 0 {
		t.Fatalf("before any handler runs, got %v", got)
	}
	h := newHandler(t, proxytest.NewNode(whoIsAlice(), nil))
	if got := listed(t); len(got) > 0 {
		t.Errorf("before any request, got %v", got)
	}
	var during []peer
	err := h.ServeHTTP(httptest.NewRecorder(), proxytest.NewRequest("GET", "https://k8s/api/v1/pods?watch=true"), proxytest.NextFunc(func(*http.Request) { during = listed(t) }))
	if err != nil {
		t.Fatal(err)
	}
	after := listed(t)
	if len(during) != 1 || len(after) != 1 {
		t.Fatalf("during the request, got %v, and after it %v; want one caller each time", during, after)
	}
	if p := after[0]; p.Asked == nil || time.Since(*p.Asked) > time.Minute || p.Age == "" {
		t.Errorf("asked %v, %s ago", p.Asked, p.Age)
	}
	want := peer{
		ID: "nodeid1", Node: "laptop.example.ts.net", Address: netip.MustParseAddr(proxytest.AliceAddr), User: "alice@example.com",
		Groups: []string{"tailnet-readers"}, Source: "grants", Proxy: "k8s", Open: map[string]int{"watch": 1},
	}
	for _, got := range []peer{during[0], after[0]} {
		got.Asked, got.Age = nil, ""
		if diff := cmp.Diff(fmt.Sprint(want), fmt.Sprint(got)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		want.Open = nil
	}
	h.stop()
	if got := listed(t); len(got) > 0 {
		t.Errorf("once the config is gone, got %v", got)
	}
}

func TestAdmin_ExplainsPeers(t *testing.T) {
	node := proxytest.NewNode(whoIsAlice(), nil)
	node.Lookup = func(_ context.Context, name string) ([]netip.Addr, error) {
		if name != "laptop" {
			return nil, nil
		}
		return []netip.Addr{netip.MustParseAddr(proxytest.AliceAddr)}, nil
	}
	newHandler(t, node)
	for _, name := range []string{proxytest.AliceAddr, "laptop"} {
		var answer struct{ Peers []whoami.Facts }
		if err := ask(t, "GET", "/tailscale_impersonate/peers/"+name, &answer); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if len(answer.Peers) != 1 || answer.Peers[0].User != "alice@example.com" || len(answer.Peers[0].Grants) != 1 || !slices.Equal(answer.Peers[0].Listen, []string{t.Name()}) {
			t.Errorf("%s: got %+v", name, answer.Peers)
		}
	}
	for path, want := range map[string]int{"phone": http.StatusNotFound, "": http.StatusNotFound, "a/b": http.StatusNotFound, proxytest.NodeAddr: http.StatusNotFound} {
		if err := ask(t, "GET", "/tailscale_impersonate/peers/"+path, nil); status(err) != want {
			t.Errorf("%q: got %v; want status %d", path, err, want)
		}
	}
	node.Ask = func(context.Context, netip.Addr, netip.Addr) (*apitype.WhoIsResponse, error) {
		return nil, tailnet.ErrPeerNotFound
	}
	if err := ask(t, "GET", "/tailscale_impersonate/peers/"+proxytest.AliceAddr, nil); status(err) != http.StatusNotFound || !strings.Contains(err.Error(), "knows no peer") {
		t.Errorf("an unknown peer: got %v; want 404 and the reason", err)
	}
	for _, tt := range [][2]string{{"POST", "/tailscale_impersonate/peers"}, {"DELETE", "/tailscale_impersonate/peers"}, {"POST", "/tailscale_impersonate/peers/laptop"}} {
		if err := ask(t, tt[0], tt[1], nil); status(err) != http.StatusMethodNotAllowed {
			t.Errorf("%s %s: got %v; want 405", tt[0], tt[1], err)
		}
	}
}

// If an operator drops a caller, its open requests end, and the node is asked again about
// it, also for requests on its other connections.
func TestAdmin_DropsCallers(t *testing.T) {
	for _, name := range []string{proxytest.AliceAddr, "nodeid1", "laptop", "Laptop.example.ts.net"} {
		t.Run(name, func(t *testing.T) {
			n := proxytest.NewChangingNode()
			n.Says(whoIsAlice(), nil)
			h := newHandler(t, n.Node)
			idle := proxytest.NewConn() // a connection without open requests
			proxytest.CheckUser(t, h, idle(), "alice@example.com")
			open := proxytest.NewRequest("GET", "https://k8s/api")
			proxytest.CheckUser(t, h, open, "alice@example.com")
			n.Says(proxytest.WhoIsMallory(), nil)
			proxytest.CheckUser(t, h, idle(), "alice@example.com") // for an hour

			var answer struct{ Dropped []peer }
			err := h.ServeHTTP(httptest.NewRecorder(), open, proxytest.NextFunc(func(*http.Request) {
				if err := ask(t, "DELETE", "/tailscale_impersonate/peers/"+name, &answer); err != nil {
					t.Fatal(err)
				}
				select {
				case <-open.Context().Done():
				case <-time.After(10 * time.Second):
					t.Error("the open request does not end")
				}
			}))
			if err != nil {
				t.Fatal(err)
			}
			if len(answer.Dropped) != 1 || answer.Dropped[0].Open["short"] != 1 {
				t.Errorf("dropped %v; want alice's one request", answer.Dropped)
			}
			proxytest.CheckUser(t, h, idle(), "mallory@example.com")
		})
	}
	// Names of other peers drop nobody.
	proxytest.CheckUser(t, newHandler(t, proxytest.AliceNode()), proxytest.NewConn()(), "alice@example.com")
	for _, name := range []string{"nobody", "lap", "100.64.0.3"} {
		if err := ask(t, "DELETE", "/tailscale_impersonate/peers/"+name, nil); status(err) != http.StatusNotFound {
			t.Errorf("%s: got %v; want 404", name, err)
		}
	}
}

// Caddy's own checks protect this part of its admin API.
func TestAdmin_CaddysRulesApply(t *testing.T) {
	port := proxytest.FreePort(t)
	listen := fmt.Sprintf("127.0.0.1:%d", port)
	if err := caddy.Load([]byte(`{"admin": {"listen": "`+listen+`", "config": {"persist": false}}, "logging": {"logs": {"default": {"writer": {"output": "discard"}}}}}`), true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	newHandler(t, proxytest.AliceNode())
	for _, tt := range []struct {
		name, method, host, origin string
		want                       int
	}{
		{"from here", "GET", listen, "", http.StatusOK},
		{"by DNS rebinding", "GET", "evil.example.com", "", http.StatusForbidden},
		{"from a web page", "DELETE", listen, "https://evil.example.com", http.StatusForbidden},
	} {
		r, err := http.NewRequestWithContext(t.Context(), tt.method, "http://"+listen+"/tailscale_impersonate/peers", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = tt.host
		if tt.origin != "" {
			r.Header.Set("Origin", tt.origin)
			r.Header.Set("Sec-Fetch-Mode", "cors")
		}
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != tt.want {
			t.Errorf("%s: %s; want %d", tt.name, resp.Status, tt.want)
		}
	}
}
