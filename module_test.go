// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/intercept"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	_ "github.com/caddyserver/caddy/v2/modules/filestorage"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/loopback"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/tailcfg"
	"tailscale.com/tsnet"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/revocation"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// The addresses of the tailnet in these tests.
const (
	nodeAddr  = "100.64.0.1" // the node that Caddy listens on
	aliceAddr = "100.64.0.2" // alice's laptop
)

// whoIs returns what a node says about alice's laptop when her grants hold the
// given rules.
func whoIs(rules ...string) *apitype.WhoIsResponse {
	who := &apitype.WhoIsResponse{
		Node:        &tailcfg.Node{Name: "laptop.example.ts.net."},
		UserProfile: &tailcfg.UserProfile{LoginName: "alice@example.com"},
	}
	if len(rules) > 0 {
		who.CapMap = tailcfg.PeerCapMap{tailcfg.PeerCapabilityKubernetes: nil}
	}
	for _, rule := range rules {
		who.CapMap[tailcfg.PeerCapabilityKubernetes] = append(who.CapMap[tailcfg.PeerCapabilityKubernetes], tailcfg.RawMessage(rule))
	}
	return who
}

const readers = `{"impersonate":{"groups":["tailnet-readers"]}}`

// newNode returns a node that answers every question about a peer with who and
// err.
func newNode(who *apitype.WhoIsResponse, err error) *tailnet.Node {
	return &tailnet.Node{
		Name:    "k8s",
		Addrs:   func() (ip4, ip6 netip.Addr) { return netip.MustParseAddr(nodeAddr), netip.Addr{} },
		DNSName: func(context.Context) (string, error) { return "k8s.example.ts.net", nil },
		Ask: func(_ context.Context, remote, local netip.Addr) (*apitype.WhoIsResponse, error) {
			if local != netip.MustParseAddr(nodeAddr) {
				return nil, fmt.Errorf("asked with the local address %v; want %v", local, nodeAddr)
			}
			return who, err
		},
	}
}

// aliceNode is a node that knows alice as a reader.
func aliceNode() *tailnet.Node { return newNode(whoIs(readers), nil) }

// silentNode is a node that must not be asked who somebody is.
func silentNode(t *testing.T) *tailnet.Node {
	n := aliceNode()
	n.Ask = func(context.Context, netip.Addr, netip.Addr) (*apitype.WhoIsResponse, error) {
		t.Error("the node was asked who the peer is")
		return nil, errors.New("must not be asked")
	}
	return n
}

// newHandler returns a handler that is ready to serve, without a Caddy around it.
func newHandler(t testing.TB, cfg caddyfile.Config, nodes ...*tailnet.Node) *Handler {
	t.Helper()
	h := unstarted(t, cfg)
	h.setReady(nodes)
	return h
}

// unstarted returns a handler whose config has not started yet.
func unstarted(t testing.TB, cfg caddyfile.Config) *Handler {
	t.Helper()
	h := &Handler{Config: cfg, logger: zap.NewNop()}
	if err := h.Validate(); err != nil {
		t.Fatal(err)
	}
	if err := h.setUp(new(revocation.Config), []string{t.Name()}); err != nil {
		t.Fatal(err)
	}
	return h
}

// newRequest returns a request that came from alice's laptop, with headers given
// as name, value, name, value.
func newRequest(method, target string, headers ...string) *http.Request {
	r := httptest.NewRequest(method, target, nil)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	return fromPeer(r, aliceAddr)
}

// fromPeer returns r as if it had come over the tailnet from the address peer.
func fromPeer(r *http.Request, peer string) *http.Request {
	ctx := context.WithValue(r.Context(), caddy.ReplacerCtxKey, caddy.NewReplacer())
	return r.WithContext(tailnet.WithConn(ctx, netip.AddrPortFrom(netip.MustParseAddr(peer), 40000), netip.MustParseAddr(nodeAddr)))
}

// next is the handler behind ours. It records what it was called with.
type next struct{ got *http.Request }

func (n *next) ServeHTTP(w http.ResponseWriter, r *http.Request) error {
	n.got = r.Clone(r.Context())
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// serve has h answer r and returns the answer and what the next handler got, nil
// if it was not called.
func serve(t *testing.T, h *Handler, r *http.Request) (*http.Response, *http.Request) {
	t.Helper()
	var n next
	rec := httptest.NewRecorder()
	if err := h.ServeHTTP(rec, r, &n); err != nil {
		t.Fatalf("ServeHTTP: %v", err)
	}
	return rec.Result(), n.got
}

// refusedWith is what a client can tell about a refused request.
type refusedWith struct {
	Code       int
	Reason     metav1.StatusReason
	RetryAfter string
}

var (
	forbidden   = refusedWith{http.StatusForbidden, metav1.StatusReasonForbidden, ""}
	unavailable = refusedWith{http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, "1"}
)

// checkRefused checks that resp is a Kubernetes Status object as want says, with a
// message that holds each of the words.
func checkRefused(t *testing.T, resp *http.Response, want refusedWith, words ...string) {
	t.Helper()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("reading the answer: %v", err)
	}
	var status metav1.Status
	if err := json.Unmarshal(body, &status); err != nil {
		t.Fatalf("the answer, %s, is no Status object: %v\n%s", resp.Status, err, body)
	}
	if status.Kind != "Status" || status.APIVersion != "v1" || status.Status != metav1.StatusFailure || int(status.Code) != resp.StatusCode {
		t.Errorf("not a Status of the answer's code: %s", body)
	}
	got := refusedWith{resp.StatusCode, status.Reason, resp.Header.Get("Retry-After")}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("refusal differs (-want +got):\n%s%s", diff, body)
	}
	for _, word := range words {
		if !strings.Contains(status.Message, word) {
			t.Errorf("message %q does not mention %q", status.Message, word)
		}
	}
}

// protected returns the headers of h that carry identity or credentials, by any
// spelling that something further on may take for one.
func protected(h http.Header) http.Header {
	out := make(http.Header)
	for name, values := range h {
		folded := strings.NewReplacer("_", "-", ".", "-").Replace(strings.ToLower(name))
		switch {
		case strings.HasPrefix(folded, "impersonate-"), strings.HasPrefix(folded, "x-remote-"),
			folded == "authorization", folded == "x-real-ip":
			out[name] = values
		case folded == "sec-websocket-protocol" && slices.ContainsFunc(strings.Split(strings.Join(values, ","), ","), func(protocol string) bool {
			return strings.HasPrefix(strings.ToLower(strings.TrimSpace(protocol)), "base64url.bearer.authorization.k8s.io.")
		}):
			out[name] = values
		}
	}
	return out
}

// Whatever cannot be answered for does not reach the next handler, the client
// learns why, and what it said about itself is gone all the same.
func TestNoIdentityNoRequest(t *testing.T) {
	otherNode := func() *tailnet.Node { n := aliceNode(); n.Name = "twin"; return n }
	elsewhere := func() *tailnet.Node {
		n := aliceNode()
		n.Addrs = func() (ip4, ip6 netip.Addr) { return netip.MustParseAddr("100.64.0.9"), netip.Addr{} }
		return n
	}
	tagged := func(name string, tags ...string) *tailnet.Node {
		return newNode(&apitype.WhoIsResponse{Node: &tailcfg.Node{Name: name, Tags: tags}}, nil)
	}
	login := func(name string) *tailnet.Node {
		who := whoIs(readers)
		who.UserProfile.LoginName = name
		return newNode(who, nil)
	}
	const url = "http://k8s/api"
	for _, tt := range []struct {
		name  string
		nodes []*tailnet.Node
		r     *http.Request
		want  refusedWith
		words []string
	}{
		{"connection not over a tailnet", []*tailnet.Node{silentNode(t)}, httptest.NewRequest(http.MethodGet, url, nil), forbidden, nil},
		{"no node owns the address", []*tailnet.Node{elsewhere()}, newRequest("GET", url), forbidden, []string{nodeAddr}},
		{"no nodes at all", nil, newRequest("GET", url), forbidden, []string{nodeAddr}},
		{"two nodes own the address", []*tailnet.Node{silentNode(t), otherNode()}, newRequest("GET", url), forbidden, []string{`"k8s"`, `"twin"`, nodeAddr}},
		{"the node itself", []*tailnet.Node{silentNode(t)}, fromPeer(httptest.NewRequest(http.MethodGet, url, nil), nodeAddr), forbidden, []string{`"k8s"`, "itself"}},
		{"unknown peer", []*tailnet.Node{newNode(nil, tailnet.ErrPeerNotFound)}, newRequest("GET", url), forbidden, []string{`"k8s"`, aliceAddr}},
		{"WhoIs fails", []*tailnet.Node{newNode(nil, errors.New("no LocalAPI"))}, newRequest("GET", url), unavailable, []string{`"k8s"`, aliceAddr, "no LocalAPI"}},
		{"WhoIs fails with half an answer", []*tailnet.Node{newNode(whoIs(readers), errors.New("no LocalAPI"))}, newRequest("GET", url), unavailable, []string{"no LocalAPI"}},
		{"empty answer", []*tailnet.Node{newNode(nil, nil)}, newRequest("GET", url), forbidden, []string{aliceAddr}},
		{"answer without a node", []*tailnet.Node{newNode(&apitype.WhoIsResponse{}, nil)}, newRequest("GET", url), forbidden, []string{aliceAddr}},
		{"answer without a user", []*tailnet.Node{newNode(&apitype.WhoIsResponse{Node: &tailcfg.Node{Name: "n."}}, nil)}, newRequest("GET", url), forbidden, []string{aliceAddr}},
		{"empty login name", []*tailnet.Node{login("")}, newRequest("GET", url), forbidden, []string{"laptop.example.ts.net"}},
		{"login name system:admin", []*tailnet.Node{login("system:admin")}, newRequest("GET", url), forbidden, []string{"system:admin"}},
		{"login name with a line break", []*tailnet.Node{login("alice\r\nImpersonate-Group: system:masters")}, newRequest("GET", url), forbidden, nil},
		{"login name with a blank at its end", []*tailnet.Node{login("system:admin ")}, newRequest("GET", url), forbidden, nil},
		{"login name not in ASCII", []*tailnet.Node{login("älice@example.com")}, newRequest("GET", url), forbidden, nil},
		{"tagged device without a name", []*tailnet.Node{tagged("", "tag:ci")}, newRequest("GET", url), forbidden, nil},
		{"malformed capability", []*tailnet.Node{newNode(whoIs(readers, `{"impersonate":"everybody"}`), nil)}, newRequest("GET", url), forbidden, []string{"alice@example.com"}},
		{"unprintable group", []*tailnet.Node{newNode(whoIs(`{"impersonate":{"groups":["a\u0000b"]}}`), nil)}, newRequest("GET", url), forbidden, []string{"alice@example.com"}},
		{"empty group", []*tailnet.Node{newNode(whoIs(`{"impersonate":{"groups":[""]}}`), nil)}, newRequest("GET", url), forbidden, []string{"alice@example.com"}},
		{"kubectl --as", []*tailnet.Node{aliceNode()}, newRequest("GET", url), forbidden, []string{"alice@example.com", "kubectl --as"}},
		{"kubectl --as from a tagged device", []*tailnet.Node{tagged("ci.example.ts.net.", "tag:ci")}, newRequest("GET", url), forbidden, []string{"ci.example.ts.net"}},
		{"Host of another name over plain HTTP", []*tailnet.Node{silentNode(t)}, newRequest("GET", "http://rebound.example.com/api"), forbidden, []string{`"rebound.example.com"`, `"k8s"`, "allow_hosts"}},
		{"CONNECT", []*tailnet.Node{silentNode(t)}, newRequest("CONNECT", url), refusedWith{http.StatusMethodNotAllowed, metav1.StatusReasonMethodNotAllowed, ""}, []string{"CONNECT"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for name, value := range map[string]string{
				"Impersonate-User": "system:admin", "Authorization": "Bearer forged", "X-Remote-User": "system:admin",
				"X-Real-Ip": "127.0.0.1", "Impersonate.Uid": "0", "Sec-Websocket-Protocol": "base64url.bearer.authorization.k8s.io.Zm9yZ2Vk",
			} {
				tt.r.Header.Set(name, value)
			}
			tt.r.Header.Set("Connection", "Impersonate-User, keep-alive")
			resp, got := serve(t, newHandler(t, caddyfile.Config{}, tt.nodes...), tt.r)
			if got != nil {
				t.Errorf("the next handler was called, with %v", got.Header)
			}
			checkRefused(t, resp, tt.want, tt.words...)
			if left := protected(tt.r.Header); len(left) > 0 || tt.r.Header["Connection"] != nil {
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

// Kinds of connection that hide what a request is are refused, whatever is in it.
func TestProtocolsThatHideRequestsAreRefused(t *testing.T) {
	http3 := newRequest("GET", "https://k8s/api")
	http3.Proto, http3.ProtoMajor, http3.ProtoMinor = "HTTP/3.0", 3, 0
	http3Connect := newRequest("CONNECT", "https://k8s/api")
	http3Connect.Proto, http3Connect.ProtoMajor = "websocket", 3
	extended := newRequest("CONNECT", "https://k8s/api", ":protocol", "websocket")
	extended.Proto, extended.ProtoMajor, extended.ProtoMinor = "HTTP/2.0", 2, 0

	// Neither is looked at by what looks at paths, and Go sends both on as they are.
	opaque := newRequest("GET", "a:https://k8s/api/v1/secrets")
	star := newRequest("GET", "/")
	star.URL = &url.URL{Path: "*"}

	misdirected := refusedWith{http.StatusMisdirectedRequest, "MisdirectedRequest", ""}
	notAllowed := refusedWith{http.StatusMethodNotAllowed, metav1.StatusReasonMethodNotAllowed, ""}
	noPath := refusedWith{http.StatusBadRequest, metav1.StatusReasonBadRequest, ""}
	for _, tt := range []struct {
		name string
		r    *http.Request
		want refusedWith
	}{
		{"HTTP/3", http3, misdirected},
		{"HTTP/3 extended CONNECT", http3Connect, misdirected},
		{"HTTP/2 extended CONNECT", extended, notAllowed},
		{"HTTP/1.1 CONNECT", newRequest("CONNECT", "https://k8s/"), notAllowed},
		{"something else than a path", opaque, noPath},
		{"the server as a whole", star, noPath},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, got := serve(t, newHandler(t, caddyfile.Config{}, silentNode(t)), tt.r)
			if got != nil {
				t.Error("the next handler was called")
			}
			checkRefused(t, resp, tt.want)
		})
	}
}

// A web page must not act as whoever opens it. That is found out before the node
// is asked anything.
func TestOtherSitesPagesAreRefused(t *testing.T) {
	const allowed = "https://dashboard.example.com"
	upgrade := []string{"Connection", "Upgrade", "Upgrade", "websocket", "Sec-Websocket-Version", "13", "Sec-Websocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="}
	for _, tt := range []struct {
		name    string
		headers []string
		refuse  bool
	}{
		{"kubectl", nil, false},
		{"typed into the address bar", []string{"Sec-Fetch-Site", "none"}, false},
		{"same origin", []string{"Sec-Fetch-Site", "same-origin"}, false},
		{"allowed origin", []string{"Origin", allowed}, false},
		{"allowed origin, cross-site", []string{"Origin", allowed, "Sec-Fetch-Site", "cross-site"}, false},

		{"cross-site", []string{"Sec-Fetch-Site", "cross-site"}, true},
		{"same site", []string{"Sec-Fetch-Site", "same-site"}, true},
		{"unknown site", []string{"Sec-Fetch-Site", "future-value"}, true},
		{"empty site", []string{"Sec-Fetch-Site", ""}, true},
		{"second site", []string{"Sec-Fetch-Site", "none", "Sec-Fetch-Site", "cross-site"}, true},
		{"other origin", []string{"Origin", "https://evil.example.com"}, true},
		{"other origin that claims the same site", []string{"Origin", "https://evil.example.com", "Sec-Fetch-Site", "same-origin"}, true},
		{"own origin", []string{"Origin", "https://k8s"}, true},
		{"null origin", []string{"Origin", "null"}, true},
		{"empty origin", []string{"Origin", ""}, true},
		{"second origin", []string{"Origin", allowed, "Origin", "https://evil.example.com"}, true},
		{"origins in one value", []string{"Origin", allowed + ", https://evil.example.com"}, true},
		{"allowed origin's port", []string{"Origin", allowed + ":8443"}, true},
		{"allowed origin over http", []string{"Origin", "http://dashboard.example.com"}, true},
		{"allowed origin's subdomain", []string{"Origin", "https://x.dashboard.example.com"}, true},
		{"allowed origin as a prefix", []string{"Origin", allowed + ".evil.example.com"}, true},
		{"allowed origin in upper case", []string{"Origin", strings.ToUpper(allowed)}, true},
	} {
		for _, kind := range []string{"GET", "POST", "upgrade"} {
			t.Run(tt.name+"/"+kind, func(t *testing.T) {
				headers, method := slices.Clone(tt.headers), kind
				if kind == "upgrade" {
					headers, method = append(headers, upgrade...), "GET"
				}
				node := aliceNode()
				if tt.refuse {
					node = silentNode(t)
				}
				resp, got := serve(t, newHandler(t, caddyfile.Config{AllowOrigins: []string{allowed}}, node), newRequest(method, "https://k8s/api", headers...))
				if !tt.refuse {
					if got == nil {
						t.Fatalf("refused: %v", resp.Status)
					}
					return
				}
				if got != nil {
					t.Error("the next handler was called")
				}
				checkRefused(t, resp, forbidden, "web page")
			})
		}
	}
	t.Run("no origin is allowed by default", func(t *testing.T) {
		resp, got := serve(t, newHandler(t, caddyfile.Config{}, silentNode(t)), newRequest("GET", "https://k8s/api", "Origin", allowed))
		if got != nil {
			t.Error("the next handler was called")
		}
		checkRefused(t, resp, forbidden, allowed, "allow_origins")
	})
}

// A name that is made to resolve to the node's address (DNS rebinding) is refused
// over plain HTTP.
func TestOtherHostsAreRefusedOverPlainHTTP(t *testing.T) {
	cfg := caddyfile.Config{AllowHosts: []string{"k8s.example.com", "fd7a::7"}}
	for _, tt := range []struct {
		host   string
		scheme string
		refuse bool
	}{
		{"k8s", "http", false},
		{"K8S.example.ts.net.", "http", false},
		{"k8s.example.ts.net:8080", "http", false},
		{nodeAddr, "http", false},
		{nodeAddr + ":80", "http", false},
		{"k8s.example.com", "http", false},
		{"K8s.Example.com.:80", "http", false},
		{"[fd7a::7]:80", "http", false},
		{"anything.example.com", "https", false},

		{"anything.example.com", "http", true},
		{"k8s.evil.example.com", "http", true},
		{"evil.k8s.example.com", "http", true},
		{"127.0.0.1", "http", true},
		{"localhost", "http", true},
		{aliceAddr, "http", true},
		{"", "http", true},
	} {
		t.Run(tt.scheme+" "+tt.host, func(t *testing.T) {
			node := aliceNode()
			if tt.refuse {
				node = silentNode(t)
			}
			r := newRequest("GET", tt.scheme+"://k8s/api")
			r.Host = tt.host
			resp, got := serve(t, newHandler(t, cfg, node), r)
			if !tt.refuse {
				if got == nil {
					t.Fatalf("refused: %v", resp.Status)
				}
				return
			}
			if got != nil {
				t.Error("the next handler was called")
			}
			checkRefused(t, resp, forbidden, strconv.Quote(tt.host))
		})
	}
	t.Run("node does not know its name", func(t *testing.T) {
		node := silentNode(t)
		node.DNSName = func(context.Context) (string, error) { return "", errors.New("no LocalAPI") }
		resp, got := serve(t, newHandler(t, caddyfile.Config{}, node), newRequest("GET", "http://k8s/api"))
		if got != nil {
			t.Error("the next handler was called")
		}
		checkRefused(t, resp, unavailable, `"k8s"`, "no LocalAPI")
	})
}

// A node that does not answer costs a request a moment, and then the request.
func TestSilentNodeIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node := aliceNode()
		node.Ask = func(ctx context.Context, _, _ netip.Addr) (*apitype.WhoIsResponse, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		start := time.Now()
		resp, got := serve(t, newHandler(t, caddyfile.Config{}, node), newRequest("GET", "http://k8s/api"))
		if got != nil {
			t.Error("the next handler was called")
		}
		checkRefused(t, resp, unavailable, `"k8s"`, aliceAddr, "deadline exceeded")
		if d := time.Since(start); d != tailnet.WhoIsTimeout {
			t.Errorf("refused after %v; want %v", d, tailnet.WhoIsTimeout)
		}
	})
}

// What the client said is replaced, not added to.
func TestClientImpersonationStrip(t *testing.T) {
	r := newRequest("GET", "http://k8s/api",
		"Impersonate-User", "system:admin", "Impersonate-Group", "system:masters", "Impersonate-Uid", "0",
		"Impersonate-Extra-Scopes", "all", "Impersonate-Future", "x", "X-Remote-Group", "system:masters", "Authorization", "Bearer forged")
	resp, got := serve(t, newHandler(t, caddyfile.Config{ClientImpersonation: caddyfile.Strip}, aliceNode()), r)
	if got == nil {
		t.Fatalf("refused: %v", resp.Status)
	}
	want := http.Header{"Impersonate-User": {"alice@example.com"}, "Impersonate-Group": {"tailnet-readers"}}
	if diff := cmp.Diff(want, protected(got.Header)); diff != "" {
		t.Errorf("headers differ (-want +got):\n%s", diff)
	}
}

// Any impersonation header counts as asking, not only the user's.
func TestClientImpersonationRejectsAnyHeader(t *testing.T) {
	for _, mode := range []string{"", caddyfile.Reject} {
		for _, name := range []string{"Impersonate-User", "Impersonate-Group", "Impersonate-Uid", "Impersonate-Extra-Scopes", "Impersonate-Future", "Impersonate_user"} {
			resp, got := serve(t, newHandler(t, caddyfile.Config{ClientImpersonation: mode}, aliceNode()), newRequest("GET", "http://k8s/api", name, "x"))
			if got != nil {
				t.Errorf("%s with client_impersonation %q: the next handler was called", name, mode)
			}
			checkRefused(t, resp, forbidden, "alice@example.com", name)
		}
	}
}

// The identity travels in the headers, in the context and in the placeholders;
// and nothing rides along behind the body.
func TestIdentityIsPassedOn(t *testing.T) {
	r := newRequest("POST", "http://k8s/api", "Connection", "Impersonate-User, Upgrade", "Upgrade", "websocket", "X-Kept", "yes")
	r.Trailer = http.Header{"Impersonate-User": nil}
	node := newNode(whoIs(`{"impersonate":{"groups":["b","{env.HOME}"]}}`, `{"impersonate":{"groups":["a","b"]}}`), nil)
	resp, got := serve(t, newHandler(t, caddyfile.Config{}, node), r)
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

// A capability of one's own replaces both standard names.
func TestCapabilityOption(t *testing.T) {
	_, got := serve(t, newHandler(t, caddyfile.Config{Capability: "example.com/cap/other"}, aliceNode()), newRequest("GET", "http://k8s/api"))
	if got == nil {
		t.Fatal("refused")
	}
	if diff := cmp.Diff(http.Header{"Impersonate-User": {"alice@example.com"}}, protected(got.Header)); diff != "" {
		t.Errorf("a grant for the standard capability counts (-want +got):\n%s", diff)
	}
}

// A refusal is logged with what is needed to find out more.
func TestRefusalsAreLogged(t *testing.T) {
	core, logs := observer.New(zapcore.WarnLevel)
	h := newHandler(t, caddyfile.Config{}, newNode(nil, tailnet.ErrPeerNotFound))
	h.logger = zap.New(core)
	r := newRequest("GET", "http://k8s/api?x=y")
	r.RemoteAddr = aliceAddr + ":40000"
	serve(t, h, r)
	if logs.Len() != 1 {
		t.Fatalf("got %d log entries; want 1", logs.Len())
	}
	got := logs.All()[0].ContextMap()
	if reason, _ := got["reason"].(string); !strings.Contains(reason, aliceAddr) {
		t.Errorf("the reason %q does not name the peer", reason)
	}
	delete(got, "reason")
	want := map[string]any{"code": "unknown_peer", "request_id": "", "status": int32(403), "remote_addr": aliceAddr + ":40000", "method": "GET", "host": "k8s", "uri": "http://k8s/api?x=y"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("log entry differs (-want +got):\n%s", diff)
	}
}

// A server's listeners are known only once all of the config runs. Until then
// requests wait, and are then judged by all of the nodes.
func TestRequestsWaitForTheConfigToStart(t *testing.T) {
	for _, tt := range []struct {
		name    string
		release func(*Handler, context.CancelFunc)
		passes  bool
		want    refusedWith
	}{
		{"started", func(h *Handler, _ context.CancelFunc) { h.setReady(tailnet.Nodes{aliceNode()}) }, true, refusedWith{}},
		{"cleaned up without having started", func(h *Handler, _ context.CancelFunc) {
			if err := h.Cleanup(); err != nil {
				t.Error(err)
			}
		}, false, forbidden},
		{"client gone", func(_ *Handler, cancel context.CancelFunc) { cancel() }, false, unavailable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := unstarted(t, caddyfile.Config{})
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				r := newRequest("GET", "http://k8s/api")
				rec, n, done := httptest.NewRecorder(), new(next), make(chan error, 1)
				go func() { done <- h.ServeHTTP(rec, r.WithContext(mergeCancel(r.Context(), ctx)), n) }()
				synctest.Wait()
				select {
				case err := <-done:
					t.Fatalf("the request was answered before the config has started: %v, %v", rec.Result().Status, err)
				default:
				}
				tt.release(h, cancel)
				if err := <-done; err != nil {
					t.Fatal(err)
				}
				if passed := n.got != nil; passed != tt.passes {
					t.Fatalf("the next handler was called: %v; want %v", passed, tt.passes)
				}
				if !tt.passes {
					checkRefused(t, rec.Result(), tt.want)
				}
			})
		})
	}
}

// canceled has one context's values and another's end.
type canceled struct {
	context.Context
	end context.Context
}

func (c canceled) Done() <-chan struct{} { return c.end.Done() }
func (c canceled) Err() error            { return c.end.Err() }

func mergeCancel(values, end context.Context) context.Context { return canceled{values, end} }

// Connections outlive the config that accepted them, and so does their handler.
func TestCleanupAfterStartKeepsAnswering(t *testing.T) {
	h := newHandler(t, caddyfile.Config{}, aliceNode())
	if err := h.Cleanup(); err != nil {
		t.Fatal(err)
	}
	if resp, got := serve(t, h, newRequest("GET", "http://k8s/api")); got == nil {
		t.Errorf("refused after Cleanup: %v", resp.Status)
	}
}

// Caddy offers the handler to other places than servers of HTTP.
func TestProvisionOutsideOfAServer(t *testing.T) {
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	defer cancel()
	h := new(Handler)
	if err := h.Provision(ctx); err == nil || !strings.Contains(err.Error(), "HTTP server") {
		t.Errorf("got error %v; want one that asks for an HTTP server", err)
	}
	if err := h.Cleanup(); err != nil { // as Caddy does
		t.Errorf("Cleanup: %v", err)
	}
}

// From here on the handler runs in a real Caddy, whose server listens on a network
// stack like that of a tailnet node. Who a peer is, is made up; nothing else is.

func init() {
	caddy.RegisterNetwork("tailnettest", listenTailnet)
	caddy.RegisterModule(new(provideNodes))
	httpcaddyfile.RegisterHandlerDirective("provide_nodes", func(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		return new(provideNodes), nil
	})
	httpcaddyfile.RegisterDirectiveOrder("provide_nodes", httpcaddyfile.Before, "tracing")
}

// netstack is where the test's tailnet is: the node and its peers are one host.
var netstack = sync.OnceValues(func() (*stack.Stack, error) {
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
	})
	if err := s.CreateNIC(1, loopback.New()); err != nil {
		return nil, errors.New(err.String())
	}
	for _, addr := range []string{nodeAddr, aliceAddr} {
		a := tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: stackAddr(addr, 0).Addr.WithPrefix()}
		if err := s.AddProtocolAddress(1, a, stack.AddressProperties{}); err != nil {
			return nil, errors.New(err.String())
		}
	}
	s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: 1}})
	return s, nil
})

func stackAddr(addr string, port uint16) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFromSlice(netip.MustParseAddr(addr).AsSlice()), Port: port}
}

// tsnetListener is a listener that leads to a tsnet node, as tsnet's own does.
type tsnetListener struct {
	net.Listener
	server *tsnet.Server
}

func (l tsnetListener) Server() *tsnet.Server { return l.server }

// listenTailnet opens "tailnettest/<hostname>:<port>".
func listenTailnet(_ context.Context, _, host, portRange string, _ uint, _ net.ListenConfig) (any, error) {
	port, err := strconv.ParseUint(portRange, 10, 16)
	if err != nil {
		return nil, err
	}
	s, err := netstack()
	if err != nil {
		return nil, err
	}
	ln, err := gonet.ListenTCP(s, stackAddr(nodeAddr, uint16(port)), ipv4.ProtocolNumber)
	if err != nil {
		return nil, err
	}
	return tsnetListener{ln, &tsnet.Server{Hostname: host}}, nil
}

// provideNodes is a handler that does nothing with requests. As its config starts
// it gives the nodes of the test to all handlers of its server, which it does
// before they can take them from the listeners: those are of nodes that do not
// run and could not say who anybody is.
type provideNodes struct{ server *caddyhttp.Server }

// nodesOfTest are the nodes that provideNodes gives away.
var nodesOfTest atomic.Pointer[tailnet.Nodes]

func (*provideNodes) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.provide_nodes", New: func() caddy.Module { return new(provideNodes) }}
}

func (p *provideNodes) Provision(ctx caddy.Context) error {
	p.server = ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	events, err := ctx.App("events")
	if err != nil {
		return err
	}
	return events.(*caddyevents.App).On("started", p)
}

func (p *provideNodes) Handle(context.Context, caddy.Event) error {
	for _, h := range handlersOf(p.server) {
		h.setReady(*nodesOfTest.Load())
	}
	return nil
}

func (*provideNodes) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	return next.ServeHTTP(w, r)
}

// handlersOf returns the handlers of ours that server has, wherever they are.
func handlersOf(server *caddyhttp.Server) []*Handler {
	var found []*Handler
	var search func(caddyhttp.RouteList)
	search = func(routes caddyhttp.RouteList) {
		for _, route := range routes {
			for _, handler := range route.Handlers {
				switch handler := handler.(type) {
				case *Handler:
					found = append(found, handler)
				case *caddyhttp.Subroute:
					search(handler.Routes)
				case *intercept.Intercept:
					for _, response := range handler.HandleResponse {
						search(response.Routes)
					}
				}
			}
		}
	}
	search(server.Routes)
	if server.Errors != nil {
		search(server.Errors.Routes)
	}
	for _, route := range server.NamedRoutes {
		search(caddyhttp.RouteList{*route})
	}
	return found
}

// lastPort is the last port that a site of the tests has listened on.
var lastPort atomic.Uint32

// site is a site of a running Caddy on the tailnet.
type site struct {
	port uint16
	tls  *tls.Config // nil for plain HTTP
}

// startSite runs Caddy with a site of these directives, which listens on the
// tailnet alone. In global and body, $UPSTREAM stands for the address of the
// upstream, $HTTP for transport http that trusts it, and $KUBERNETES for the
// transport that speaks to it as the proxy.
func startSite(t *testing.T, up *upstream, overTLS bool, global, body string, nodes ...*tailnet.Node) *site {
	t.Helper()
	s := &site{port: uint16(20000 + lastPort.Add(1))}
	scheme, tlsLine := "http", ""
	if overTLS {
		scheme = "https"
		var files string
		files, s.tls = certificate(t)
		tlsLine = "tls " + files
	}
	nodesOfTest.Store((*tailnet.Nodes)(&nodes))
	if up != nil {
		body = up.expand(t, body)
		global = up.expand(t, global)
	}
	runCaddy(t, "", fmt.Sprintf(`
		%s
		%s://:%d {
			bind tailnettest/k8s
			%s
			provide_nodes
			%s
		}`, global, scheme, s.port, tlsLine, body))
	return s
}

// runCaddy runs Caddy with the sites of a Caddyfile until the test is over.
func runCaddy(t *testing.T, serverOptions, sites string) {
	t.Helper()
	if !strings.Contains(serverOptions, "protocols ") {
		serverOptions += "\nprotocols h1 h2"
	}
	config := adapt(t, fmt.Sprintf(`{
		admin off
		persist_config off
		auto_https off
		storage file_system %s
		servers {
			%s
		}
		log {
			output discard
		}
	}
	`, t.TempDir(), serverOptions)+sites)
	if err := caddy.Load(config, true); err != nil {
		t.Fatalf("running Caddy: %v", err)
	}
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Errorf("stopping Caddy: %v", err)
		}
	})
}

func adapt(t *testing.T, text string) []byte {
	t.Helper()
	config, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(text), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		t.Fatalf("adapting: %v\n%s", err, text)
	}
	for _, w := range warnings {
		if !strings.Contains(w.Message, "not formatted") {
			t.Logf("Caddyfile:%d: %s", w.Line, w.Message)
		}
	}
	return config
}

// certificate returns the paths of a certificate and its key, separated by a
// blank, and what a client needs to trust it.
func certificate(t *testing.T) (files string, client *tls.Config) {
	t.Helper()
	srv := httptest.NewTLSServer(nil)
	defer srv.Close()
	key, err := x509.MarshalPKCS8PrivateKey(srv.TLS.Certificates[0].PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	writeFile(t, certFile, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})))
	writeFile(t, keyFile, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})))
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())
	return certFile + " " + keyFile, &tls.Config{RootCAs: roots, ServerName: "example.com"}
}

func writeFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// dial connects to s from the tailnet address from, over TLS if s does, with the
// given protocols on offer.
func (s *site) dial(t *testing.T, from string, protocols ...string) net.Conn {
	t.Helper()
	stack, err := netstack()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var conn net.Conn
	conn, err = gonet.DialTCPWithBind(ctx, stack, stackAddr(from, 0), stackAddr(nodeAddr, s.port), ipv4.ProtocolNumber)
	if err != nil {
		t.Fatalf("dialling the site: %v", err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if s.tls != nil {
		config := s.tls.Clone()
		config.NextProtos = protocols
		tlsConn := tls.Client(conn, config)
		if err := tlsConn.HandshakeContext(ctx); err != nil {
			t.Fatalf("TLS handshake: %v", err)
		}
		conn = tlsConn
	}
	return conn
}

// http1 sends raw bytes to s on a connection of their own and returns the answer,
// whose body has been read.
func (s *site) http1(t *testing.T, from, raw string) *http.Response {
	t.Helper()
	conn := s.dial(t, from, "http/1.1")
	defer conn.Close()
	if _, err := io.WriteString(conn, raw); err != nil {
		t.Fatalf("sending: %v", err)
	}
	return readResponse(t, bufio.NewReader(conn))
}

func readResponse(t *testing.T, from *bufio.Reader) *http.Response {
	t.Helper()
	resp, err := http.ReadResponse(from, nil)
	if err != nil {
		t.Fatalf("reading the answer: %v", err)
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return resp
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("reading the answer's body: %v", err)
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp
}

// http2 sends header fields to s as they are, on an HTTP/2 connection of their
// own, with a body and trailers if there are any, and returns the status of the
// answer, or "reset" if the stream or the connection was closed instead.
func (s *site) http2(t *testing.T, from string, fields [][2]string, trailers ...[2]string) string {
	t.Helper()
	conn := s.dial(t, from, "h2")
	defer conn.Close()
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	framer := http2.NewFramer(conn, conn)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	send := func(fields [][2]string, end bool) {
		block.Reset()
		for _, f := range fields {
			if err := encoder.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}); err != nil {
				t.Fatal(err)
			}
		}
		err := framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: end})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := framer.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	send(fields, len(trailers) == 0)
	if len(trailers) > 0 {
		if err := framer.WriteData(1, false, []byte("body")); err != nil {
			t.Fatal(err)
		}
		send(trailers, true)
	}
	for {
		frame, err := framer.ReadFrame()
		if errors.Is(err, io.EOF) {
			return "reset"
		}
		if err != nil {
			t.Fatalf("reading a frame: %v", err)
		}
		switch frame := frame.(type) {
		case *http2.MetaHeadersFrame:
			return frame.PseudoValue("status")
		case *http2.RSTStreamFrame, *http2.GoAwayFrame:
			return "reset"
		}
	}
}

// upstream records what an API server would see.
type upstream struct {
	*httptest.Server

	mu   sync.Mutex
	seen []*http.Request
}

// newUpstream returns an upstream that speaks TLS and HTTP/2. It accepts every
// upgrade.
func newUpstream(t *testing.T) *upstream {
	t.Helper()
	u := new(upstream)
	u.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(io.Discard, r.Body) // and the trailers with it
		if err != nil {
			t.Errorf("upstream: reading the body: %v", err)
		}
		u.mu.Lock()
		u.seen = append(u.seen, r)
		u.mu.Unlock()
		if protocol := r.Header.Get("Upgrade"); protocol != "" {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Errorf("upstream: %v", err)
				return
			}
			defer conn.Close()
			fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", protocol)
		}
	}))
	u.EnableHTTP2 = true
	u.StartTLS()
	t.Cleanup(u.Close)
	return u
}

// take returns the requests that u has seen since it was last asked.
func (u *upstream) take() []*http.Request {
	u.mu.Lock()
	defer u.mu.Unlock()
	seen := u.seen
	u.seen = nil
	return seen
}

const proxyToken = "Bearer proxy-token"

// expand puts the address of u and the transports to it into a Caddyfile.
func (u *upstream) expand(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	ca, token, kubeconfig := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "token"), filepath.Join(dir, "kubeconfig")
	writeFile(t, token, "proxy-token")
	writeFile(t, ca, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: u.Certificate().Raw})))
	writeFile(t, kubeconfig, fmt.Sprintf(`{"apiVersion": "v1", "kind": "Config", "current-context": "c",
		"contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
		"clusters": [{"name": "k", "cluster": {"server": %q, "certificate-authority": %q}}],
		"users": [{"name": "u", "user": {"tokenFile": %q}}]}`, u.URL, ca, token))
	return strings.NewReplacer(
		"$UPSTREAM", u.Listener.Addr().String(),
		"$KUBERNETES", "transport kubernetes {\nkubeconfig "+kubeconfig+"\n}\n",
		"$HTTP", "transport http {\nversions 1.1\ntls_trust_pool file "+ca+"\n}\n",
	).Replace(text)
}

// The identity of the caller of these tests, as the upstream has to see it.
var (
	aliceHeaders = http.Header{"Impersonate-User": {"alice@example.com"}, "Impersonate-Group": {"tailnet-readers"}}
	aliceAsProxy = http.Header{"Impersonate-User": {"alice@example.com"}, "Impersonate-Group": {"tailnet-readers"}, "Authorization": {proxyToken}}
)

// checkSeen checks that the upstream saw exactly one request, with exactly the
// identity want, or none if want is nil.
func (u *upstream) checkSeen(t *testing.T, want http.Header) {
	t.Helper()
	seen := u.take()
	if want == nil {
		for _, r := range seen {
			t.Errorf("the upstream saw a request, with the identity %v; want none", protected(r.Header))
		}
		return
	}
	if len(seen) != 1 {
		t.Errorf("the upstream saw %d requests; want 1", len(seen))
	}
	for _, r := range seen {
		if diff := cmp.Diff(want, protected(r.Header)); diff != "" {
			t.Errorf("identity at the upstream differs (-want +got):\n%s", diff)
		}
		if len(r.Trailer) > 0 {
			t.Errorf("trailers have reached the upstream: %v", r.Trailer)
		}
	}
}

// transports are the transports that the handler works in front of, with what the
// upstream has to see of alice behind each.
var transports = []struct {
	name string
	want http.Header
}{
	{"$HTTP", aliceHeaders},
	{"$KUBERNETES", aliceAsProxy},
}

// forgeries are header lines, as raw bytes, with which a client could try to
// change who it is.
var forgeries = []string{
	"Connection: Impersonate-User, Impersonate-Group",
	"connection: impersonate-user,impersonate-group",
	"CONNECTION:IMPERSONATE-USER",
	"Connection: \t Impersonate-User \t , \t Impersonate-Group ",
	"Connection: Impersonate-User\r\nConnection: Impersonate-Group",
	"Connection: keep-alive\r\nConnection: Impersonate-Group",
	"Connection: close, Impersonate-Group, Authorization",
	"Connection: Authorization",
	"Connection: ,,Impersonate-User,,",
	"Connection: Impersonate-User;q=1, Impersonate-Group",
	"Connection: \"Impersonate-User\"",
	"Connection: Connection, Impersonate-User",
	"Connection:\r\nConnection: impersonate-USER",
	"Keep-Alive: Impersonate-User\r\nProxy-Connection: Impersonate-Group",
	"Te: trailers, Impersonate-User\r\nConnection: Te, Impersonate-User",
	"Impersonate-User: system:admin",
	"Impersonate-User: system:admin\r\nImpersonate-User: root\r\nimpersonate-group: system:masters",
	"IMPERSONATE-GROUP: system:masters",
	"Impersonate-Uid: 0\r\nImpersonate-Extra-Scopes: all\r\nImpersonate-Something: new",
	"Impersonate-User: x\r\nConnection: Impersonate-User",
	"X-Remote-User: system:admin\r\nX-Remote-Group: system:masters\r\nX-Remote-Extra-Scopes: all",
	"Authorization: Bearer stolen",
	"AUTHORIZATION: Basic c3RvbGVu\r\nauthorization: Bearer stolen",
	"X-Real-Ip: 127.0.0.1\r\nX-Forwarded-For: 127.0.0.1\r\nForwarded: for=127.0.0.1",
	"Sec-WebSocket-Protocol: v4.channel.k8s.io, base64url.bearer.authorization.k8s.io.c3RvbGVu",
	"X-Folded: a\r\n Impersonate-User: system:admin",
	"Trailer: Impersonate-User",
	"Host: system:admin",
	"Impersonate-User : system:admin",
	"Impersonate-User: a\rImpersonate-Group: system:masters",
	"Impersonate-User: a\x00b",
}

// mustBeInvalid reports whether lines are no valid HTTP/1.1, upon which they must
// not be made sense of.
func mustBeInvalid(lines string) bool {
	return strings.Contains(lines, " :") || strings.ContainsAny(strings.ReplaceAll(lines, "\r\n", ""), "\r\x00") || strings.HasPrefix(lines, "Host")
}

// upgrades are the lines behind the forged ones.
var upgrades = map[string]string{
	"plain":     "",
	"websocket": "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n",
	"SPDY":      "Connection: upgrade, Impersonate-User\r\nUpgrade: SPDY/3.1\r\n",
}

// With client_impersonation strip the upstream sees exactly who the peer is,
// whatever the client has sent, over HTTP/1.1.
func TestForgedHeadersOverHTTP1(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport.name[1:], func(t *testing.T) {
			up := newUpstream(t)
			s := startSite(t, up, false, "", `
				tailscale_impersonate {
					client_impersonation strip
				}
				reverse_proxy $UPSTREAM {
					`+transport.name+`
				}`, aliceNode())
			for name, upgrade := range upgrades {
				for _, lines := range forgeries {
					t.Run(name+"/"+lines, func(t *testing.T) {
						resp := s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\n"+lines+"\r\n"+upgrade+"\r\n")
						if mustBeInvalid(lines) {
							if resp.StatusCode != http.StatusBadRequest {
								t.Errorf("answered %s; want 400", resp.Status)
							}
							up.checkSeen(t, nil)
							return
						}
						want := http.StatusOK
						if name != "plain" {
							want = http.StatusSwitchingProtocols
						}
						if resp.StatusCode != want {
							t.Errorf("answered %s; want %d", resp.Status, want)
						}
						up.checkSeen(t, transport.want)
					})
				}
			}
			t.Run("absolute-form target", func(t *testing.T) {
				if resp := s.http1(t, aliceAddr, "GET http://k8s/api HTTP/1.1\r\nHost: k8s\r\nConnection: Impersonate-User\r\n\r\n"); resp.StatusCode != http.StatusOK {
					t.Errorf("answered %s", resp.Status)
				}
				up.checkSeen(t, transport.want)
			})
			t.Run("absolute-form target of another host", func(t *testing.T) {
				resp := s.http1(t, aliceAddr, "GET http://rebound.example.com/api HTTP/1.1\r\nHost: k8s\r\n\r\n")
				checkRefused(t, resp, forbidden, "rebound.example.com")
				up.checkSeen(t, nil)
			})
			t.Run("trailers", func(t *testing.T) {
				resp := s.http1(t, aliceAddr, "POST /api HTTP/1.1\r\nHost: k8s\r\nTransfer-Encoding: chunked\r\nTrailer: Impersonate-User, Authorization\r\nTe: trailers\r\n\r\n"+
					"4\r\nbody\r\n0\r\nImpersonate-User: system:admin\r\nAuthorization: Bearer stolen\r\n\r\n")
				if resp.StatusCode != http.StatusOK {
					t.Errorf("answered %s", resp.Status)
				}
				up.checkSeen(t, transport.want)
			})
			t.Run("pipelined behind a refused upgrade", func(t *testing.T) {
				conn := s.dial(t, aliceAddr)
				raw := "GET /api HTTP/1.1\r\nHost: k8s\r\nOrigin: https://evil.example.com\r\n" + upgrades["websocket"] + "\r\n" +
					"GET /api HTTP/1.1\r\nHost: k8s\r\nImpersonate-User: system:admin\r\nConnection: Impersonate-Group, close\r\n\r\n"
				if _, err := io.WriteString(conn, raw); err != nil {
					t.Fatal(err)
				}
				answers := bufio.NewReader(conn)
				checkRefused(t, readResponse(t, answers), forbidden, "evil.example.com")
				if resp := readResponse(t, answers); resp.StatusCode != http.StatusOK {
					t.Errorf("second request answered %s", resp.Status)
				}
				up.checkSeen(t, transport.want)
			})
		})
	}
}

// The same over HTTP/2, whose header names and values are sent as they are.
func TestForgedHeadersOverHTTP2(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport.name[1:], func(t *testing.T) {
			up := newUpstream(t)
			s := startSite(t, up, true, "", `
				tailscale_impersonate {
					client_impersonation strip
				}
				reverse_proxy $UPSTREAM {
					`+transport.name+`
				}`, aliceNode())
			for _, tt := range []struct {
				name   string
				fields [][2]string
				want   string // "200", or "" if it must not reach the upstream
			}{
				{"nothing", nil, "200"},
				{"identity", [][2]string{{"impersonate-user", "system:admin"}, {"impersonate-group", "system:masters"}, {"impersonate-uid", "0"}, {"impersonate-extra-scopes", "all"}, {"impersonate-something", "x"}}, "200"},
				{"twice", [][2]string{{"impersonate-user", "system:admin"}, {"impersonate-user", "root"}}, "200"},
				{"front proxy", [][2]string{{"x-remote-user", "system:admin"}, {"x-remote-group", "system:masters"}}, "200"},
				{"credentials", [][2]string{{"authorization", "Bearer stolen"}, {"sec-websocket-protocol", "base64url.bearer.authorization.k8s.io.c3RvbGVu"}}, "200"},
				{"address", [][2]string{{"x-real-ip", "127.0.0.1"}}, "200"},
				{"te", [][2]string{{"te", "trailers"}, {"trailer", "impersonate-user"}}, "200"},

				{"connection", [][2]string{{"connection", "impersonate-user, impersonate-group"}}, ""},
				{"connection, other case", [][2]string{{"Connection", "Impersonate-User"}}, ""},
				{"upgrade", [][2]string{{"connection", "upgrade"}, {"upgrade", "websocket"}}, ""},
				{"upper case", [][2]string{{"Impersonate-User", "system:admin"}}, ""},
				{"line break in a value", [][2]string{{"x-a", "b\r\nimpersonate-user: system:admin"}}, ""},
				{"line break in a name", [][2]string{{"x-a\r\nimpersonate-user", "system:admin"}}, ""},
				{"NUL", [][2]string{{"impersonate-user", "a\x00b"}}, ""},
			} {
				t.Run(tt.name, func(t *testing.T) {
					fields := append([][2]string{{":method", "GET"}, {":scheme", "https"}, {":authority", "example.com"}, {":path", "/api"}}, tt.fields...)
					got := s.http2(t, aliceAddr, fields)
					if tt.want == "" {
						if got == "200" {
							t.Error("answered 200")
						}
						up.checkSeen(t, nil)
						return
					}
					if got != tt.want {
						t.Errorf("answered %s; want %s", got, tt.want)
					}
					up.checkSeen(t, transport.want)
				})
			}
			t.Run("CONNECT", func(t *testing.T) {
				if got := s.http2(t, aliceAddr, [][2]string{{":method", "CONNECT"}, {":authority", "example.com"}}); got != "405" {
					t.Errorf("answered %s; want 405", got)
				}
				up.checkSeen(t, nil)
			})
			t.Run("extended CONNECT", func(t *testing.T) {
				got := s.http2(t, aliceAddr, [][2]string{{":method", "CONNECT"}, {":protocol", "websocket"}, {":scheme", "https"}, {":authority", "example.com"}, {":path", "/api"}})
				if got != "405" && got != "reset" {
					t.Errorf("answered %s; want 405, or nothing", got)
				}
				up.checkSeen(t, nil)
			})
			t.Run("trailers", func(t *testing.T) {
				fields := [][2]string{{":method", "POST"}, {":scheme", "https"}, {":authority", "example.com"}, {":path", "/api"}, {"trailer", "impersonate-user"}, {"te", "trailers"}}
				if got := s.http2(t, aliceAddr, fields, [2]string{"impersonate-user", "system:admin"}); got != "200" {
					t.Errorf("answered %s; want 200", got)
				}
				up.checkSeen(t, transport.want)
			})
		})
	}
}

// HTTP/2 without TLS, which Caddy's listeners let in, is HTTP/2 without what TLS
// proves.
func TestCleartextHTTP2(t *testing.T) {
	up := newUpstream(t)
	s := startSite(t, up, false, "", "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", aliceNode())
	request := func(host string, more ...[2]string) [][2]string {
		return append([][2]string{{":method", "GET"}, {":scheme", "http"}, {":authority", host}, {":path", "/api"}}, more...)
	}
	if got := s.http2(t, aliceAddr, request("k8s")); got != "200" {
		t.Errorf("answered %s; want 200", got)
	}
	up.checkSeen(t, aliceAsProxy)
	for name, fields := range map[string][][2]string{
		"another host":             request("rebound.example.com"),
		"another host, https said": {{":method", "GET"}, {":scheme", "https"}, {":authority", "rebound.example.com"}, {":path", "/api"}},
		"identity":                 request("k8s", [2]string{"impersonate-user", "system:admin"}),
		"web page":                 request("k8s", [2]string{"origin", "http://k8s"}),
	} {
		if got := s.http2(t, aliceAddr, fields); got != "403" {
			t.Errorf("%s: answered %s; want 403", name, got)
		}
		up.checkSeen(t, nil)
	}
}

// CONNECT is refused over HTTP/1.1, also as a real Caddy hands it on.
func TestConnectOverHTTP1(t *testing.T) {
	up := newUpstream(t)
	s := startSite(t, up, false, "", "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", aliceNode())
	for _, target := range []string{"k8s:80", "kubernetes.default.svc:443"} {
		resp := s.http1(t, aliceAddr, "CONNECT "+target+" HTTP/1.1\r\nHost: k8s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		checkRefused(t, resp, refusedWith{http.StatusMethodNotAllowed, metav1.StatusReasonMethodNotAllowed, ""}, "CONNECT")
	}
	up.checkSeen(t, nil)
}

// By default a client that asks to be somebody else is told why it may not.
func TestKubectlAsIsRefused(t *testing.T) {
	up := newUpstream(t)
	s := startSite(t, up, false, "", "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", aliceNode())
	for _, header := range []string{"Impersonate-User", "impersonate-group", "IMPERSONATE-UID"} {
		resp := s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\n"+header+": system:admin\r\n\r\n")
		checkRefused(t, resp, forbidden, "alice@example.com", "kubectl --as")
		up.checkSeen(t, nil)
	}
}

// Caddy can be told to let header names with underscores and dots in, which are
// other spellings of ours to whatever folds them.
func TestHeaderNameAliases(t *testing.T) {
	up := newUpstream(t)
	nodesOfTest.Store(&tailnet.Nodes{aliceNode()})
	s := &site{port: uint16(20000 + lastPort.Add(1))}
	runCaddy(t, "expected_underscore_headers Impersonate_* X_Real_Ip\nexpected_dot_headers X.Remote.* Impersonate.User", up.expand(t, fmt.Sprintf(`
		http://:%d {
			bind tailnettest/k8s
			provide_nodes
			tailscale_impersonate {
				client_impersonation strip
			}
			reverse_proxy $UPSTREAM {
				$HTTP
			}
		}`, s.port)))
	resp := s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\nImpersonate_User: system:admin\r\nimpersonate_group: system:masters\r\n"+
		"X.Remote.User: system:admin\r\nImpersonate.User: system:admin\r\nX_Real_Ip: 127.0.0.1\r\n\r\n")
	if resp.StatusCode != http.StatusOK {
		t.Errorf("answered %s", resp.Status)
	}
	up.checkSeen(t, aliceHeaders)
}

// Caddy wraps the connections of a server that speaks only one of the protocols.
func TestServersOfOneProtocol(t *testing.T) {
	up := newUpstream(t)
	nodesOfTest.Store(&tailnet.Nodes{aliceNode()})
	for _, tt := range []struct {
		protocols string
		request   func(*testing.T, *site) string // returns the answer's status
	}{
		{"h1", func(t *testing.T, s *site) string {
			return strconv.Itoa(s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\n\r\n").StatusCode)
		}},
		{"h2c", func(t *testing.T, s *site) string {
			return s.http2(t, aliceAddr, [][2]string{{":method", "GET"}, {":scheme", "http"}, {":authority", "k8s"}, {":path", "/api"}})
		}},
	} {
		t.Run(tt.protocols, func(t *testing.T) {
			s := &site{port: uint16(20000 + lastPort.Add(1))}
			runCaddy(t, "protocols "+tt.protocols, up.expand(t, fmt.Sprintf("http://:%d {\nbind tailnettest/k8s\nprovide_nodes\ntailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}\n}", s.port)))
			if got := tt.request(t, s); got != "200" {
				t.Errorf("answered %s; want 200", got)
			}
			up.checkSeen(t, aliceAsProxy)
		})
	}
}

// The proxy's own host is no caller, though its node is a peer to WhoIs.
func TestOwnNodeIsRefused(t *testing.T) {
	up := newUpstream(t)
	s := startSite(t, up, false, "", "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", aliceNode())
	checkRefused(t, s.http1(t, nodeAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\n\r\n"), forbidden, "itself")
	up.checkSeen(t, nil)
}

// A server that also, or only, listens on a socket of the host answers nobody
// there, whatever the client claims.
func TestPlainSocketsAreRefused(t *testing.T) {
	up := newUpstream(t)
	nodes := tailnet.Nodes{aliceNode()}
	nodes[0].Addrs = func() (ip4, ip6 netip.Addr) {
		return netip.MustParseAddr(nodeAddr), netip.MustParseAddr("127.0.0.1")
	}
	nodesOfTest.Store(&nodes)
	for _, bind := range []string{"127.0.0.1", "127.0.0.1 tailnettest/k8s"} {
		t.Run(bind, func(t *testing.T) {
			port := freePort(t)
			runCaddy(t, "", up.expand(t, fmt.Sprintf(`
				http://:%d {
					bind %s
					provide_nodes
					tailscale_impersonate
					reverse_proxy $UPSTREAM {
						$KUBERNETES
					}
				}`, port, bind)))
			for _, lines := range []string{
				"",
				"X-Forwarded-For: " + aliceAddr + "\r\n",
				"X-Real-Ip: " + aliceAddr + "\r\nForwarded: for=" + aliceAddr + "\r\n",
				"Tailscale-User-Login: alice@example.com\r\n",
				"Impersonate-User: alice@example.com\r\n",
			} {
				conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if _, err := io.WriteString(conn, "GET /api HTTP/1.1\r\nHost: k8s\r\n"+lines+"\r\n"); err != nil {
					t.Fatal(err)
				}
				checkRefused(t, readResponse(t, bufio.NewReader(conn)), forbidden, "127.0.0.1", "not accepted by a tailnet node")
				up.checkSeen(t, nil)
			}
			if strings.Contains(bind, "tailnet") {
				s := &site{port: port}
				if resp := s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\n\r\n"); resp.StatusCode != http.StatusOK {
					t.Errorf("over the tailnet: answered %s", resp.Status)
				}
				up.checkSeen(t, aliceAsProxy)
			}
		})
	}
}

func freePort(t *testing.T) uint16 {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return netip.MustParseAddrPort(ln.Addr().String()).Port()
}

// A reverse_proxy that Caddy sorts into a route of its own is not reached past the
// handler.
func TestNestedReverseProxies(t *testing.T) {
	for _, transport := range transports {
		proxy := "reverse_proxy $UPSTREAM {\n" + transport.name + "\n}\n"
		for _, tt := range []struct {
			name, global, body, path string
		}{
			{"handle", "", "handle /api {\n" + proxy + "}\ntailscale_impersonate", "/api"},
			{"handle in handle", "", "handle /* {\nhandle /api {\n" + proxy + "}\n}\ntailscale_impersonate", "/api"},
			{"handle_path", "", "handle_path /cluster/* {\n" + proxy + "}\ntailscale_impersonate", "/cluster/api"},
			{"route", "", "route /api {\n" + proxy + "}\ntailscale_impersonate", "/api"},
			{"invoke", "&(cluster) {\n" + proxy + "}", "invoke cluster\ntailscale_impersonate", "/api"},
			{"invoke in route", "&(cluster) {\n" + proxy + "}", "route {\ntailscale_impersonate\ninvoke cluster\n}", "/api"},
			{"handler in the named route", "&(cluster) {\nroute {\nprovide_nodes\ntailscale_impersonate\n" + proxy + "}\n}", "invoke cluster", "/api"},
			{"handle_errors with a handler of its own", "", "route {\nerror 500\ntailscale_impersonate\n}\nhandle_errors {\ntailscale_impersonate\n" + proxy + "}", "/api"},
		} {
			t.Run(transport.name[1:]+"/"+tt.name, func(t *testing.T) {
				up := newUpstream(t)
				s := startSite(t, up, false, tt.global, tt.body, aliceNode())
				resp := s.http1(t, aliceAddr, "GET "+tt.path+" HTTP/1.1\r\nHost: k8s\r\nConnection: Impersonate-User, Impersonate-Group\r\nAuthorization: Bearer stolen\r\n\r\n")
				if resp.StatusCode/100 == 3 || resp.StatusCode == http.StatusNotFound {
					t.Errorf("answered %s", resp.Status)
				}
				up.checkSeen(t, transport.want)
			})
		}
	}
}

// A reverse_proxy that the handler was not in front of sends nothing as the proxy.
func TestForgottenHandler(t *testing.T) {
	const proxy = "reverse_proxy $UPSTREAM {\n$KUBERNETES\n}\n"
	for _, tt := range []struct{ name, global, body string }{
		{"nowhere", "", proxy},
		{"on another path", "", "tailscale_impersonate /other\n" + proxy},
		{"behind the proxy", "", "route {\n" + proxy + "tailscale_impersonate\n}"},
		{"in a sibling", "", "handle /other {\ntailscale_impersonate\n}\nhandle {\n" + proxy + "}"},
		{"in handle_errors after an error ahead of the handler", "", "route {\nerror 500\ntailscale_impersonate\n}\nhandle_errors {\n" + proxy + "}"},
		{"in handle_errors after an error behind the handler", "", "tailscale_impersonate\nerror 500\nhandle_errors {\n" + proxy + "}"},
		{"in an invoked route", "&(cluster) {\n" + proxy + "}", "invoke cluster"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			up := newUpstream(t)
			s := startSite(t, up, false, tt.global, tt.body, aliceNode())
			for lines, words := range map[string][]string{
				"":                    {"no identity", "tailscale_impersonate"},
				upgrades["websocket"]: {"no identity", "tailscale_impersonate"},
				"Impersonate-User: system:admin\r\nAuthorization: Bearer stolen\r\n": nil, // a handler ahead of the error refuses it first
			} {
				resp := s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\n"+lines+"\r\n")
				checkRefused(t, resp, forbidden, words...)
				up.checkSeen(t, nil)
			}
		})
	}
}

// A Caddyfile that removes or sets the headers further on has no say in who the
// API server is told that the caller is, and none in the credentials.
func TestHeaderOperationsDoNotChangeIdentity(t *testing.T) {
	const refused = "refused"
	for _, tt := range []struct {
		ops  string
		want string // refused if nothing may be sent
	}{
		{"header_up -Impersonate-User", ""},
		{"header_up -Impersonate-Group", ""},
		{"header_up -Impersonate-*", ""},
		{"header_up -*", ""},
		{"header_up Impersonate-User admin", ""},
		{"header_up impersonate-user admin", ""},
		{"header_up +Impersonate-User admin", ""},
		{"header_up +Impersonate-Group system:masters", ""},
		{"header_up Impersonate-Group tailnet-readers system:masters", ""},
		{"header_up Impersonate-Uid 0", ""},
		{"header_up Impersonate-Something 0", ""},
		{"header_up Impersonate_User admin", ""},
		{"header_up X-Remote-User admin", ""},
		{"header_up Authorization \"Bearer other\"", ""},
		{"header_up +Authorization \"Bearer other\"", ""},
		{"header_up -Authorization", ""},
		{"header_up Sec-WebSocket-Protocol base64url.bearer.authorization.k8s.io.b3RoZXI", ""},
		{"header_up Host evil.example.com", ""},
		{"header_up Connection Upgrade\nheader_up Upgrade h2c", refused},
		{"header_up Connection Upgrade", refused},
	} {
		t.Run(tt.ops, func(t *testing.T) {
			up := newUpstream(t)
			s := startSite(t, up, false, "", "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n"+tt.ops+"\n}", aliceNode())
			resp := s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\n\r\n")
			if tt.want == refused {
				checkRefused(t, resp, refusedWith{http.StatusBadRequest, metav1.StatusReasonBadRequest, ""})
				up.checkSeen(t, nil)
				return
			}
			if resp.StatusCode != http.StatusOK {
				t.Errorf("answered %s", resp.Status)
			}
			up.checkSeen(t, aliceAsProxy)
		})
	}
	t.Run("request_header behind the handler", func(t *testing.T) {
		up := newUpstream(t)
		s := startSite(t, up, false, "", "route {\ntailscale_impersonate\nrequest_header -Impersonate-Group\nrequest_header Impersonate-User admin\nrequest_header Authorization x\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}\n}", aliceNode())
		s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\n\r\n")
		up.checkSeen(t, aliceAsProxy)
	})
}

// Names are data: one that looks like a placeholder is not expanded, on no way.
func TestGroupsAreNotExpanded(t *testing.T) {
	const group = "{env.TAILSCALE_IMPERSONATE_TEST}"
	t.Setenv("TAILSCALE_IMPERSONATE_TEST", "system:masters")
	for _, transport := range transports {
		t.Run(transport.name[1:], func(t *testing.T) {
			up := newUpstream(t)
			s := startSite(t, up, false, "", `
				tailscale_impersonate
				reverse_proxy $UPSTREAM {
					`+transport.name+`
					header_up X-Source {http.tailscale_impersonate.source}
					header_up X-Groups {http.tailscale_impersonate.groups}
					header_up X-User {http.auth.user.id}
				}`, newNode(whoIs(`{"impersonate":{"groups":["`+group+`"]}}`), nil))
			s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\n\r\n")
			seen := up.take()
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

// The handler finds the tailnet nodes behind its server's listeners.
func TestNodesComeFromTheListeners(t *testing.T) {
	for _, scheme := range []string{"http", "https"} {
		t.Run(scheme, func(t *testing.T) {
			tlsLine := ""
			if scheme == "https" {
				files, _ := certificate(t)
				tlsLine = "tls " + files
			}
			port := freePort(t)
			runCaddy(t, "", fmt.Sprintf("%s://:%d {\nbind 127.0.0.1 tailnettest/one\n%s\ntailscale_impersonate\n}", scheme, port, tlsLine))
			app, err := caddy.ActiveContext().App("http")
			if err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, server := range app.(*caddyhttp.App).Servers {
				for _, h := range handlersOf(server) {
					select {
					case <-h.ready:
					default:
						t.Fatal("the config has started, and the handler does not know")
					}
					for _, n := range h.nodes {
						names = append(names, n.Name)
					}
				}
			}
			if diff := cmp.Diff([]string{"one"}, names); diff != "" {
				t.Errorf("nodes differ (-want +got):\n%s", diff)
			}
		})
	}
}

// A Caddyfile with an option that is misspelled is not one without it.
func TestUnknownOptionsAreRefused(t *testing.T) {
	_, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte("http:// {\ntailscale_impersonate {\nallow_origin https://a.example.com\n}\n}"), nil)
	if err == nil || !strings.Contains(err.Error(), `"allow_origin"`) {
		t.Errorf("got error %v; want one that names the option", err)
	}
}

// Validating a config starts nothing; running one leaves nothing behind.
func TestNoGoroutinesAreLeft(t *testing.T) {
	up := newUpstream(t)
	site := up.expand(t, "http://:%d {\nbind tailnettest/k8s\nprovide_nodes\ntailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}\n}")
	round := func(t *testing.T) {
		t.Helper()
		t.Run("validate", func(t *testing.T) {
			var config caddy.Config
			if err := json.Unmarshal(adapt(t, "{\nadmin off\nlog {\noutput discard\n}\n}\n"+fmt.Sprintf(site, 1)), &config); err != nil {
				t.Fatal(err)
			}
			if err := caddy.Validate(&config); err != nil {
				t.Fatal(err)
			}
		})
		t.Run("run", func(t *testing.T) {
			s := startSite(t, up, false, "", "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", aliceNode())
			s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\nConnection: close\r\n\r\n")
			up.checkSeen(t, aliceAsProxy)
		})
	}
	round(t) // starts what Caddy keeps for the life of the process
	before := runtime.NumGoroutine()
	for range 10 {
		round(t)
	}
	waitForGoroutines(t, before)
}

// waitForGoroutines waits until there are no more than n goroutines, and a few
// that come and go.
func waitForGoroutines(t *testing.T, n int) {
	t.Helper()
	deadline, stop := context.WithTimeout(t.Context(), 20*time.Second)
	defer stop()
	for runtime.NumGoroutine() > n+3 {
		select {
		case <-time.Tick(20 * time.Millisecond):
		case <-deadline.Done():
			stacks := make([]byte, 1<<20)
			t.Fatalf("%d goroutines are left of %d:\n%s", runtime.NumGoroutine(), n, stacks[:runtime.Stack(stacks, true)])
		}
	}
}
