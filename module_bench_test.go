// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"maps"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
)

// BenchmarkServeHTTP is what the handler adds to a request, apart from what the
// tailnet node needs to say who the peer is.
func BenchmarkServeHTTP(b *testing.B) {
	h := newHandler(b, caddyfile.Config{}, aliceNode())
	for name, headers := range map[string]http.Header{
		"kubectl": {"User-Agent": {"kubectl"}, "Accept": {"application/json"}, "Accept-Encoding": {"gzip"}, "Kubectl-Command": {"kubectl get"}},
		"upgrade": {"User-Agent": {"kubectl"}, "Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Protocol": {"v5.channel.k8s.io"}, "Sec-Websocket-Version": {"13"}},
	} {
		b.Run(name, func(b *testing.B) {
			r := newRequest("GET", "http://k8s/api/v1/pods")
			var n next
			w := httptest.NewRecorder()
			b.ReportAllocs()
			for b.Loop() {
				clear(r.Header) // the handler has put the identity into it
				maps.Copy(r.Header, headers)
				n.got = nil
				if err := h.ServeHTTP(w, r, &n); err != nil {
					b.Fatal(err)
				}
				if n.got == nil {
					b.Fatal("refused")
				}
			}
		})
	}
}
