// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/google/go-cmp/cmp"
	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// wantReason fails t unless err is a refusal for that reason.
func wantReason(t *testing.T, err error, want apistatus.Reason) {
	t.Helper()
	if got := apistatus.ReasonOf(err); err == nil || got != want {
		t.Errorf("got error %v with the reason %q; want %q", err, got, want)
	}
}

func TestPlaceholders_NameTheCaller(t *testing.T) {
	who := proxytest.WhoIs(`{"impersonate":{"groups":["devs","admins"]}}`)
	h := newServer(t, Options{}, proxytest.NewNode(who, nil))
	r := proxytest.NewRequest("GET", "https://k8s/api")
	caller, err := h.Authenticate(r, Claims{})
	if err != nil {
		t.Fatal(err)
	}
	caller.SetPlaceholders(r)
	repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	for name, want := range map[string]string{
		"http.auth.user.id":                 "alice@example.com",
		"http.tailscale_impersonate.user":   "alice@example.com",
		"http.tailscale_impersonate.groups": "devs,admins",
		"http.tailscale_impersonate.login":  "alice@example.com",
		"http.tailscale_impersonate.node":   caller.Identity.Node,
		"http.tailscale_impersonate.source": "grants",
	} {
		if got, ok := repl.GetString(name); got != want || got == "" || !ok {
			t.Errorf("{%s} is %q; want %q", name, got, want)
		}
	}
	if got, ok := repl.Get("http.tailscale_impersonate.other"); ok {
		t.Errorf("a placeholder that does not exist is %q", got)
	}
	// The placeholders of a caller that is known can be replaced, as they are not set.
	repl.Set("http.auth.user.id", "another user")
	if got, _ := repl.GetString("http.auth.user.id"); got != "another user" {
		t.Errorf("once set, the user is %q", got)
	}
	caller.SetPlaceholders(httptest.NewRequest("GET", "/", nil)) // does not panic
}

func TestAuthenticate_CallerHasItsConnectionAndNode(t *testing.T) {
	node := engineer()
	for name, headers := range map[string][]string{"all groups": nil, "one group": asked(aliceLogin, "devs")} {
		r := proxytest.NewRequest("GET", "https://k8s/api", headers...)
		h := newServer(t, Options{}, node)
		caller, err := h.Authenticate(r, h.Strip(r))
		if err != nil {
			t.Fatal(err)
		}
		if conn, _ := tailnet.ConnFrom(r.Context()); caller.Conn != conn || caller.Node != node || caller.Peer.Login != aliceLogin {
			t.Errorf("%s: got %+v; want the request's connection and node", name, caller)
		}
	}
}

// The log says who it is that is refused.
func TestAuthenticate_RefusedCallerIsKnown(t *testing.T) {
	for name, tt := range map[string]struct {
		options Options
		headers []string
	}{
		"another user":    {Options{}, asked("bob@example.com")},
		"without a group": {Options{Limits: impersonate.Limits{RequireGroups: true}}, asked(aliceLogin)},
	} {
		r := proxytest.NewRequest("GET", "https://k8s/api", tt.headers...)
		h := newServer(t, tt.options, engineer())
		caller, err := h.Authenticate(r, h.Strip(r))
		if err == nil || caller.Identity == nil || caller.Identity.User != aliceLogin || caller.Conn == nil {
			t.Errorf("%s: got %+v and error %v; want alice on her connection, and an error", name, caller, err)
		}
	}
}

// A second handler would undo what the first limits, and must not read its headers.
func TestAuthenticate_SecondHandlerRefuses(t *testing.T) {
	for _, mode := range []ActAs{RejectActAs, AuthorizeActAs, StripActAs} {
		r := proxytest.NewRequest("GET", "https://k8s/api", "Impersonate-Group", "a group without a user")
		id := &impersonate.Identity{User: aliceLogin}
		r = r.WithContext(&impersonate.Context{Context: r.Context(), ID: id})
		h := newServer(t, Options{ActAs: mode}, engineer())
		claims := h.Strip(r)
		if claims.err != nil {
			t.Errorf("%s: the headers of the first handler are read: %v", mode, claims.err)
		}
		_, err := h.Authenticate(r, claims)
		wantReason(t, err, apistatus.Impersonation)
	}
}

// With audit, each request has an ID and its own identity; without, requests share one.
func TestForRequest_OwnOnlyWhereNeeded(t *testing.T) {
	who := proxytest.WhoIs(`{"impersonate":{"groups":["devs","admins"]}}`)
	who.Node.StableID = "nLAPTOP"
	identity := func(options Options, headers ...string) *impersonate.Identity {
		t.Helper()
		h := newServer(t, options, proxytest.NewNode(who, nil))
		r := proxytest.NewRequest("GET", "https://k8s/api", headers...)
		r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer).Set("http.request.uuid", "a UUID")
		caller, err := h.Authenticate(r, h.Strip(r))
		if err != nil {
			t.Fatal(err)
		}
		return caller.Identity
	}
	if id := identity(Options{Audit: true}); id.RequestID != "a UUID" || id.User != aliceLogin || id.UID == "" || len(id.Extra) == 0 {
		t.Errorf("with audit, got %+v; want an ID and what is told about the caller", id)
	}
	_, err := newServer(t, Options{Audit: true}, engineer()).Authenticate(proxytest.NewRequest("GET", "https://k8s/api"), Claims{})
	wantReason(t, err, apistatus.NoIdentity) // a device without an ID
	if id := identity(Options{}); id.RequestID != "" || id.Extra != nil {
		t.Errorf("without audit, got %+v", id)
	}
	acting := Options{ActAs: AuthorizeActAs, CacheTTL: time.Minute, Limits: impersonate.Limits{RecordGroups: []string{"ops"}}}
	id := identity(acting, asked("bob@example.com", "ops")...)
	if id.RequestID != "" || id.User != aliceLogin || id.ActAs == nil || id.ActAs.Target.User != "bob@example.com" || id.ActAs.MaxAge != time.Minute {
		t.Errorf("as another user, got %+v", id)
	}
	if !id.Recording.Enforce || !id.Recording.ByGroup {
		t.Errorf("in a group whose sessions are recorded, got %+v", id.Recording)
	}
	a := newServer(t, acting, engineer())
	granted := impersonate.Identity{Recording: impersonate.Recording{Enforce: true}}
	if got := a.forRequest(httptest.NewRequest("GET", "/", nil), &granted, id.ActAs); got.Recording.ByGroup {
		t.Error("what a grant enforces, a group does")
	}
}

// The log and the caller read whose request is refused.
func TestRefusal_NamesWhoIsRefused(t *testing.T) {
	for want, who := range map[string]*tailnet.Node{
		"ci.example.ts.net": proxytest.NewNode(proxytest.WhoIsTagged("ci.example.ts.net.", "tag:ci"), nil),
		aliceLogin:          proxytest.NewNode(proxytest.WhoIs(), nil),
	} {
		h := newServer(t, Options{Limits: impersonate.Limits{RequireGroups: true, DenyGroups: []string{"*"}}}, who)
		_, err := h.Authenticate(proxytest.NewRequest("GET", "https://k8s/api"), Claims{})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got error %v; want one that mentions %s", err, want)
		}
	}
}

func TestIsLast_RetiredHTTP2(t *testing.T) {
	h := newServer(t, Options{}, proxytest.AliceNode())
	is := func(major int) bool {
		r := proxytest.NewRequest("GET", "https://k8s/api")
		r.ProtoMajor = major
		return h.IsLast(r)
	}
	if is(2) {
		t.Error("a request of the config in use is its connection's last")
	}
	h.Retire()
	if !is(2) {
		t.Error("an HTTP/2 connection goes on using a config that was replaced")
	}
	if is(1) {
		t.Error("an HTTP/1.1 connection ends, which its server does itself")
	}
}

func TestAccepted_RefusesWhatCannotBeTold(t *testing.T) {
	h := newServer(t, Options{}, proxytest.AliceNode())
	r := proxytest.NewRequest("GET", "https://k8s/api")
	_, err := h.Authenticate(r.WithContext(context.Background()), Claims{})
	wantReason(t, err, apistatus.NotFromTailnet)
	_, err = newServer(t, Options{HostSockets: true}, proxytest.AliceNode()).Authenticate(r, Claims{})
	wantReason(t, err, apistatus.NotFromTailnet) // it is no socket of the host
	elsewhere := proxytest.AliceNode()
	elsewhere.Addrs = func() (ip4, ip6 netip.Addr) { return netip.MustParseAddr("100.64.0.9"), netip.Addr{} }
	_, err = newServer(t, Options{}, elsewhere).Authenticate(r, Claims{})
	wantReason(t, err, apistatus.AmbiguousNode)
}

// Requests wait for the nodes, for as long as their clients do.
func TestStart_RequestsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, err := New(Options{Capabilities: impersonate.Capabilities})
		if err != nil {
			t.Fatal(err)
		}
		if nodes := a.Nodes(); nodes != nil {
			t.Errorf("before the start, got nodes %v", nodes)
		}
		r := proxytest.NewRequest("GET", "https://k8s/api")
		ctx, cancel := context.WithTimeout(r.Context(), time.Second)
		defer cancel()
		_, err = a.Authenticate(r.WithContext(ctx), Claims{})
		wantReason(t, err, apistatus.Starting)
		if facts, err := a.ExplainPeer(ctx, proxytest.AliceAddr); facts != nil || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, %v; want that it has not started", facts, err)
		}
		identified := make(chan error)
		go func() {
			_, err := a.Identify(t.Context(), aliceAddr, netip.AddrPortFrom(nodeAddr, 443), time.Now())
			identified <- err
		}()
		synctest.Wait()
		a.Start(tailnet.Nodes{proxytest.AliceNode()})
		if err := <-identified; err != nil {
			t.Errorf("asked before the start: %v", err)
		}
		if len(a.Nodes()) != 1 {
			t.Errorf("got nodes %v", a.Nodes())
		}
		// A request that comes late is let through, though its client has gone.
		for range 50 {
			if err := a.waitUntilStarted(ctx); err != nil {
				t.Fatalf("the server has started: %v", err)
			}
		}
	})
}

func TestCached_ListsCallers(t *testing.T) {
	h := newServer(t, Options{CacheTTL: time.Hour}, proxytest.AliceNode())
	proxytest.CheckUser(t, h, proxytest.NewRequest("GET", "https://k8s/api"), aliceLogin)
	var got []string
	list := func() {
		got = nil
		h.Cached(func(remote, local netip.Addr, caller *Caller) {
			got = append(got, remote.String()+" "+local.String()+" "+caller.Identity.User)
		})
	}
	list()
	if want := []string{proxytest.AliceAddr + " " + proxytest.NodeAddr + " " + aliceLogin}; !slices.Equal(got, want) {
		t.Errorf("got %q; want %q", got, want)
	}
	// What she dialled elsewhere is not forgotten.
	h.Forget(aliceAddr, netip.MustParseAddr("100.64.0.9"))
	if list(); len(got) != 1 {
		t.Errorf("got %q; want her", got)
	}
	h.Forget(aliceAddr, nodeAddr)
	if list(); len(got) != 0 {
		t.Errorf("got %q; want none", got)
	}
}

func TestMetric_CountsQuestionsAndHits(t *testing.T) {
	const asked = "whois_duration_seconds"
	for name, tt := range map[string]struct {
		node *tailnet.Node
		want map[string]float64
	}{
		"known":     {proxytest.AliceNode(), map[string]float64{asked + " known": 1}},
		"unknown":   {proxytest.NewNode(nil, tailnet.ErrPeerNotFound), map[string]float64{asked + " unknown": 1}},
		"no answer": {proxytest.NewNode(nil, errors.New("no LocalAPI")), map[string]float64{asked + " failed": 1}},
		"the node":  {proxytest.NewNode(nil, tailnet.ErrSelf), map[string]float64{}},
	} {
		since := proxytest.CountsSince(t, asked)
		h := newServer(t, Options{CacheTTL: time.Hour}, tt.node)
		request := proxytest.NewConn()
		proxytest.Serve(t, h, request())
		if name == "known" {
			proxytest.Serve(t, h, request())
		}
		if diff := cmp.Diff(tt.want, since()); diff != "" {
			t.Errorf("%s: counted (-want +got):\n%s", name, diff)
		}
	}
	_, err := newServer(t, Options{}, proxytest.NewNode(nil, tailnet.ErrSelf)).Authenticate(proxytest.NewRequest("GET", "https://k8s/api"), Claims{})
	wantReason(t, err, apistatus.Self)
}

func TestNew_CacheOfOneConnectionIsUsed(t *testing.T) {
	node := proxytest.NewChangingNode()
	h := newServer(t, Options{CacheTTL: time.Hour}, node.Node)
	request := proxytest.NewConn()
	for range 2 {
		if _, _, err := h.Explain(request()); err != nil {
			t.Fatal(err)
		}
	}
	if node.Asked() != 1 {
		t.Errorf("asked %d times; want once", node.Asked())
	}
}

func TestExplain_RefusesAsEveryRequest(t *testing.T) {
	h := newServer(t, Options{}, proxytest.AliceNode())
	explain := func(change func(*http.Request)) error {
		r := proxytest.NewRequest("GET", "https://k8s/whoami")
		change(r)
		facts, _, err := h.Explain(r)
		if (facts == nil) != (err != nil) {
			t.Errorf("got %v and error %v", facts, err)
		}
		return err
	}
	wantReason(t, explain(func(r *http.Request) { r.ProtoMajor = 3 }), apistatus.Protocol)
	wantReason(t, explain(func(r *http.Request) { r.Method = http.MethodPost }), apistatus.Method)
	wantReason(t, explain(func(r *http.Request) { r.Header.Set("Origin", "https://evil.example") }), apistatus.WebPage)
	if err := explain(func(r *http.Request) { r.Method = http.MethodHead }); err != nil {
		t.Errorf("HEAD: %v", err)
	}
	_, _, err := h.Explain(httptest.NewRequest("GET", "https://k8s/whoami", nil))
	wantReason(t, err, apistatus.NotFromTailnet)
}

func TestExplain_TellsGroupsAndRecording(t *testing.T) {
	who := proxytest.WhoIs(
		`{"impersonate":{"groups":["devs","admins"]},"recorderAddrs":["100.64.0.7:80"],"enforceRecorder":true}`,
		`{"impersonate":{"groups":["view","devs"]}}`)
	options := Options{
		Capabilities: []tailcfg.PeerCapability{tailcfg.PeerCapabilityKubernetes}, ReadOnlyGroup: "view",
		Limits: impersonate.Limits{GroupPrefix: "ts:", OptionalGroups: []string{"ts:admins", "admins"}},
	}
	explain := func(options Options) map[string]any {
		t.Helper()
		facts, _, err := newServer(t, options, proxytest.NewNode(who, nil)).Explain(proxytest.NewRequest("GET", "https://k8s/whoami"))
		if err != nil {
			t.Fatal(err)
		}
		held := make(map[string][]int)
		for _, group := range slices.Concat(facts.Groups, facts.HeldBack) {
			held[group.Name] = group.Grants
		}
		return map[string]any{
			"address": facts.Address, "looks for": facts.LooksFor, "grants": held, "held back": len(facts.HeldBack), "read only": facts.ReadOnly,
			"groups of grant 1": facts.Grants[0].Groups, "recording": facts.Recording.Wanted, "files": facts.Recording.Files,
			"enforced": facts.Recording.Enforced, "requests": facts.Recording.Requests, "recorders": facts.Recording.Recorders,
		}
	}
	want := map[string]any{
		"address": proxytest.AliceAddr, "looks for": string(tailcfg.PeerCapabilityKubernetes),
		"grants": map[string][]int{"ts:devs": {1, 2}, "ts:admins": {1}, "ts:view": {2}}, "held back": 1, "read only": "ts:view",
		"groups of grant 1": []string{"devs", "admins"}, "recording": true, "files": false,
		"enforced": true, "requests": false, "recorders": []string{"100.64.0.7:80"},
	}
	if diff := cmp.Diff(want, explain(options)); diff != "" {
		t.Errorf("facts (-want +got):\n%s", diff)
	}
	options.RecordsFiles, options.LogsEvents, options.ReadOnlyGroup = true, true, "other"
	want["files"], want["requests"], want["read only"] = true, true, ""
	if diff := cmp.Diff(want, explain(options)); diff != "" {
		t.Errorf("with files and events (-want +got):\n%s", diff)
	}
	who = proxytest.WhoIs(`{"impersonate":{"groups":["devs","admins"]}}`)
	options.RecordsFiles, options.LogsEvents = false, false
	if got := explain(options); got["recording"] != false || got["enforced"] != false || got["requests"] != false || got["recorders"].([]string) != nil {
		t.Errorf("without recording: got %v", got)
	}
}

func TestExplainPeer_ByAddress(t *testing.T) {
	node := proxytest.NewChangingNode()
	node.Lookup = func(context.Context, string) ([]netip.Addr, error) { return nil, errors.New("asked by name") }
	a := newServer(t, Options{}, node.Node)
	for _, addr := range []string{proxytest.AliceAddr, "::ffff:" + proxytest.AliceAddr} {
		facts, err := a.ExplainPeer(t.Context(), addr)
		if err != nil || len(facts) != 1 || facts[0].Address != proxytest.AliceAddr {
			t.Errorf("%s: got %+v, %v; want alice", addr, facts, err)
		}
	}
	gone := errors.New("no LocalAPI")
	node.Says(nil, gone)
	if facts, err := a.ExplainPeer(t.Context(), proxytest.AliceAddr); len(facts) > 0 || !errors.Is(err, gone) {
		t.Errorf("got %+v, %v; want the node's error", facts, err)
	}
	node.Says(nil, tailnet.ErrPeerNotFound)
	if facts, err := a.ExplainPeer(t.Context(), proxytest.AliceAddr); len(facts) > 0 || err == nil {
		t.Errorf("an unknown peer: got %+v, %v; want an error", facts, err)
	}
}

// The device's other address is the same device's, and is told about once.
func TestExplainPeer_TellsDeviceOnce(t *testing.T) {
	alice6 := netip.MustParseAddr(proxytest.AliceAddr6)
	node := proxytest.NewChangingNode()
	node.Addrs = func() (ip4, ip6 netip.Addr) { return nodeAddr, netip.MustParseAddr(proxytest.NodeAddr6) }
	for _, addrs := range [][]netip.Addr{{aliceAddr, alice6}, {alice6}} {
		node.Lookup = func(context.Context, string) ([]netip.Addr, error) { return addrs, nil }
		facts, err := newServer(t, Options{}, node.Node).ExplainPeer(t.Context(), "laptop")
		if err != nil || len(facts) != 1 || facts[0].Address != addrs[0].String() {
			t.Errorf("with the addresses %v: got %d answers, %v; want one, about the first", addrs, len(facts), err)
		}
	}
	node.Addrs = func() (ip4, ip6 netip.Addr) { return nodeAddr, netip.Addr{} }
	if facts, err := newServer(t, Options{}, node.Node).ExplainPeer(t.Context(), proxytest.AliceAddr6); len(facts) > 0 || err != nil {
		t.Errorf("a node without such an address: got %d answers, %v; want none", len(facts), err)
	}
}

func TestExplainPeer_LookupIsBounded(t *testing.T) {
	node := proxytest.AliceNode()
	node.Lookup = func(ctx context.Context, _ string) ([]netip.Addr, error) {
		if deadline, ok := ctx.Deadline(); !ok || time.Until(deadline) > lookupTimeout {
			t.Error("the node may take as long as it likes")
		}
		return nil, nil
	}
	if _, err := newServer(t, Options{}, node).ExplainPeer(t.Context(), "laptop"); err != nil {
		t.Error(err)
	}
}

func TestResolve_GuardedPeerIsRefused(t *testing.T) {
	node := proxytest.NewNode(proxytest.WhoIsTagged("ci.example.ts.net.", "tag:ci"), nil)
	_, err := newServer(t, Options{Limits: impersonate.Limits{DenyTags: []string{"tag:ci"}}}, node).Authenticate(proxytest.NewRequest("GET", "https://k8s/api"), Claims{})
	wantReason(t, err, apistatus.Guard)
}
