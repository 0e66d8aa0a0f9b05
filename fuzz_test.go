// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"bufio"
	"context"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// FuzzRequest has the handler answer every request that net/http can parse. It must not
// panic, and must pass on the request as alice or not at all.
func FuzzRequest(f *testing.F) {
	for _, request := range []string{
		"GET /api/v1/namespaces/default/pods HTTP/1.1\r\nHost: k8s\r\n\r\n",
		"GET //api/./v1/%2e%2e/secrets%2Fname HTTP/1.1\r\nHost: k8s.example.ts.net:80\r\n\r\n",
		"GET http://[fd7a::1%25lo]:80/ HTTP/1.1\r\nHost: [::1\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nHost: k8s\r\n\r\n",
		"CONNECT k8s:443 HTTP/1.1\r\nHost: k8s:443\r\n\r\n",
		"POST /api?x=%zz HTTP/1.0\r\nHost: 100.64.0.1\r\nOrigin: null\r\nContent-Length: 1\r\n\r\nx",
		"GET /api HTTP/1.1\r\nHost: K8S.\r\nSec-Fetch-Site: cross-site\r\nConnection: Impersonate-User, upgrade\r\nImpersonate_User: x\r\n\r\n",
	} {
		f.Add(request)
	}
	h := newHandler(f, caddyfile.Config{ClientImpersonation: caddyfile.Strip, AllowOrigins: []string{"https://dashboard.example.com"}}, proxytest.AliceNode())
	conn := tailnet.WithConn(context.Background(), netip.MustParseAddrPort(proxytest.AliceAddr+":1"), netip.MustParseAddr(proxytest.NodeAddr))
	f.Fuzz(func(t *testing.T, raw string) {
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(raw)))
		if err != nil {
			return
		}
		rec := httptest.NewRecorder()
		r = caddyhttp.PrepareRequest(r.WithContext(conn), caddy.NewReplacer(), rec, nil)
		var n proxytest.Next
		if err := h.ServeHTTP(rec, r, &n); err != nil {
			t.Fatalf("%q: %v", raw, err)
		}
		if n.Got == nil {
			if rec.Code < 400 {
				t.Errorf("%q: answered %d without having been passed on", raw, rec.Code)
			}
			return
		}
		got := proxytest.Protected(n.Got.Header)
		if user, groups := got["Impersonate-User"], got["Impersonate-Group"]; len(got) != 2 ||
			!slices.Equal(user, []string{"alice@example.com"}) || !slices.Equal(groups, []string{"tailnet-readers"}) {
			t.Errorf("%q: passed on as %v", raw, got)
		}
		if left := proxytest.Protected(r.Header); len(left) > 0 {
			t.Errorf("%q: %v is left for handle_errors", raw, left)
		}
	})
}
