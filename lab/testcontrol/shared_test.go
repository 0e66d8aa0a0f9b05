// SPDX-License-Identifier: Apache-2.0

package testcontrol

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/tailcfg"
	"tailscale.com/tsnet"
	tailscalecontrol "tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/logger"

	_ "github.com/tailscale-impersonate/caddy-tailscale-impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/derptest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/tempdir"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/standin"
)

const domain = "tail-scale.ts.net"

// A device that was shared in has tags from another tailnet. They do not become
// groups, but its grants do.
func TestSharedNode_TagsAreNoGroups(t *testing.T) {
	t.Setenv("TS_NO_LOGS_NO_SUPPORT", "true")
	control := &tailscalecontrol.Server{
		DERPMap:        derptest.Start(t),
		DNSConfig:      &tailcfg.DNSConfig{Proxied: true},
		MagicDNSDomain: domain,
		Logf:           logger.Discard,
	}
	control.HTTPTestServer = httptest.NewServer(control)
	t.Cleanup(control.HTTPTestServer.Close)

	seen := make(chan http.Header, 1)
	upstream := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen <- r.Header }))
	t.Cleanup(upstream.Close)
	proxy := startCaddy(t, control.HTTPTestServer.URL, strings.TrimPrefix(upstream.URL, "http://"))
	caller := join(t, control.HTTPTestServer.URL, "guest")
	_, err := caller.Up(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ip4, _ := proxy.TailscaleIPs()
	client := &http.Client{
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return lab.Dial(ctx, caller, "tcp", ip4.String()+":80")
		}},
		Timeout: 20 * time.Second,
	}
	// groupsOnceUser sends requests until the upstream sees user, and returns the
	// groups that it then sees.
	groupsOnceUser := func(user string) (groups []string) {
		t.Helper()
		var last string
		for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
			resp, err := client.Get("http://" + ip4.String() + "/api")
			if err != nil {
				last = err.Error()
				continue
			}
			_ = resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				last = resp.Status + " " + resp.Header.Get("Warning")
				continue
			}
			h := <-seen
			if h.Get("Impersonate-User") == user {
				return h["Impersonate-Group"]
			}
			last = h.Get("Impersonate-User")
		}
		t.Fatalf("the upstream does not see %s; last answer: %s", user, last)
		return nil
	}

	// change makes the control server change the caller's node.
	lc, err := caller.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	status, err := lc.StatusWithoutPeers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	change := func(f func(*tailcfg.Node)) {
		node := control.Node(status.Self.PublicKey)
		f(node)
		control.UpdateNode(node)
	}
	name := func(i int) string { return fmt.Sprintf("guest-%d.%s", i, domain) }
	rename := func(i int) func(*tailcfg.Node) { return func(n *tailcfg.Node) { n.Name = name(i) + "." } }

	// As a control, a device of this tailnet.
	change(func(n *tailcfg.Node) { rename(1)(n); n.Tags = []string{"tag:k8s-admins"} })
	if got, want := groupsOnceUser(name(1)), []string{"tag:k8s-admins"}; !slices.Equal(got, want) {
		t.Errorf("a tagged device: got groups %q; want %q", got, want)
	}
	change(func(n *tailcfg.Node) { rename(2)(n); n.Sharer = 123 })
	if got := groupsOnceUser(name(2)); len(got) > 0 {
		t.Errorf("a tagged device that was shared in: got groups %q; want none", got)
	}
	control.SetGlobalAppCaps(tailcfg.PeerCapMap{tailcfg.PeerCapabilityKubernetes: {`{"impersonate":{"groups":["guests"]}}`}})
	change(rename(3))
	if got, want := groupsOnceUser(name(3)), []string{"guests"}; !slices.Equal(got, want) {
		t.Errorf("with a grant: got groups %q; want %q", got, want)
	}
}

// runCaddy runs Caddy with a Caddyfile until the test is over, and returns its tailnet node
// k8s and what that says about itself.
func runCaddy(t *testing.T, caddyfile string) (*tsnet.Server, *ipnstate.Status) {
	t.Helper()
	config, err := lab.Adapt(caddyfile)
	if err != nil {
		t.Fatal(err)
	}
	if err := caddy.Load(config, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Errorf("stopping Caddy: %v", err)
		}
	})
	node, ok := standin.Node("k8s")
	if !ok {
		t.Fatal("Caddy has no tailnet node")
	}
	status, err := node.Up(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return node, status
}

// startCaddy runs Caddy in front of an upstream, on a node of control's tailnet, and
// returns the node.
func startCaddy(t *testing.T, control, upstream string) *tsnet.Server {
	t.Helper()
	node, _ := runCaddy(t, fmt.Sprintf(`{
	admin off
	persist_config off
	storage file_system %[1]s
	log default {
		level PANIC
	}
	tailscale {
		control_url %[2]s
		auth_key unused
		state_dir %[3]s
	}
}
http:// {
	bind tailscale/k8s
	tailscale_impersonate {
		cache_ttl 0
	}
	reverse_proxy %[4]s
}
`, filepath.Join(t.TempDir(), "caddy"), control, tempdir.New(t), upstream))
	return node
}

// join returns a node of control's tailnet.
func join(t testing.TB, control, name string) *tsnet.Server {
	t.Helper()
	node := &tsnet.Server{
		Hostname: name, Dir: tempdir.New(t), ControlURL: control, AuthKey: "unused", Ephemeral: true,
		Logf: logger.Discard, UserLogf: logger.Discard,
	}
	t.Cleanup(func() {
		if err := node.Close(); err != nil {
			t.Errorf("stopping %s: %v", name, err)
		}
	})
	return node
}
