// SPDX-License-Identifier: Apache-2.0

package testcontrol

import (
	"context"
	"encoding/json"
	"errors"
	"net/http/httptest"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/tailcfg"
	"tailscale.com/tsnet"
	tailscalecontrol "tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/logger"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/derptest"
)

// pair returns two nodes of one tailnet, the first of which has been told about the second,
// and grants it something.
func pair(tb testing.TB, node func(name, control string) *tsnet.Server) (asked, peer *tsnet.Server, control *tailscalecontrol.Server) {
	control = &tailscalecontrol.Server{
		DERPMap:        derptest.Start(tb),
		DNSConfig:      &tailcfg.DNSConfig{Proxied: true},
		MagicDNSDomain: domain,
		Logf:           logger.Discard,
	}
	control.HTTPTestServer = httptest.NewServer(control)
	tb.Cleanup(control.HTTPTestServer.Close)
	control.SetGlobalAppCaps(tailcfg.PeerCapMap{
		tailcfg.PeerCapabilityKubernetes: {`{"impersonate": {"groups": ["a<b", "ü"]}}`, `null`},
		"example.com/cap/none":           nil,
	})
	asked, peer = node("asked", control.HTTPTestServer.URL), node("peer", control.HTTPTestServer.URL)
	for _, n := range []*tsnet.Server{peer, asked} {
		if _, err := n.Up(tb.Context()); err != nil {
			tb.Fatal(err)
		}
	}
	ip4, _ := peer.TailscaleIPs()
	local, _ := asked.TailscaleIPs()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		who, err := tailnet.FromServer(asked).WhoIs(tb.Context(), ip4, local)
		if err == nil && who.CapMap.HasCapability(tailcfg.PeerCapabilityKubernetes) {
			return asked, peer, control
		}
		if time.Now().After(deadline) {
			tb.Fatalf("the node does not know its peer: %+v, %v", who, err)
		}
	}
}

// plain returns who as what its JSON says.
func plain(t *testing.T, who *apitype.WhoIsResponse) (v any) {
	t.Helper()
	text, err := json.Marshal(who)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// What a node of this process says without its LocalAPI is what it says over it.
func TestWhoIs_IsThatOfLocalAPI(t *testing.T) {
	t.Setenv("TS_NO_LOGS_NO_SUPPORT", "true")
	asked, peer, control := pair(t, func(name, control string) *tsnet.Server { return join(t, control, name) })
	lc, err := asked.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	node := tailnet.FromServer(asked)
	peer4, peer6 := peer.TailscaleIPs()
	local4, local6 := asked.TailscaleIPs()

	same := func(remote, local netip.Addr) {
		t.Helper()
		want, wantErr := lc.WhoIsForIP(t.Context(), remote.String(), local)
		got, err := node.WhoIs(t.Context(), remote, local)
		if errors.Is(err, tailnet.ErrPeerNotFound) != errors.Is(wantErr, tailnet.ErrPeerNotFound) || (err == nil) != (wantErr == nil) {
			t.Errorf("%v on %v: got error %v; LocalAPI says %v", remote, local, err, wantErr)
			return
		}
		if diff := cmp.Diff(plain(t, want), plain(t, got)); diff != "" {
			t.Errorf("%v on %v (-LocalAPI +got):\n%s", remote, local, diff)
		}
	}
	all := func() {
		t.Helper()
		same(peer4, local4)
		same(peer6, local6)
		same(peer4, local6)
		same(peer4, netip.MustParseAddr("100.127.0.2")) // grants nothing there
		same(netip.MustParseAddr("100.127.0.1"), local4)
		same(netip.MustParseAddr("127.0.0.1"), local4)
	}
	all()
	status, err := lc.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for key := range status.Peer {
		change := control.Node(key)
		change.Tags, change.Sharer = []string{"tag:a", "tag:b"}, 123
		control.UpdateNode(change)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if who, err := node.WhoIs(t.Context(), peer4, local4); err == nil && len(who.Node.Tags) == 2 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the node is not told that its peer has tags")
		}
	}
	all()

	const most = 40 // LocalAPI takes about 250
	if got := testing.AllocsPerRun(100, func() { _, err = node.WhoIs(t.Context(), peer4, local4) }); err != nil || got > most {
		t.Errorf("a question makes %v allocations, and ends with %v; want at most %d and no error", got, err, most)
	}
}

// BenchmarkWhoIs measures one question to a node on a tailnet, as each new connection asks
// it.
func BenchmarkWhoIs(b *testing.B) {
	b.Setenv("TS_NO_LOGS_NO_SUPPORT", "true")
	asked, peer, _ := pair(b, func(name, control string) *tsnet.Server { return join(b, control, name) })
	lc, err := asked.LocalClient()
	if err != nil {
		b.Fatal(err)
	}
	remote, _ := peer.TailscaleIPs()
	local, _ := asked.TailscaleIPs()
	node := tailnet.FromServer(asked)
	for name, ask := range map[string]func(context.Context) (*apitype.WhoIsResponse, error){
		"LocalAPI": func(ctx context.Context) (*apitype.WhoIsResponse, error) {
			return lc.WhoIsForIP(ctx, remote.String(), local)
		},
		"in process": func(ctx context.Context) (*apitype.WhoIsResponse, error) {
			return node.WhoIs(ctx, remote, local)
		},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := ask(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
