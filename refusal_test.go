// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// A request without an identity does not reach the next handler. The client learns why,
// and what it said about itself is removed nevertheless.
func TestServeHTTP_NoIdentityIsRefused(t *testing.T) {
	otherNode := func() *tailnet.Node { n := proxytest.AliceNode(); n.Name = "twin"; return n }
	elsewhere := func() *tailnet.Node {
		n := proxytest.AliceNode()
		n.Addrs = func() (ip4, ip6 netip.Addr) { return netip.MustParseAddr("100.64.0.9"), netip.Addr{} }
		return n
	}
	tagged := func(name string, tags ...string) *tailnet.Node {
		return proxytest.NewNode(proxytest.WhoIsTagged(name, tags...), nil)
	}
	login := func(name string) *tailnet.Node {
		who := proxytest.WhoIs(proxytest.Readers)
		who.UserProfile.LoginName = name
		return proxytest.NewNode(who, nil)
	}
	const url = "http://k8s/api"
	for _, tt := range []struct {
		name  string
		nodes []*tailnet.Node
		r     *http.Request
		want  proxytest.Refusal
		words []string
	}{
		{"connection not over a tailnet", []*tailnet.Node{proxytest.SilentNode(t)}, httptest.NewRequest(http.MethodGet, url, nil), proxytest.Forbidden, nil},
		{"no node owns the address", []*tailnet.Node{elsewhere()}, proxytest.NewRequest("GET", url), proxytest.Forbidden, []string{proxytest.NodeAddr}},
		{"no nodes at all", nil, proxytest.NewRequest("GET", url), proxytest.Forbidden, []string{proxytest.NodeAddr}},
		{"two nodes own the address", []*tailnet.Node{proxytest.SilentNode(t), otherNode()}, proxytest.NewRequest("GET", url), proxytest.Forbidden, []string{`"k8s"`, `"twin"`, proxytest.NodeAddr}},
		{"the node itself", []*tailnet.Node{proxytest.SilentNode(t)}, proxytest.FromPeer(httptest.NewRequest(http.MethodGet, url, nil), proxytest.NodeAddr), proxytest.Forbidden, []string{`"k8s"`, "itself"}},
		{"unknown peer", []*tailnet.Node{proxytest.NewNode(nil, tailnet.ErrPeerNotFound)}, proxytest.NewRequest("GET", url), proxytest.Forbidden, []string{`"k8s"`, proxytest.AliceAddr}},
		{"WhoIs fails", []*tailnet.Node{proxytest.NewNode(nil, errors.New("no LocalAPI"))}, proxytest.NewRequest("GET", url), proxytest.TryAgain, []string{`"k8s"`, proxytest.AliceAddr}},
		{"WhoIs fails with half an answer", []*tailnet.Node{proxytest.NewNode(proxytest.WhoIs(proxytest.Readers), errors.New("no LocalAPI"))}, proxytest.NewRequest("GET", url), proxytest.TryAgain, nil},
		{"empty answer", []*tailnet.Node{proxytest.NewNode(nil, nil)}, proxytest.NewRequest("GET", url), proxytest.Forbidden, []string{proxytest.AliceAddr}},
		{"answer without a node", []*tailnet.Node{proxytest.NewNode(&apitype.WhoIsResponse{}, nil)}, proxytest.NewRequest("GET", url), proxytest.Forbidden, []string{proxytest.AliceAddr}},
		{"answer without a user", []*tailnet.Node{proxytest.NewNode(&apitype.WhoIsResponse{Node: &tailcfg.Node{Name: "n."}}, nil)}, proxytest.NewRequest("GET", url), proxytest.Forbidden, []string{proxytest.AliceAddr}},
		{"empty login name", []*tailnet.Node{login("")}, proxytest.NewRequest("GET", url), proxytest.Forbidden, []string{"laptop.example.ts.net"}},
		{"login name system:admin", []*tailnet.Node{login("system:admin")}, proxytest.NewRequest("GET", url), proxytest.Forbidden, []string{"system:admin"}},
		{"login name with a line break", []*tailnet.Node{login("alice\r\nImpersonate-Group: system:masters")}, proxytest.NewRequest("GET", url), proxytest.Forbidden, nil},
		{"login name with a blank at its end", []*tailnet.Node{login("system:admin ")}, proxytest.NewRequest("GET", url), proxytest.Forbidden, nil},
		{"login name not in ASCII", []*tailnet.Node{login("älice@example.com")}, proxytest.NewRequest("GET", url), proxytest.Forbidden, nil},
		{"tagged device without a name", []*tailnet.Node{tagged("", "tag:ci")}, proxytest.NewRequest("GET", url), proxytest.Forbidden, nil},
		{"malformed capability", []*tailnet.Node{proxytest.NewNode(proxytest.WhoIs(proxytest.Readers, `{"impersonate":"everybody"}`), nil)}, proxytest.NewRequest("GET", url), proxytest.Forbidden, []string{"alice@example.com"}},
		{"unprintable group", []*tailnet.Node{proxytest.NewNode(proxytest.WhoIs(`{"impersonate":{"groups":["a\u0000b"]}}`), nil)}, proxytest.NewRequest("GET", url), proxytest.Forbidden, []string{"alice@example.com"}},
		{"empty group", []*tailnet.Node{proxytest.NewNode(proxytest.WhoIs(`{"impersonate":{"groups":[""]}}`), nil)}, proxytest.NewRequest("GET", url), proxytest.Forbidden, []string{"alice@example.com"}},
		{"kubectl --as", []*tailnet.Node{proxytest.AliceNode()}, proxytest.NewRequest("GET", url), proxytest.Forbidden, []string{"alice@example.com", "kubectl --as"}},
		{"kubectl --as from a tagged device", []*tailnet.Node{tagged("ci.example.ts.net.", "tag:ci")}, proxytest.NewRequest("GET", url), proxytest.Forbidden, []string{"ci.example.ts.net"}},
		{"Host of another name over plain HTTP", []*tailnet.Node{proxytest.SilentNode(t)}, proxytest.NewRequest("GET", "http://rebound.example.com/api"), proxytest.Forbidden, []string{`"rebound.example.com"`, `"k8s"`, "allow_hosts"}},
		{"CONNECT", []*tailnet.Node{proxytest.SilentNode(t)}, proxytest.NewRequest("CONNECT", url), proxytest.MethodNotAllowed, []string{"CONNECT"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for name, value := range map[string]string{
				"Impersonate-User": "system:admin", "Authorization": "Bearer forged", "X-Remote-User": "system:admin",
				"X-Real-Ip": "127.0.0.1", "Impersonate.Uid": "0", "Sec-Websocket-Protocol": "base64url.bearer.authorization.k8s.io.Zm9yZ2Vk",
			} {
				tt.r.Header.Set(name, value)
			}
			tt.r.Header.Set("Connection", "Impersonate-User, keep-alive")
			resp, got := proxytest.Serve(t, newHandler(t, caddyfile.Config{}, tt.nodes...), tt.r)
			if got != nil {
				t.Errorf("the next handler was called, with %v", got.Header)
			}
			proxytest.CheckRefused(t, resp, tt.want, tt.words...)
			if left := proxytest.Protected(tt.r.Header); len(left) > 0 || tt.r.Header["Connection"] != nil {
				t.Errorf("the refused request still holds %v", tt.r.Header)
			}
			repl := caddy.NewReplacer()
			if ctxRepl, ok := tt.r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
				repl = ctxRepl
			}
			if user, ok := repl.Get("http.auth.user.id"); ok {
				t.Errorf("the refused request is logged as user %v", user)
			}
		})
	}
}

// A Tailscale Service has an address of its own, which each of its hosts serves. No node
// owns it, so no node can be asked. Headscale has no Services: the node is a fake.
func TestServeHTTP_TailscaleServiceIsRefused(t *testing.T) {
	for _, service := range []string{"100.99.0.1", "fd7a:115c:a1e0::99"} {
		r := httptest.NewRequest(http.MethodGet, "https://db.example.ts.net/api", nil)
		ctx := context.WithValue(r.Context(), caddy.ReplacerCtxKey, caddy.NewReplacer())
		r = r.WithContext(tailnet.WithConn(ctx, netip.MustParseAddrPort(proxytest.AliceAddr+":40000"), netip.MustParseAddr(service)))
		resp, got := proxytest.Serve(t, newHandler(t, caddyfile.Config{}, proxytest.SilentNode(t)), r)
		if got != nil {
			t.Errorf("%s: the next handler was called", service)
		}
		proxytest.CheckRefused(t, resp, proxytest.Forbidden, service)
	}
}

// Requests through Funnel come from the internet. A node knows no peer at such an
// address, and an answer that names no device or no user does not count. Headscale has
// no Funnel: the node is a fake.
func TestServeHTTP_FunnelIsRefused(t *testing.T) {
	for name, node := range map[string]*tailnet.Node{
		"no peer":                  proxytest.NewNode(nil, tailnet.ErrPeerNotFound),
		"grants of nobody":         proxytest.NewNode(&apitype.WhoIsResponse{CapMap: proxytest.WhoIs(proxytest.Readers).CapMap}, nil),
		"a user without a device":  proxytest.NewNode(&apitype.WhoIsResponse{UserProfile: proxytest.WhoIs().UserProfile, CapMap: proxytest.WhoIs(proxytest.Readers).CapMap}, nil),
		"a device without a user":  proxytest.NewNode(&apitype.WhoIsResponse{Node: proxytest.WhoIs().Node, CapMap: proxytest.WhoIs(proxytest.Readers).CapMap}, nil),
		"an answer and an error":   proxytest.NewNode(proxytest.WhoIs(proxytest.Readers), tailnet.ErrPeerNotFound),
		"neither answer nor error": proxytest.NewNode(nil, nil),
	} {
		t.Run(name, func(t *testing.T) {
			resp, got := proxytest.Serve(t, newHandler(t, caddyfile.Config{}, node), proxytest.FromPeer(httptest.NewRequest(http.MethodGet, "https://k8s/api", nil), "203.0.113.9"))
			if got != nil {
				t.Error("the next handler was called")
			}
			proxytest.CheckRefused(t, resp, proxytest.Forbidden, "203.0.113.9")
		})
	}
}

// To WhoIs the proxy's own node is a peer like any other. It is not a caller.
func TestServeHTTP_OwnNodeIsRefused(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	s := proxytest.StartSite(t, up, proxytest.ToKubernetes, proxytest.AliceNode())
	proxytest.CheckRefused(t, s.HTTP1(t, proxytest.NodeAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\n\r\n"), proxytest.Forbidden, "itself")
	up.CheckNone(t)
}

// A server may also listen on sockets of the host. Requests that arrive there are
// refused, whatever the client claims.
func TestServeHTTP_HostSocketIsRefused(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	nodes := tailnet.Nodes{proxytest.AliceNode()}
	nodes[0].Addrs = func() (ip4, ip6 netip.Addr) {
		return netip.MustParseAddr(proxytest.NodeAddr), netip.MustParseAddr("127.0.0.1")
	}
	for _, bind := range []string{"127.0.0.1", "127.0.0.1 tailnettest/k8s"} {
		t.Run(bind, func(t *testing.T) {
			s := proxytest.Config{API: up, Nodes: nodes, Bind: bind, Body: proxytest.ToKubernetes}.Start(t)
			for _, lines := range []string{
				"",
				"X-Forwarded-For: " + proxytest.AliceAddr + "\r\n",
				"X-Real-Ip: " + proxytest.AliceAddr + "\r\nForwarded: for=" + proxytest.AliceAddr + "\r\n",
				"Tailscale-User-Login: alice@example.com\r\n",
				"Impersonate-User: alice@example.com\r\n",
			} {
				resp := s.HostHTTP1(t, "GET /api HTTP/1.1\r\nHost: k8s\r\n"+lines+"\r\n")
				proxytest.CheckRefused(t, resp, proxytest.Forbidden, "not accepted by a tailnet node")
				up.CheckNone(t)
			}
			if strings.Contains(bind, "tailnet") {
				if resp := s.Get(t, "/api", ""); resp.StatusCode != http.StatusOK {
					t.Errorf("over the tailnet: answered %s", resp.Status)
				}
				up.CheckOne(t, proxytest.AliceAsProxy)
			}
		})
	}
}

// A second handler would undo what the first one denies. It would also send a request as
// its caller, who may have asked to act as a user with fewer rights.
func TestServeHTTP_SecondHandlerIsRefused(t *testing.T) {
	first := newHandler(t, caddyfile.Config{ClientImpersonation: caddyfile.Authorize, Limits: impersonate.Limits{DenyGroups: []string{"readers"}}}, proxytest.AliceNode())
	for _, mode := range []string{caddyfile.Authorize, caddyfile.Strip, caddyfile.Reject} {
		second := newHandler(t, caddyfile.Config{ClientImpersonation: mode}, proxytest.AliceNode())
		for _, headers := range [][]string{{"Impersonate-User", "bob"}, nil} {
			_, between := proxytest.Serve(t, first, proxytest.NewRequest("GET", "http://k8s/api", headers...))
			if between == nil {
				t.Fatal("the first handler refused")
			}
			resp, got := proxytest.Serve(t, second, between)
			if got != nil {
				t.Errorf("%s: the next handler was called, with %v", mode, got.Header)
			}
			proxytest.CheckRefused(t, resp, proxytest.Forbidden, "alice@example.com", "twice")
		}
	}
}

// A refusal names the caller and what is missing, so that its reader can fix it.
func TestRefusal_SaysWhatIsMissing(t *testing.T) {
	tagged := proxytest.NewNode(proxytest.WhoIsTagged("ci.example.ts.net.", "tag:ci", "tag:x"), nil)
	for _, tt := range []struct {
		name   string
		node   *tailnet.Node
		limits impersonate.Limits
		words  []string
	}{
		{"no groups", proxytest.NewNode(proxytest.WhoIs(), nil), impersonate.Limits{RequireGroups: true}, []string{"alice@example.com on laptop.example.ts.net", "require_groups", "no grant", "tailscale.com/cap/kubernetes"}},
		{"all groups removed", proxytest.AliceNode(), impersonate.Limits{RequireGroups: true, DenyGroups: []string{"tailnet-*"}}, []string{"alice@example.com on laptop.example.ts.net", "tailnet-readers"}},
		{"tags", tagged, impersonate.Limits{AllowTags: []string{"tag:k8s"}}, []string{"device ci.example.ts.net (tag:ci, tag:x)", "allow_tags"}},
		{"malformed grants", proxytest.NewNode(proxytest.WhoIs(`"x"`), nil), impersonate.Limits{}, []string{"alice@example.com on laptop.example.ts.net", "tailscale.com/cap/kubernetes", "cannot be read"}},
		{"unknown", proxytest.NewNode(nil, tailnet.ErrPeerNotFound), impersonate.Limits{}, []string{proxytest.AliceAddr, "not on the tailnet"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, got := proxytest.Serve(t, newHandler(t, caddyfile.Config{Limits: tt.limits}, tt.node), proxytest.NewRequest("GET", "https://k8s/api"))
			if got != nil {
				t.Error("the next handler was called")
			}
			proxytest.CheckRefused(t, resp, proxytest.Forbidden, tt.words...)
		})
	}
}
