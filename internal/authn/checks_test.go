// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

func TestAuthenticate_UnsupportedProtocolIsRefused(t *testing.T) {
	http3 := proxytest.NewRequest("GET", "https://k8s/api")
	http3.Proto, http3.ProtoMajor, http3.ProtoMinor = "HTTP/3.0", 3, 0
	http3Connect := proxytest.NewRequest("CONNECT", "https://k8s/api")
	http3Connect.Proto, http3Connect.ProtoMajor = "websocket", 3
	extended := proxytest.NewRequest("CONNECT", "https://k8s/api", ":protocol", "websocket")
	extended.Proto, extended.ProtoMajor, extended.ProtoMinor = "HTTP/2.0", 2, 0

	// Checks of the path do not see these, and Go forwards both as they are.
	opaque := proxytest.NewRequest("GET", "a:https://k8s/api/v1/secrets")
	star := proxytest.NewRequest("GET", "/")
	star.URL = &url.URL{Path: "*"}

	misdirected := proxytest.Misdirected
	notAllowed := proxytest.MethodNotAllowed
	noPath := proxytest.BadRequest
	for _, tt := range []struct {
		name string
		r    *http.Request
		want proxytest.Refusal
	}{
		{"HTTP/3", http3, misdirected},
		{"HTTP/3 extended CONNECT", http3Connect, misdirected},
		{"HTTP/2 extended CONNECT", extended, notAllowed},
		{"HTTP/1.1 CONNECT", proxytest.NewRequest("CONNECT", "https://k8s/"), notAllowed},
		{"opaque URL", opaque, noPath},
		{"asterisk form", star, noPath},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, got := proxytest.Serve(t, newServer(t, Options{}, proxytest.SilentNode(t)), tt.r)
			if got != nil {
				t.Error("the next handler was called")
			}
			proxytest.CheckRefused(t, resp, tt.want)
		})
	}
}

// A web page must not act as the user who opens it. The request is refused before the
// node is asked.
func TestAuthenticate_OtherOriginIsRefused(t *testing.T) {
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
				node := proxytest.AliceNode()
				if tt.refuse {
					node = proxytest.SilentNode(t)
				}
				resp, got := proxytest.Serve(t, newServer(t, Options{AllowOrigins: []string{allowed}}, node), proxytest.NewRequest(method, "https://k8s/api", headers...))
				if !tt.refuse {
					if got == nil {
						t.Fatalf("refused: %v", resp.Status)
					}
					return
				}
				if got != nil {
					t.Error("the next handler was called")
				}
				proxytest.CheckRefused(t, resp, proxytest.Forbidden, "web page")
			})
		}
	}
	t.Run("no origin is allowed by default", func(t *testing.T) {
		resp, got := proxytest.Serve(t, newServer(t, Options{}, proxytest.SilentNode(t)), proxytest.NewRequest("GET", "https://k8s/api", "Origin", allowed))
		if got != nil {
			t.Error("the next handler was called")
		}
		proxytest.CheckRefused(t, resp, proxytest.Forbidden, allowed, "allow_origins")
	})
}

// Over plain HTTP, a name that an attacker makes resolve to the node's address (DNS
// rebinding) is refused.
func TestAuthenticate_OtherHostOverPlainHTTPIsRefused(t *testing.T) {
	cfg := Options{AllowHosts: []string{"k8s.example.com", "fd7a::7"}}
	for _, tt := range []struct {
		host   string
		scheme string
		refuse bool
	}{
		{"k8s", "http", false},
		{"K8S.example.ts.net.", "http", false},
		{"k8s.example.ts.net:8080", "http", false},
		{proxytest.NodeAddr, "http", false},
		{proxytest.NodeAddr + ":80", "http", false},
		{"k8s.example.com", "http", false},
		{"K8s.Example.com.:80", "http", false},
		{"[fd7a::7]:80", "http", false},
		{"anything.example.com", "https", false},

		{"anything.example.com", "http", true},
		{"k8s.evil.example.com", "http", true},
		{"evil.k8s.example.com", "http", true},
		{"127.0.0.1", "http", true},
		{"localhost", "http", true},
		{proxytest.AliceAddr, "http", true},
		{"", "http", true},
	} {
		t.Run(tt.scheme+" "+tt.host, func(t *testing.T) {
			node := proxytest.AliceNode()
			if tt.refuse {
				node = proxytest.SilentNode(t)
			}
			r := proxytest.NewRequest("GET", tt.scheme+"://k8s/api")
			r.Host = tt.host
			resp, got := proxytest.Serve(t, newServer(t, cfg, node), r)
			if !tt.refuse {
				if got == nil {
					t.Fatalf("refused: %v", resp.Status)
				}
				return
			}
			if got != nil {
				t.Error("the next handler was called")
			}
			proxytest.CheckRefused(t, resp, proxytest.Forbidden, strconv.Quote(tt.host))
		})
	}
	t.Run("node does not know its name", func(t *testing.T) {
		node := proxytest.SilentNode(t)
		node.DNSName = func(context.Context) (string, error) { return "", errors.New("no LocalAPI") }
		resp, got := proxytest.Serve(t, newServer(t, Options{}, node), proxytest.NewRequest("GET", "http://k8s/api"))
		if got != nil {
			t.Error("the next handler was called")
		}
		proxytest.CheckRefused(t, resp, proxytest.TryAgain, `"k8s"`, "no LocalAPI")
	})
}
