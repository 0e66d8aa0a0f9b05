// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"context"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

func TestReady_NeedsAllNodes(t *testing.T) {
	up, down := proxytest.AliceNode(), proxytest.AliceNode()
	down.Name = "other"
	down.Addrs = func() (ip4, ip6 netip.Addr) { return }
	down.Status = func(context.Context) (tailnet.Status, error) { return tailnet.Status{State: "NeedsLogin"}, nil }
	for name, tt := range map[string]struct {
		nodes []*tailnet.Node
		want  int
	}{
		"all up":   {[]*tailnet.Node{up}, http.StatusOK},
		"one down": {[]*tailnet.Node{up, down}, http.StatusServiceUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			api := proxytest.NewAPIServer(t)
			s := proxytest.Config{API: api, Nodes: tt.nodes, Body: `
				@down not tailnet_up
				handle /readyz {
					respond @down 503
					respond 200
				}
				` + proxytest.ToKubernetes}.Start(t)
			got := 0
			for deadline := time.Now().Add(10 * time.Second); got != tt.want && time.Now().Before(deadline); {
				got = s.Get(t, "/readyz", "Connection: close\r\n").StatusCode
			}
			if got != tt.want {
				t.Errorf("got status %d; want %d", got, tt.want)
			}
		})
	}
}
