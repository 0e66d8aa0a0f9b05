// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// A caller that may not act as another user makes the proxy ask once, and not at all
// with a name that no user has.
func TestActAs_DeniedTargetIsReviewedOnce(t *testing.T) {
	var reviews, bytes atomic.Int64
	up := proxytest.NewAPIServer(t)
	up.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		allowed := strings.HasSuffix(r.URL.Path, "/selfsubjectaccessreviews")
		if !allowed {
			reviews.Add(1)
			bytes.Add(n)
		}
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, `{"status": {"allowed": %v}}`, allowed)
	})
	s := proxytest.Config{
		API:    up,
		Body:   "tailscale_impersonate {\nclient_impersonation authorize\ncache_ttl 1m\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}",
		Nodes:  []*tailnet.Node{proxytest.AliceNode()},
		Server: "max_header_size 1MiB",
	}.Start(t)
	for _, tt := range []struct {
		name, as string
		refusal  func(*http.Response) bool
		reviews  int64
	}{
		{"a long name", strings.Repeat("a", 450_000), func(r *http.Response) bool { return r.StatusCode == http.StatusBadRequest }, 0},
		{"another user", "bob", func(r *http.Response) bool { return r.StatusCode == http.StatusForbidden }, 2}, // one of each form
	} {
		t.Run(tt.name, func(t *testing.T) {
			reviews.Store(0)
			bytes.Store(0)
			for range 10 {
				if resp := s.Get(t, "/api/v1/pods", "Impersonate-User: "+tt.as+"\r\n"); !tt.refusal(resp) {
					t.Errorf("the answer is %s", resp.Status)
				}
			}
			if got := reviews.Load(); got != tt.reviews {
				t.Errorf("10 requests caused %d reviews of %d bytes; want %d", got, bytes.Load(), tt.reviews)
			}
		})
	}
}
