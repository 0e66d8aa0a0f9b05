// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"net/http"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// The identity replaces what the client said about itself.
func TestClientImpersonation_StripReplacesHeaders(t *testing.T) {
	r := proxytest.NewRequest("GET", "http://k8s/api",
		"Impersonate-User", "system:admin", "Impersonate-Group", "system:masters", "Impersonate-Uid", "0",
		"Impersonate-Extra-Scopes", "all", "Impersonate-Future", "x", "X-Remote-Group", "system:masters", "Authorization", "Bearer forged")
	resp, got := proxytest.Serve(t, newHandler(t, caddyfile.Config{ClientImpersonation: caddyfile.Strip}, proxytest.AliceNode()), r)
	if got == nil {
		t.Fatalf("refused: %v", resp.Status)
	}
	want := http.Header{"Impersonate-User": {"alice@example.com"}, "Impersonate-Group": {"tailnet-readers"}}
	if diff := cmp.Diff(want, proxytest.Protected(got.Header)); diff != "" {
		t.Errorf("headers differ (-want +got):\n%s", diff)
	}
}

// Any impersonation header is a request to act as another user, not only Impersonate-User.
func TestClientImpersonation_RejectRefusesEachHeader(t *testing.T) {
	for _, mode := range []string{"", caddyfile.Reject} {
		for _, name := range []string{"Impersonate-User", "Impersonate-Group", "Impersonate-Uid", "Impersonate-Extra-Scopes", "Impersonate-Future", "Impersonate_user"} {
			resp, got := proxytest.Serve(t, newHandler(t, caddyfile.Config{ClientImpersonation: mode}, proxytest.AliceNode()), proxytest.NewRequest("GET", "http://k8s/api", name, "x"))
			if got != nil {
				t.Errorf("%s with client_impersonation %q: the next handler was called", name, mode)
			}
			proxytest.CheckRefused(t, resp, proxytest.Forbidden, "alice@example.com", name)
		}
	}
}

// By default, a client that asks to act as another user is refused and told why.
func TestClientImpersonation_DefaultRefusesKubectlAs(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	s := proxytest.StartSite(t, up, proxytest.ToKubernetes, proxytest.AliceNode())
	for _, header := range []string{"Impersonate-User", "impersonate-group", "IMPERSONATE-UID"} {
		resp := s.Get(t, "/api", header+": system:admin\r\n")
		proxytest.CheckRefused(t, resp, proxytest.Forbidden, "alice@example.com", "kubectl --as")
		up.CheckNone(t)
	}
}

// The identity is in the headers, in the context and in the placeholders. Trailers are
// removed.
func TestServeHTTP_PassesIdentityOn(t *testing.T) {
	r := proxytest.NewRequest("POST", "http://k8s/api", "Connection", "Impersonate-User, Upgrade", "Upgrade", "websocket", "X-Kept", "yes")
	r.Trailer = http.Header{"Impersonate-User": nil}
	node := proxytest.NewNode(proxytest.WhoIs(`{"impersonate":{"groups":["b","{env.HOME}"]}}`, `{"impersonate":{"groups":["a","b"]}}`), nil)
	resp, got := proxytest.Serve(t, newHandler(t, caddyfile.Config{}, node), r)
	if got == nil {
		t.Fatalf("refused: %v", resp.Status)
	}
	groups := []string{"b", "{env.HOME}", "a"}
	want := http.Header{
		"Impersonate-User": {"alice@example.com"}, "Impersonate-Group": groups,
		"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "X-Kept": {"yes"},
	}
	if diff := cmp.Diff(want, got.Header); diff != "" {
		t.Errorf("headers differ (-want +got):\n%s", diff)
	}
	if len(got.Trailer) > 0 {
		t.Errorf("the request keeps the trailers %v", got.Trailer)
	}
	id, ok := impersonate.FromContext(got.Context())
	wantID := &impersonate.Identity{User: "alice@example.com", Groups: groups, Source: impersonate.SourceGrants, Node: "laptop.example.ts.net"}
	if diff := cmp.Diff(wantID, id); !ok || diff != "" {
		t.Errorf("identity in the context (ok = %v) differs (-want +got):\n%s", ok, diff)
	}
	repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	for name, want := range map[string]string{
		"http.auth.user.id":                  "alice@example.com",
		"http.tailscale_impersonate.user":    "alice@example.com",
		"http.tailscale_impersonate.groups":  "b,{env.HOME},a",
		"http.tailscale_impersonate.node":    "laptop.example.ts.net",
		"http.tailscale_impersonate.login":   "alice@example.com",
		"http.tailscale_impersonate.source":  "grants",
		"http.tailscale_impersonate.unknown": "",
	} {
		if got := repl.ReplaceAll("{"+name+"}", ""); got != want {
			t.Errorf("placeholder {%s}: got %q; want %q", name, got, want)
		}
	}
}

// The capability option replaces both standard names.
func TestCapability_ReplacesStandardNames(t *testing.T) {
	_, got := proxytest.Serve(t, newHandler(t, caddyfile.Config{Capability: "example.com/cap/other"}, proxytest.AliceNode()), proxytest.NewRequest("GET", "http://k8s/api"))
	if got == nil {
		t.Fatal("refused")
	}
	if diff := cmp.Diff(http.Header{"Impersonate-User": {"alice@example.com"}}, proxytest.Protected(got.Header)); diff != "" {
		t.Errorf("a grant for the standard capability counts (-want +got):\n%s", diff)
	}
}

// The tags of a shared device were given in another tailnet, and do not count. Headscale
// cannot share devices: the node is a fake.
func TestSharedDevice_HasGrantsOnly(t *testing.T) {
	shared := func(rules ...string) *tailnet.Node {
		who := proxytest.WhoIs(rules...)
		who.Node.Tags, who.Node.Sharer = []string{"tag:k8s-admins"}, 7
		return proxytest.NewNode(who, nil)
	}
	for name, tt := range map[string]struct {
		node   *tailnet.Node
		groups []string
		source impersonate.Source
	}{
		"no grant": {shared(), nil, impersonate.SourceNone},
		"a grant":  {shared(proxytest.Readers), []string{"tailnet-readers"}, impersonate.SourceGrants},
	} {
		t.Run(name, func(t *testing.T) {
			_, got := proxytest.Serve(t, newHandler(t, caddyfile.Config{}, tt.node), proxytest.NewRequest("GET", "https://k8s/api"))
			if got == nil {
				t.Fatal("refused")
			}
			want := http.Header{"Impersonate-User": {"laptop.example.ts.net"}}
			if tt.groups != nil {
				want["Impersonate-Group"] = tt.groups
			}
			if diff := cmp.Diff(want, proxytest.Protected(got.Header)); diff != "" {
				t.Errorf("headers differ (-want +got):\n%s", diff)
			}
			if id, _ := impersonate.FromContext(got.Context()); id.Source != tt.source {
				t.Errorf("groups came from %q; want %q", id.Source, tt.source)
			}
		})
		t.Run(name+", deny_shared", func(t *testing.T) {
			cfg := caddyfile.Config{}
			cfg.DenyShared = true
			resp, got := proxytest.Serve(t, newHandler(t, cfg, tt.node), proxytest.NewRequest("GET", "https://k8s/api"))
			if got != nil {
				t.Error("the next handler was called")
			}
			proxytest.CheckRefused(t, resp, proxytest.Forbidden, "deny_shared")
		})
	}
}

// Groups that the policy file grants beyond the limits are removed, and logged.
func TestLimits_RemovedGroupsAreLogged(t *testing.T) {
	core, logs := observer.New(zapcore.WarnLevel)
	cfg := caddyfile.Config{Limits: impersonate.Limits{DenyGroups: []string{"system:*"}, UserPrefix: "tailnet:", GroupPrefix: "tailnet:"}}
	h := newLoggingHandler(t, cfg, zap.New(core), proxytest.NewNode(proxytest.WhoIs(`{"impersonate":{"groups":["system:masters","readers"]}}`), nil))
	_, got := proxytest.Serve(t, h, proxytest.NewRequest("GET", "https://k8s/api"))
	if got == nil {
		t.Fatal("refused")
	}
	want := http.Header{"Impersonate-User": {"tailnet:alice@example.com"}, "Impersonate-Group": {"tailnet:readers"}}
	if diff := cmp.Diff(want, proxytest.Protected(got.Header)); diff != "" {
		t.Errorf("headers differ (-want +got):\n%s", diff)
	}
	entries := logs.FilterFieldKey("groups").All()
	if len(entries) != 1 || entries[0].ContextMap()["peer"] != "alice@example.com" || !strings.Contains(entries[0].Message, "left out") {
		t.Errorf("got log entries %v; want one that names the peer and the groups", logs.All())
	}
}

func TestLimits_CallerOutsideIsRefused(t *testing.T) {
	for name, limits := range map[string]impersonate.Limits{
		"require_groups": {RequireGroups: true, DenyGroups: []string{"*"}},
		"user_prefix":    {UserPrefix: "sys"},
	} {
		t.Run(name, func(t *testing.T) {
			who := proxytest.WhoIs(proxytest.Readers)
			who.UserProfile.LoginName = "tem:admin"
			resp, got := proxytest.Serve(t, newHandler(t, caddyfile.Config{Limits: limits}, proxytest.NewNode(who, nil)), proxytest.NewRequest("GET", "https://k8s/api"))
			if got != nil {
				t.Error("the next handler was called")
			}
			proxytest.CheckRefused(t, resp, proxytest.Forbidden, "tem:admin", name)
		})
	}
}

// A group whose name looks like a placeholder is never expanded.
func TestPlaceholders_GroupsAreNotExpanded(t *testing.T) {
	const group = "{env.TAILSCALE_IMPERSONATE_TEST}"
	t.Setenv("TAILSCALE_IMPERSONATE_TEST", "system:masters")
	for _, transport := range transports {
		t.Run(transport.name[1:], func(t *testing.T) {
			up := proxytest.NewAPIServer(t)
			s := proxytest.StartSite(t, up, `
				tailscale_impersonate
				reverse_proxy $UPSTREAM {
					`+transport.name+`
					header_up X-Source {http.tailscale_impersonate.source}
					header_up X-Groups {http.tailscale_impersonate.groups}
					header_up X-User {http.auth.user.id}
				}`, proxytest.NewNode(proxytest.WhoIs(`{"impersonate":{"groups":["`+group+`"]}}`), nil))
			s.Get(t, "/api", "")
			seen := up.Take()
			if len(seen) != 1 {
				t.Fatalf("the upstream saw %d requests; want 1", len(seen))
			}
			want := map[string][]string{
				"Impersonate-Group": {group}, "X-Groups": {group}, "X-User": {"alice@example.com"}, "X-Source": {"grants"},
			}
			got := make(map[string][]string)
			for name := range want {
				got[name] = seen[0].Header[name]
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("headers differ (-want +got):\n%s", diff)
			}
		})
	}
}

// knownNode returns a node that also knows the IDs of alice and her laptop.
func knownNode() *tailnet.Node {
	who := proxytest.WhoIs(proxytest.Readers)
	who.Node.StableID, who.UserProfile.ID = "nLAPTOP", tailcfg.UserID(42)
	return proxytest.NewNode(who, nil)
}

// prepared returns r as Caddy hands it to handlers.
func prepared(r *http.Request) *http.Request {
	return caddyhttp.PrepareRequest(r, caddy.NewReplacer(), proxytest.NoAnswer{}, nil)
}

func TestAudit_SendsDeviceAndRequestID(t *testing.T) {
	h := newHandler(t, caddyfile.Config{Audit: true}, knownNode())
	var ids []string
	for range 2 { // the second answer comes from the cache
		r := prepared(proxytest.NewRequest("GET", "http://k8s/api", "Audit-Id", "forged"))
		resp, got := proxytest.Serve(t, h, r)
		if got == nil {
			t.Fatalf("refused: %v", resp.Status)
		}
		id := got.Header.Get("Audit-Id")
		const domain = "Impersonate-Extra-Tailscale-Impersonate.github.io%2f"
		want := http.Header{
			"Impersonate-User":       {"alice@example.com"},
			"Impersonate-Group":      {"tailnet-readers"},
			"Impersonate-Uid":        {"42"},
			domain + "node":          {"laptop.example.ts.net"},
			domain + "node-Id":       {"nLAPTOP"},
			domain + "address":       {proxytest.AliceAddr},
			domain + "groups-Source": {"grants"},
			domain + "request-Id":    {id},
		}
		if diff := cmp.Diff(want, proxytest.Protected(got.Header)); diff != "" {
			t.Errorf("headers differ (-want +got):\n%s", diff)
		}
		if uuid, _ := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer).GetString("http.request.uuid"); id == "" || id != uuid {
			t.Errorf("the request's ID is %q; want Caddy's, %q", id, uuid)
		}
		if carried, _ := impersonate.FromContext(got.Context()); carried.RequestID != id || carried.UID != "42" {
			t.Errorf("the context carries %+v; want the same as the headers", carried)
		}
		for name := range r.Header {
			if strings.HasPrefix(name, "Impersonate-") || name == "Audit-Id" {
				t.Errorf("%s remains on the request", name)
			}
		}
		ids = append(ids, id)
	}
	if ids[0] == ids[1] {
		t.Errorf("two requests have the ID %s", ids[0])
	}
}

func TestAudit_OffSendsNoID(t *testing.T) {
	_, got := proxytest.Serve(t, newHandler(t, caddyfile.Config{}, knownNode()), prepared(proxytest.NewRequest("GET", "http://k8s/api", "Audit-Id", "forged")))
	if got == nil {
		t.Fatal("refused")
	}
	if got.Header["Audit-Id"] != nil {
		t.Errorf("got Audit-Id %q; want none", got.Header["Audit-Id"])
	}
	want := http.Header{"Impersonate-User": {"alice@example.com"}, "Impersonate-Group": {"tailnet-readers"}}
	if diff := cmp.Diff(want, proxytest.Protected(got.Header)); diff != "" {
		t.Errorf("headers differ (-want +got):\n%s", diff)
	}
}

func TestAudit_DeviceWithoutIDIsRefused(t *testing.T) {
	resp, got := proxytest.Serve(t, newHandler(t, caddyfile.Config{Audit: true}, proxytest.AliceNode()), proxytest.NewRequest("GET", "http://k8s/api"))
	if got != nil {
		t.Errorf("the next handler was called, with %v", got.Header)
	}
	proxytest.CheckRefused(t, resp, proxytest.Forbidden, "alice@example.com", "audit is on")
}
