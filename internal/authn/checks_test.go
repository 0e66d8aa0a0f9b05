// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"strconv"
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
		proxytest.CheckRefused(t, resp, proxytest.TryAgain, `"k8s"`)
	})
}
