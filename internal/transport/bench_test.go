// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"net/http"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

// roundTripFunc implements http.RoundTripper without connections.
type roundTripFunc func(*http.Request) (*http.Response, error)

func (f roundTripFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// BenchmarkRoundTrip measures what the transport adds to sending a request.
func BenchmarkRoundTrip(b *testing.B) {
	s := proxytest.NewAPIServer(b)
	for name, user := range map[string]map[string]any{
		"token":      token,
		"token file": {"tokenFile": writeFile(b, "token", "from-file")},
	} {
		b.Run(name, func(b *testing.B) {
			tr := newTransport(b, trusting(s, user))
			resp := &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}
			tr.cluster.http2 = roundTripFunc(func(*http.Request) (*http.Response, error) { return resp, nil })
			r := newRequest(s, "/api/v1/pods", "User-Agent", "kubectl", "Accept", "application/json", "Impersonate-User", "alice@example.com")
			b.ReportAllocs()
			for b.Loop() {
				if _, err := tr.RoundTrip(r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
