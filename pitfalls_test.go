// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/google/go-cmp/cmp"
	"tailscale.com/client/tailscale/apitype"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// What Headscale does not have is shown here with an injected node.

// A Tailscale Service has an address of its own, which every one of its hosts
// answers for: it is no node's, so there is nobody to ask.
func TestServicesOfTailscaleAreRefused(t *testing.T) {
	for _, service := range []string{"100.99.0.1", "fd7a:115c:a1e0::99"} {
		r := httptest.NewRequest(http.MethodGet, "https://db.example.ts.net/api", nil)
		ctx := context.WithValue(r.Context(), caddy.ReplacerCtxKey, caddy.NewReplacer())
		r = r.WithContext(tailnet.WithConn(ctx, netip.MustParseAddrPort(aliceAddr+":40000"), netip.MustParseAddr(service)))
		resp, got := serve(t, newHandler(t, caddyfile.Config{}, silentNode(t)), r)
		if got != nil {
			t.Errorf("%s: the next handler was called", service)
		}
		checkRefused(t, resp, forbidden, service)
	}
}

// Behind Funnel is somebody on the internet. A node that is asked about such an
// address has no peer for it; should it name one without saying who that is, that
// does not count either.
func TestFunnelHasNoPeerAndIsRefused(t *testing.T) {
	for name, node := range map[string]*tailnet.Node{
		"no peer":                   newNode(nil, tailnet.ErrPeerNotFound),
		"grants, but of nobody":     newNode(&apitype.WhoIsResponse{CapMap: whoIs(readers).CapMap}, nil),
		"a user, but of no device":  newNode(&apitype.WhoIsResponse{UserProfile: whoIs().UserProfile, CapMap: whoIs(readers).CapMap}, nil),
		"a device, but of no user":  newNode(&apitype.WhoIsResponse{Node: whoIs().Node, CapMap: whoIs(readers).CapMap}, nil),
		"an answer and an error":    newNode(whoIs(readers), tailnet.ErrPeerNotFound),
		"nothing, and not an error": newNode(nil, nil),
	} {
		t.Run(name, func(t *testing.T) {
			resp, got := serve(t, newHandler(t, caddyfile.Config{}, node), fromPeer(httptest.NewRequest(http.MethodGet, "https://k8s/api", nil), "203.0.113.9"))
			if got != nil {
				t.Error("the next handler was called")
			}
			checkRefused(t, resp, forbidden, "203.0.113.9")
		})
	}
}

// A device that was shared in may be a granted one, or is a user and no more. Who
// tagged it did so in another tailnet.
func TestSharedDevicesHaveTheirGrantsOnly(t *testing.T) {
	shared := func(rules ...string) *tailnet.Node {
		who := whoIs(rules...)
		who.Node.Tags, who.Node.Sharer = []string{"tag:k8s-admins"}, 7
		return newNode(who, nil)
	}
	for name, tt := range map[string]struct {
		node   *tailnet.Node
		groups []string
		source impersonate.Source
	}{
		"no grant": {shared(), nil, impersonate.SourceNone},
		"a grant":  {shared(readers), []string{"tailnet-readers"}, impersonate.SourceGrants},
	} {
		t.Run(name, func(t *testing.T) {
			_, got := serve(t, newHandler(t, caddyfile.Config{}, tt.node), newRequest("GET", "https://k8s/api"))
			if got == nil {
				t.Fatal("refused")
			}
			want := http.Header{"Impersonate-User": {"laptop.example.ts.net"}}
			if tt.groups != nil {
				want["Impersonate-Group"] = tt.groups
			}
			if diff := cmp.Diff(want, protected(got.Header)); diff != "" {
				t.Errorf("headers differ (-want +got):\n%s", diff)
			}
			if id, _ := impersonate.FromContext(got.Context()); id.Source != tt.source {
				t.Errorf("groups came from %q; want %q", id.Source, tt.source)
			}
		})
		t.Run(name+", deny_shared", func(t *testing.T) {
			cfg := caddyfile.Config{}
			cfg.DenyShared = true
			resp, got := serve(t, newHandler(t, cfg, tt.node), newRequest("GET", "https://k8s/api"))
			if got != nil {
				t.Error("the next handler was called")
			}
			checkRefused(t, resp, forbidden, "deny_shared")
		})
	}
}
