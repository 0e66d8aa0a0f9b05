// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

// counted returns by how much f raises each of the counters.
func raisedBy(f func(), counters map[string]prometheus.Counter) map[string]float64 {
	before := make(map[string]float64)
	for name, c := range counters {
		before[name] = testutil.ToFloat64(c)
	}
	f()
	raised := make(map[string]float64)
	for name, c := range counters {
		if n := testutil.ToFloat64(c) - before[name]; n != 0 {
			raised[name] = n
		}
	}
	return raised
}

func TestDecisionsAreCounted(t *testing.T) {
	tagged := newNode(&apitype.WhoIsResponse{Node: &tailcfg.Node{Name: "ci.example.ts.net.", Tags: []string{"tag:ci"}}}, nil)
	counters := map[string]prometheus.Counter{
		"allowed grants": metrics.Decisions.WithLabelValues("allowed", "grants"),
		"allowed tags":   metrics.Decisions.WithLabelValues("allowed", "tags"),
		"allowed none":   metrics.Decisions.WithLabelValues("allowed", "none"),
		"refused":        metrics.Decisions.WithLabelValues("refused", ""),
		"hit":            metrics.CacheHits,
		"miss":           metrics.CacheMisses,
	}
	for _, reason := range []string{"protocol", "web_page", "host", "not_from_tailnet", "ambiguous_node", "starting", "unknown_peer", "self", "no_answer", "no_identity", "guard", "no_groups", "impersonation", "other"} {
		counters[reason] = metrics.Refusals.WithLabelValues(reason)
	}
	tls := func(headers ...string) *http.Request { return newRequest("GET", "https://k8s/api", headers...) }
	away := newNode(nil, nil)
	away.Addrs = func() (ip4, ip6 netip.Addr) { return }
	for _, tt := range []struct {
		name string
		node *tailnet.Node
		cfg  caddyfile.Config
		r    *http.Request
		want map[string]float64
	}{
		{"grants", aliceNode(), caddyfile.Config{}, tls(), map[string]float64{"allowed grants": 1, "miss": 1}},
		{"tags", tagged, caddyfile.Config{}, tls(), map[string]float64{"allowed tags": 1, "miss": 1}},
		{"none", newNode(whoIs(), nil), caddyfile.Config{}, tls(), map[string]float64{"allowed none": 1, "miss": 1}},
		{"CONNECT", aliceNode(), caddyfile.Config{}, newRequest("CONNECT", "https://k8s/api"), map[string]float64{"refused": 1, "protocol": 1}},
		{"origin", aliceNode(), caddyfile.Config{}, tls("Origin", "https://evil.example.com"), map[string]float64{"refused": 1, "web_page": 1}},
		{"site", aliceNode(), caddyfile.Config{}, tls("Sec-Fetch-Site", "cross-site"), map[string]float64{"refused": 1, "web_page": 1}},
		{"host", aliceNode(), caddyfile.Config{}, newRequest("GET", "http://evil/api"), map[string]float64{"refused": 1, "host": 1}},
		{"not from a tailnet", aliceNode(), caddyfile.Config{}, httptest.NewRequest("GET", "https://k8s/api", nil), map[string]float64{"refused": 1, "not_from_tailnet": 1}},
		{"self", aliceNode(), caddyfile.Config{}, fromPeer(httptest.NewRequest("GET", "https://k8s/api", nil), nodeAddr), map[string]float64{"refused": 1, "self": 1, "miss": 1}},
		{"unknown peer", newNode(nil, tailnet.ErrPeerNotFound), caddyfile.Config{}, tls(), map[string]float64{"refused": 1, "unknown_peer": 1, "miss": 1}},
		{"no answer", newNode(nil, errors.New("gone")), caddyfile.Config{}, tls(), map[string]float64{"refused": 1, "no_answer": 1, "miss": 1}},
		{"not connected", away, caddyfile.Config{}, tls(), map[string]float64{"refused": 1, "starting": 1}},
		{"malformed grants", newNode(whoIs(`"x"`), nil), caddyfile.Config{}, tls(), map[string]float64{"refused": 1, "no_identity": 1, "miss": 1}},
		{"no identity", newNode(&apitype.WhoIsResponse{}, nil), caddyfile.Config{}, tls(), map[string]float64{"refused": 1, "no_identity": 1, "miss": 1}},
		{"deny_tags", tagged, caddyfile.Config{Rails: impersonate.Limits{DenyTags: []string{"tag:ci"}}}, tls(), map[string]float64{"refused": 1, "guard": 1, "miss": 1}},
		{"require_groups", newNode(whoIs(), nil), caddyfile.Config{Rails: impersonate.Limits{RequireGroups: true}}, tls(), map[string]float64{"refused": 1, "no_groups": 1, "miss": 1}},
		{"kubectl --as", aliceNode(), caddyfile.Config{}, tls("Impersonate-User", "bob"), map[string]float64{"refused": 1, "impersonation": 1, "miss": 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHandler(t, tt.cfg, tt.node)
			got := raisedBy(func() { serve(t, h, tt.r) }, counters)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("counted (-want +got):\n%s", diff)
			}
		})
	}
	t.Run("no node", func(t *testing.T) {
		got := raisedBy(func() { serve(t, newHandler(t, caddyfile.Config{}), tls()) }, counters)
		if diff := cmp.Diff(map[string]float64{"refused": 1, "ambiguous_node": 1}, got); diff != "" {
			t.Errorf("counted (-want +got):\n%s", diff)
		}
	})
	t.Run("further requests on a connection", func(t *testing.T) {
		h, another := newHandler(t, caddyfile.Config{}, aliceNode()), over()
		serve(t, h, another())
		got := raisedBy(func() { serve(t, h, another()); serve(t, h, another()) }, counters)
		if diff := cmp.Diff(map[string]float64{"allowed grants": 2, "hit": 2}, got); diff != "" {
			t.Errorf("counted (-want +got):\n%s", diff)
		}
	})
}

// questions returns how many questions to nodes were counted with that outcome.
func questions(t *testing.T, outcome string) uint64 {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(metrics.Questions)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		for _, m := range family.GetMetric() {
			if m.GetLabel()[0].GetValue() == outcome {
				return m.GetHistogram().GetSampleCount()
			}
		}
	}
	return 0
}

func TestQuestionsToNodesAreTimed(t *testing.T) {
	for outcome, node := range map[string]*tailnet.Node{
		"known":   aliceNode(),
		"unknown": newNode(nil, tailnet.ErrPeerNotFound),
		"failed":  newNode(nil, errors.New("gone")),
	} {
		before := questions(t, outcome)
		serve(t, newHandler(t, caddyfile.Config{}, node), newRequest("GET", "https://k8s/api"))
		if got := questions(t, outcome) - before; got != 1 {
			t.Errorf("%s: counted %d questions; want 1", outcome, got)
		}
	}
}

// One line says who sent what and under which ID: for every decision where debug is
// on, for refusals always.
func TestDecisionsAreLogged(t *testing.T) {
	const id = "7d5e2b6c-0000-4000-8000-000000000000"
	alice := map[string]any{
		"node": "laptop.example.ts.net", "user": "alice@example.com", "groups": []any{"tailnet-readers"}, "source": "grants",
		"remote_addr": "192.0.2.1:1234", "method": "GET", "uri": "https://k8s/api", "request_id": id,
	}
	for _, tt := range []struct {
		name    string
		level   zapcore.Level
		cfg     caddyfile.Config
		headers []string
		message string
		want    map[string]any
	}{
		{"allowed, at debug", zapcore.DebugLevel, caddyfile.Config{}, nil, "request allowed", alice},
		{"allowed, at info", zapcore.InfoLevel, caddyfile.Config{}, nil, "", nil},
		{
			"refused with an identity", zapcore.WarnLevel, caddyfile.Config{}, []string{"Impersonate-User", "bob"}, "request refused",
			map[string]any{"code": "impersonation", "status": int32(403), "host": "k8s"},
		},
		{
			"refused without", zapcore.WarnLevel, caddyfile.Config{Rails: impersonate.Limits{AllowGroups: []string{"x"}, RequireGroups: true}}, nil, "request refused",
			map[string]any{"code": "guard", "status": int32(403), "host": "k8s", "groups": nil, "source": nil},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			core, logs := observer.New(tt.level)
			h := newHandler(t, tt.cfg, aliceNode())
			h.logger = zap.New(core)
			r := newRequest("GET", "https://k8s/api", tt.headers...)
			r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer).Set("http.request.uuid", id)
			serve(t, h, r)
			entries := logs.FilterMessage(tt.message).All()
			if tt.message == "" {
				if logs.Len() > 0 {
					t.Errorf("logged %v; want nothing", logs.All())
				}
				return
			}
			if len(entries) != 1 {
				t.Fatalf("got %d lines %q in %v; want 1", len(entries), tt.message, logs.All())
			}
			want := make(map[string]any)
			for _, fields := range []map[string]any{alice, tt.want} {
				for name, value := range fields {
					if want[name] = value; value == nil {
						delete(want, name)
					}
				}
			}
			got := entries[0].ContextMap()
			delete(got, "reason")
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("fields (-want +got):\n%s", diff)
			}
		})
	}
}

// refusals are told to the one who can do something about them, in words that
// name them and what is missing.
func TestARefusedCallerIsToldWhatIsMissing(t *testing.T) {
	tagged := newNode(&apitype.WhoIsResponse{Node: &tailcfg.Node{Name: "ci.example.ts.net.", Tags: []string{"tag:ci", "tag:x"}}}, nil)
	for _, tt := range []struct {
		name  string
		node  *tailnet.Node
		rails impersonate.Limits
		words []string
	}{
		{"no groups", newNode(whoIs(), nil), impersonate.Limits{RequireGroups: true}, []string{"alice@example.com on laptop.example.ts.net", "require_groups", "no grant", "tailscale.com/cap/kubernetes"}},
		{"cut", aliceNode(), impersonate.Limits{RequireGroups: true, DenyGroups: []string{"tailnet-*"}}, []string{"alice@example.com on laptop.example.ts.net", "tailnet-readers"}},
		{"tags", tagged, impersonate.Limits{AllowTags: []string{"tag:k8s"}}, []string{"device ci.example.ts.net (tag:ci, tag:x)", "allow_tags"}},
		{"malformed grants", newNode(whoIs(`"x"`), nil), impersonate.Limits{}, []string{"alice@example.com on laptop.example.ts.net", "tailscale.com/cap/kubernetes", "cannot be read"}},
		{"unknown", newNode(nil, tailnet.ErrPeerNotFound), impersonate.Limits{}, []string{aliceAddr, "not on the tailnet"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, got := serve(t, newHandler(t, caddyfile.Config{Rails: tt.rails}, tt.node), newRequest("GET", "https://k8s/api"))
			if got != nil {
				t.Error("sent on")
			}
			checkRefused(t, resp, forbidden, tt.words...)
		})
	}
}

// From here on, the whoami page.

// whoIsAlice returns a node that knows alice by two grants, one of which gives a
// group that the rails of whoamiConfig cut.
func whoIsAlice() *tailnet.Node {
	return newNode(whoIs(readers, `{"impersonate":{"groups":["system:masters","tailnet-readers"]}}`), nil)
}

func whoamiConfig() caddyfile.Config {
	return caddyfile.Config{Whoami: "/whoami", Rails: impersonate.Limits{DenyGroups: []string{"system:*"}, GroupPrefix: "tailnet:"}}
}

// ask has h answer a request for JSON at its whoami path.
func ask(t *testing.T, h *Handler, r *http.Request) (*http.Response, whoami.Facts) {
	t.Helper()
	r.Header.Set("Accept", "application/json")
	resp, got := serve(t, h, r)
	if got != nil {
		t.Error("the next handler was called")
	}
	var facts whoami.Facts
	if err := json.NewDecoder(resp.Body).Decode(&facts); err != nil {
		t.Fatalf("%s: %v", resp.Status, err)
	}
	return resp, facts
}

func TestWhoamiSaysWhatTheHandlerDecides(t *testing.T) {
	h := newHandler(t, whoamiConfig(), whoIsAlice())
	resp, facts := ask(t, h, newRequest("GET", "https://k8s.example.ts.net/whoami"))
	if resp.StatusCode != http.StatusOK {
		t.Errorf("answered %s", resp.Status)
	}
	_, got := serve(t, h, newRequest("GET", "https://k8s/api"))
	if got == nil {
		t.Fatal("the caller is refused")
	}
	var groups []string
	for _, g := range facts.Groups {
		groups = append(groups, g.Name)
	}
	if facts.User != got.Header.Get("Impersonate-User") || !slices.Equal(groups, got.Header["Impersonate-Group"]) {
		t.Errorf("the page says %s with %v; requests are sent as %v", facts.User, groups, got.Header)
	}
	if diff := cmp.Diff([]whoami.Group{{Name: "tailnet:tailnet-readers", Grants: []int{1, 2}}}, facts.Groups); diff != "" {
		t.Errorf("groups (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]whoami.Cut{{Name: "system:masters", Option: "deny_groups", Grants: []int{2}}}, facts.Cut); diff != "" {
		t.Errorf("cut (-want +got):\n%s", diff)
	}
	if facts.Device != "laptop.example.ts.net" || facts.Address != aliceAddr || facts.Server != "https://k8s.example.ts.net" || facts.Proxy != "k8s" || facts.Capability != "tailscale.com/cap/kubernetes" {
		t.Errorf("got %+v", facts)
	}
}

func TestWhoamiSaysThatTheProxyRecords(t *testing.T) {
	h := newHandler(t, caddyfile.Config{Whoami: "/whoami", Record: t.TempDir(), Events: caddyfile.LogEvents}, aliceNode())
	_, facts := ask(t, h, newRequest(http.MethodGet, "https://k8s.example.ts.net/whoami", "Accept", "application/json"))
	if want := (whoami.Recording{Wanted: true, Files: true, Requests: true}); !cmp.Equal(facts.Recording, want) {
		t.Errorf("got %+v; want %+v", facts.Recording, want)
	}
}

func TestWhoamiOfARefusedCaller(t *testing.T) {
	cfg := whoamiConfig()
	cfg.RequireGroups = true
	resp, facts := ask(t, newHandler(t, cfg, newNode(whoIs(`{"impersonate":{"groups":["system:masters"]}}`), nil)), newRequest("GET", "https://k8s/whoami"))
	if resp.StatusCode != http.StatusForbidden || facts.User != "" || len(facts.Groups) > 0 {
		t.Errorf("answered %s with user %q and groups %v; want 403 and none", resp.Status, facts.User, facts.Groups)
	}
	if facts.Login != "alice@example.com" || facts.Reason != "guard" || !strings.Contains(facts.Refused, "system:masters") {
		t.Errorf("got login %q, reason %q: %q", facts.Login, facts.Reason, facts.Refused)
	}
	if diff := cmp.Diff([]whoami.Cut{{Name: "system:masters", Option: "deny_groups", Grants: []int{1}}}, facts.Cut); diff != "" {
		t.Errorf("cut (-want +got):\n%s", diff)
	}
}

// The page is for callers, like everything else: whoever is none is refused, and
// without the option there is no such page.
func TestWhoamiIsForCallersOnly(t *testing.T) {
	http3 := newRequest("GET", "https://k8s/whoami")
	http3.Proto, http3.ProtoMajor, http3.ProtoMinor = "HTTP/3.0", 3, 0
	for _, tt := range []struct {
		name  string
		nodes []*tailnet.Node
		r     *http.Request
		want  refusedWith
	}{
		{"not from a tailnet", []*tailnet.Node{silentNode(t)}, httptest.NewRequest("GET", "https://k8s/whoami", nil), forbidden},
		{"unknown", []*tailnet.Node{newNode(nil, tailnet.ErrPeerNotFound)}, newRequest("GET", "https://k8s/whoami"), forbidden},
		{"no answer", []*tailnet.Node{newNode(nil, errors.New("gone"))}, newRequest("GET", "https://k8s/whoami"), unavailable},
		{"the node itself", []*tailnet.Node{silentNode(t)}, fromPeer(httptest.NewRequest("GET", "https://k8s/whoami", nil), nodeAddr), forbidden},
		{"another host", []*tailnet.Node{silentNode(t)}, newRequest("GET", "http://evil/whoami"), forbidden},
		{"a script of another site", []*tailnet.Node{silentNode(t)}, newRequest("GET", "https://k8s/whoami", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "cors", "Sec-Fetch-Dest", "empty"), forbidden},
		{"a frame of another site", []*tailnet.Node{silentNode(t)}, newRequest("GET", "https://k8s/whoami", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "iframe"), forbidden},
		{"a script of another site, as a document", []*tailnet.Node{silentNode(t)}, newRequest("GET", "https://k8s/whoami", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors", "Sec-Fetch-Dest", "document"), forbidden},
		{"with another origin", []*tailnet.Node{silentNode(t)}, newRequest("GET", "https://k8s/whoami", "Origin", "https://evil", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document"), forbidden},
		{"over HTTP/3", []*tailnet.Node{silentNode(t)}, http3, refusedWith{http.StatusMisdirectedRequest, "MisdirectedRequest", ""}},
		{"POST", []*tailnet.Node{silentNode(t)}, newRequest("POST", "https://k8s/whoami"), refusedWith{http.StatusMethodNotAllowed, "MethodNotAllowed", ""}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, got := serve(t, newHandler(t, whoamiConfig(), tt.nodes...), tt.r)
			if got != nil {
				t.Error("the next handler was called")
			}
			checkRefused(t, resp, tt.want)
		})
	}
	t.Run("a link on another site", func(t *testing.T) {
		r := newRequest("GET", "https://k8s/whoami", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document")
		if resp, _ := ask(t, newHandler(t, whoamiConfig(), aliceNode()), r); resp.StatusCode != http.StatusOK {
			t.Errorf("answered %s; want the page", resp.Status)
		}
	})
	for _, path := range []string{"/whoami/", "/whoami/x", "/WHOAMI", "/api/whoami"} {
		if _, got := serve(t, newHandler(t, whoamiConfig(), aliceNode()), newRequest("GET", "https://k8s"+path)); got == nil {
			t.Errorf("%s is not passed on", path)
		}
	}
	if _, got := serve(t, newHandler(t, caddyfile.Config{}, aliceNode()), newRequest("GET", "https://k8s/whoami")); got == nil {
		t.Error("without the option, /whoami is not passed on")
	}
}

// From here on, the admin API.

// admin asks the admin API, and returns what it answers or its error.
func admin(t *testing.T, method, path string, v any) error {
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

// listed are the callers that the admin API lists.
func listed(t *testing.T) []peer {
	t.Helper()
	var answer struct{ Peers []peer }
	if err := admin(t, "GET", "/tailscale_impersonate/peers", &answer); err != nil {
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

// registered returns a handler that counts as one of the running config.
func registered(t *testing.T, cfg caddyfile.Config, node *tailnet.Node) *Handler {
	t.Helper()
	h := newHandler(t, cfg, node)
	running.add(h)
	t.Cleanup(func() {
		if err := h.Cleanup(); err != nil {
			t.Error(err)
		}
	})
	return h
}

// withID has a node report an ID for alice's laptop.
func withID(who *apitype.WhoIsResponse) *apitype.WhoIsResponse {
	who.Node.StableID = "nodeid1"
	return who
}

func TestTheAdminAPIListsCallers(t *testing.T) {
	if got := listed(t); len(got) > 0 {
		t.Fatalf("before any handler runs, got %v", got)
	}
	h := registered(t, caddyfile.Config{}, newNode(withID(whoIs(readers)), nil))
	if got := listed(t); len(got) > 0 {
		t.Errorf("before any request, got %v", got)
	}
	var during []peer
	err := h.ServeHTTP(httptest.NewRecorder(), newRequest("GET", "https://k8s/api/v1/pods?watch=true"), handlerFunc(func() { during = listed(t) }))
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
		ID: "nodeid1", Node: "laptop.example.ts.net", Address: netip.MustParseAddr(aliceAddr), User: "alice@example.com",
		Groups: []string{"tailnet-readers"}, Source: "grants", Proxy: "k8s", Open: map[string]int{"watch": 1},
	}
	for _, got := range []peer{during[0], after[0]} {
		got.Asked, got.Age = nil, ""
		if diff := cmp.Diff(fmt.Sprint(want), fmt.Sprint(got)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		want.Open = nil
	}
	if err := h.Cleanup(); err != nil {
		t.Fatal(err)
	}
	if got := listed(t); len(got) > 0 {
		t.Errorf("once the config is gone, got %v", got)
	}
}

// handlerFunc is a next handler that does f.
type handlerFunc func()

func (f handlerFunc) ServeHTTP(http.ResponseWriter, *http.Request) error { f(); return nil }

func TestTheAdminAPIExplainsPeers(t *testing.T) {
	node := newNode(withID(whoIs(readers)), nil)
	node.Lookup = func(_ context.Context, name string) ([]netip.Addr, error) {
		if name != "laptop" {
			return nil, nil
		}
		return []netip.Addr{netip.MustParseAddr(aliceAddr)}, nil
	}
	registered(t, caddyfile.Config{}, node)
	for _, name := range []string{aliceAddr, "laptop"} {
		var answer struct{ Peers []whoami.Facts }
		if err := admin(t, "GET", "/tailscale_impersonate/peers/"+name, &answer); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if len(answer.Peers) != 1 || answer.Peers[0].User != "alice@example.com" || len(answer.Peers[0].Grants) != 1 || !slices.Equal(answer.Peers[0].Listen, []string{t.Name()}) {
			t.Errorf("%s: got %+v", name, answer.Peers)
		}
	}
	for path, want := range map[string]int{"phone": http.StatusNotFound, "": http.StatusNotFound, "a/b": http.StatusNotFound, nodeAddr: http.StatusNotFound} {
		if err := admin(t, "GET", "/tailscale_impersonate/peers/"+path, nil); status(err) != want {
			t.Errorf("%q: got %v; want status %d", path, err, want)
		}
	}
	node.Ask = func(context.Context, netip.Addr, netip.Addr) (*apitype.WhoIsResponse, error) {
		return nil, tailnet.ErrPeerNotFound
	}
	if err := admin(t, "GET", "/tailscale_impersonate/peers/"+aliceAddr, nil); status(err) != http.StatusNotFound || !strings.Contains(err.Error(), "knows no peer") {
		t.Errorf("an unknown peer: got %v; want 404 and the reason", err)
	}
	for _, tt := range [][2]string{{"POST", "/tailscale_impersonate/peers"}, {"DELETE", "/tailscale_impersonate/peers"}, {"POST", "/tailscale_impersonate/peers/laptop"}} {
		if err := admin(t, tt[0], tt[1], nil); status(err) != http.StatusMethodNotAllowed {
			t.Errorf("%s %s: got %v; want 405", tt[0], tt[1], err)
		}
	}
}

// A caller that an operator drops is asked about anew, on the connections that it
// has as on others, and loses what it has open.
func TestTheAdminAPIDropsCallers(t *testing.T) {
	for _, name := range []string{aliceAddr, "nodeid1", "laptop", "Laptop.example.ts.net"} {
		t.Run(name, func(t *testing.T) {
			n := newChanging()
			n.says(withID(whoIs(readers)), nil)
			ttl := caddy.Duration(time.Hour)
			h := registered(t, caddyfile.Config{CacheTTL: &ttl}, n.Node)
			idle := over() // a connection with nothing open on it
			wantUser(t, h, idle(), "alice@example.com")
			open := newRequest("GET", "https://k8s/api")
			wantUser(t, h, open, "alice@example.com")
			n.says(mallory(), nil)
			wantUser(t, h, idle(), "alice@example.com") // for an hour

			var answer struct{ Dropped []peer }
			err := h.ServeHTTP(httptest.NewRecorder(), open, handlerFunc(func() {
				if err := admin(t, "DELETE", "/tailscale_impersonate/peers/"+name, &answer); err != nil {
					t.Fatal(err)
				}
				select {
				case <-open.Context().Done():
				case <-time.After(10 * time.Second):
					t.Error("what the caller has open goes on")
				}
			}))
			if err != nil {
				t.Fatal(err)
			}
			if len(answer.Dropped) != 1 || answer.Dropped[0].Open["short"] != 1 {
				t.Errorf("dropped %v; want alice's one request", answer.Dropped)
			}
			wantUser(t, h, idle(), "mallory@example.com")
		})
	}
	// And nobody else is, who is remembered as well.
	wantUser(t, registered(t, caddyfile.Config{}, aliceNode()), over()(), "alice@example.com")
	for _, name := range []string{"nobody", "lap", "100.64.0.3"} {
		if err := admin(t, "DELETE", "/tailscale_impersonate/peers/"+name, nil); status(err) != http.StatusNotFound {
			t.Errorf("%s: got %v; want 404", name, err)
		}
	}
}

// Who is dropped while a node is asked about it is asked about anew: the answer may be
// from before.
func TestWhoIsDroppedWhileItIsAskedAboutIsAskedAboutAnew(t *testing.T) {
	n := newChanging()
	ttl := caddy.Duration(time.Hour)
	h := registered(t, caddyfile.Config{CacheTTL: &ttl}, n.Node)
	answer := n.Ask
	n.Ask = func(ctx context.Context, remote, local netip.Addr) (*apitype.WhoIsResponse, error) {
		who, err := answer(ctx, remote, local)
		n.Ask = answer
		h.forget(remote, local)
		n.says(mallory(), nil)
		return who, err
	}
	request := over()
	wantUser(t, h, request(), "alice@example.com")
	wantUser(t, h, request(), "mallory@example.com")
}

// After reloads the admin API knows the handlers of the config that runs, and the
// counts are those of all of them together.
func TestOperatorsSeeTheRunningConfig(t *testing.T) {
	up := newUpstream(t)
	before := testutil.ToFloat64(metrics.Decisions.WithLabelValues("allowed", "grants"))
	for config := 1; config <= 3; config++ {
		t.Run("", func(t *testing.T) {
			s := startSite(t, up, false, "", "tailscale_impersonate {\nwhoami\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", aliceNode())
			s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\nConnection: close\r\n\r\n")
			up.checkSeen(t, aliceAsProxy)
			if n := len(running.all()); n != 1 {
				t.Errorf("%d handlers are running; want 1", n)
			}
			if got := listed(t); len(got) != 1 || got[0].User != "alice@example.com" {
				t.Errorf("got callers %v", got)
			}
			conn := s.dial(t, aliceAddr, "http/1.1")
			if _, err := io.WriteString(conn, "GET /whoami HTTP/1.1\r\nHost: k8s\r\nAccept: application/json\r\nConnection: close\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			resp := readResponse(t, bufio.NewReader(conn))
			var facts whoami.Facts
			if err := json.NewDecoder(resp.Body).Decode(&facts); err != nil || facts.Server != "http://k8s" {
				t.Errorf("whoami: %v, %+v", err, facts)
			}
			if got := testutil.ToFloat64(metrics.Decisions.WithLabelValues("allowed", "grants")) - before; got != float64(config) {
				t.Errorf("in config %d, %v requests are counted; want all of them", config, got)
			}
		})
	}
	if n := len(running.all()); n > 0 {
		t.Errorf("%d handlers are running after the last config", n)
	}
}

// Whoever may not use Caddy's admin API may not use this part of it either.
func TestCaddysAdminRulesApply(t *testing.T) {
	port := freePort(t)
	listen := fmt.Sprintf("127.0.0.1:%d", port)
	if err := caddy.Load([]byte(`{"admin": {"listen": "`+listen+`", "config": {"persist": false}}, "logging": {"logs": {"default": {"writer": {"output": "discard"}}}}}`), true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	registered(t, caddyfile.Config{}, aliceNode())
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
