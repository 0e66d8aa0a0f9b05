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
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// newConnections returns a function that does what the module does for a connection that a
// server accepts, and for its only request, but for what the node does (BenchmarkWhoIs in
// lab/testcontrol).
func newConnections(tb testing.TB) func() {
	h := newHandler(tb, caddyfile.Config{}, proxytest.AliceNode())
	_, accepted := proxytest.Connect(tb, proxytest.AliceAddr, proxytest.NodeAddr)
	get := proxytest.NewRequest(http.MethodGet, "https://k8s.example.ts.net/api/v1/namespaces/default/pods?limit=500",
		"Accept", "application/json;as=Table;v=v1;g=meta.k8s.io,application/json",
		"User-Agent", "kubectl/v1.37.2 (linux/amd64) kubernetes/0000000",
	)
	w := proxytest.NoAnswer{}
	forwarded := 0
	next := proxytest.NextFunc(func(*http.Request) { forwarded++ })
	return func() {
		before := forwarded
		ctx := h.memory.ConnContext(tailnet.ConnContext(tb.Context(), accepted), accepted)
		h.memory.ConnState(accepted, http.StateNew)
		h.memory.ConnState(accepted, http.StateActive)
		r := caddyhttp.PrepareRequest(get.WithContext(ctx), caddy.NewReplacer(), w, nil)
		if err := h.ServeHTTP(w, r, next); err != nil {
			tb.Fatal(err)
		}
		h.memory.ConnState(accepted, http.StateClosed)
		if forwarded == before {
			tb.Fatal("a request was not forwarded")
		}
	}
}

// BenchmarkNewConnection measures what each command of kubectl costs.
func BenchmarkNewConnection(b *testing.B) {
	connect := newConnections(b)
	heap := make([]byte, 64<<20) // as a Caddy at work has
	defer runtime.KeepAlive(heap)
	b.ReportAllocs()
	for b.Loop() {
		connect()
	}
}

// What a new connection allocates does not depend on the machine.
func TestNewConnection_AllocatesLittle(t *testing.T) {
	const most = 90
	if got := testing.AllocsPerRun(200, newConnections(t)); got > most {
		t.Errorf("a new connection makes %v allocations; want at most %d: go test -bench NewConnection -memprofile shows where", got, most)
	}
}

// BenchmarkHandler measures what the handler adds to a request: a GET by kubectl, with
// the caller in the cache (hit) or not (miss), and an exec over a WebSocket (upgrade).
// The node answers at once.
func BenchmarkHandler(b *testing.B) {
	const namespace = "https://k8s.example.ts.net/api/v1/namespaces/default/"
	get := proxytest.NewRequest(http.MethodGet, namespace+"pods?limit=500",
		"Accept", "application/json;as=Table;v=v1;g=meta.k8s.io,application/json",
		"Accept-Encoding", "gzip",
		"Kubectl-Command", "kubectl get",
		"Kubectl-Session", "4f0c0b5a-0f0e-4a36-8d33-6b3f4a1f9f5e",
		"User-Agent", "kubectl/v1.37.2 (linux/amd64) kubernetes/0000000",
	)
	exec := proxytest.NewRequest(http.MethodGet, namespace+"pods/web/exec?command=sh",
		"Connection", "Upgrade",
		"Sec-Websocket-Protocol", "v5.channel.k8s.io",
		"Sec-Websocket-Version", "13",
		"Upgrade", "websocket",
		"User-Agent", "kubectl/v1.37.2 (linux/amd64) kubernetes/0000000",
	)
	for _, tt := range []struct {
		name string
		ttl  time.Duration
		r    *http.Request
	}{{"hit", time.Hour, get}, {"miss", 0, get}, {"upgrade", time.Hour, exec}} {
		b.Run(tt.name, func(b *testing.B) {
			ttl := caddy.Duration(tt.ttl)
			h := newHandler(b, caddyfile.Config{CacheTTL: &ttl}, proxytest.AliceNode())
			ctx := h.memory.ConnContext(tt.r.Context(), nil) // as a server does when it accepts a connection
			forwarded := 0
			next := proxytest.NextFunc(func(*http.Request) { forwarded++ })
			w := proxytest.NoAnswer{}
			heap := make([]byte, 64<<20) // as a Caddy at work has: with less, garbage is collected all the time
			defer runtime.KeepAlive(heap)
			// Every request has a replacer of its own. There are only a few, as a request
			// that a server has just read is in the processor's cache, too.
			requests := make([]*http.Request, 64)
			b.ReportAllocs()
			sent := 0
			for ; b.Loop(); sent++ {
				i := sent % len(requests)
				if i == 0 {
					b.StopTimer()
					for j := range requests {
						requests[j] = caddyhttp.PrepareRequest(tt.r.WithContext(ctx), caddy.NewReplacer(), w, nil)
					}
					b.StartTimer()
				}
				if err := h.ServeHTTP(w, requests[i], next); err != nil {
					b.Fatal(err)
				}
			}
			if forwarded != sent {
				b.Fatalf("%d of %d requests were forwarded", forwarded, sent)
			}
		})
	}
}
