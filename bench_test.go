// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"net/http"
	"runtime"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

// nothing is a next handler that does nothing.
type nothing struct{}

func (nothing) ServeHTTP(http.ResponseWriter, *http.Request) error { return nil }

// noAnswer is a response writer for requests that pass.
type noAnswer struct{ http.ResponseWriter }

// BenchmarkHandler measures what the handler adds to a request: a GET of kubectl's
// whose caller was asked about a moment ago (hit), and one whose caller has to be
// asked about (miss). What the tailnet node takes to answer is not in it: the node
// answers at once.
func BenchmarkHandler(b *testing.B) {
	for _, tt := range []struct {
		name string
		ttl  time.Duration
	}{{"hit", time.Hour}, {"miss", 0}} {
		b.Run(tt.name, func(b *testing.B) {
			ttl := caddy.Duration(tt.ttl)
			h := newHandler(b, caddyfile.Config{CacheTTL: &ttl}, proxytest.AliceNode())
			r := proxytest.NewRequest(http.MethodGet, "https://k8s.example.ts.net/api/v1/namespaces/default/pods?limit=500",
				"Accept", "application/json;as=Table;v=v1;g=meta.k8s.io,application/json",
				"Accept-Encoding", "gzip",
				"Kubectl-Command", "kubectl get",
				"Kubectl-Session", "4f0c0b5a-0f0e-4a36-8d33-6b3f4a1f9f5e",
				"User-Agent", "kubectl/v1.37.2 (linux/amd64) kubernetes/0000000",
			)
			w := proxytest.NoAnswer{}
			heap := make([]byte, 64<<20) // about that of a Caddy at work, or garbage is collected all the time
			defer runtime.KeepAlive(heap)
			// Every request has a replacer of its own. There are few at a time, as one
			// that a server has just read is in the processor's cache, too.
			base := r.Context()
			requests := make([]*http.Request, 64)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if i %= len(requests); i == 0 {
					b.StopTimer()
					for j := range requests {
						requests[j] = caddyhttp.PrepareRequest(r.WithContext(base), caddy.NewReplacer(), w, nil)
					}
					b.StartTimer()
				}
				if err := h.ServeHTTP(w, requests[i], nothing{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
