// SPDX-License-Identifier: Apache-2.0

package headscale

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/tailcfg"
	"tailscale.com/tsnet"
	"tailscale.com/types/logger"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/tempdir"
)

func TestMain(m *testing.M) {
	// Set before the first node starts: nodes must not send logs.
	if err := os.Setenv("TS_NO_LOGS_NO_SUPPORT", "true"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// capability is the capability whose grants this project reads.
const capability tailcfg.PeerCapability = "tailscale.com/cap/kubernetes"

// policy returns a policy file that opens all connections, with the given additional
// grants.
func policy(grants ...string) []byte {
	grants = append([]string{`{"src": ["*"], "dst": ["*"], "ip": ["*"]}`}, grants...)
	return fmt.Appendf(nil, `{
		// A comment, as policy files are HuJSON.
		"tagOwners": {"tag:k8s": [], "tag:runner": []},
		"grants": [%s],
	}`, strings.Join(grants, ","))
}

// readers grants a group to a user.
const readers = `{
	"src": ["alice@example.com"],
	"dst": ["tag:k8s"],
	"app": {"tailscale.com/cap/kubernetes": [{"impersonate": {"groups": ["tailnet-readers"]}}]},
}`

// testContext returns a context that ends with the test, and long before the test's
// own timeout.
func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// start starts a tailnet that ends with the test.
func start(ctx context.Context, t *testing.T, policy []byte) *Server {
	t.Helper()
	s, err := Start(ctx, Config{Dir: t.TempDir(), Policy: policy})
	if err != nil {
		t.Fatal(err)
	}
	pid := s.process.Pid()
	t.Cleanup(func() {
		if t.Failed() {
			log, err := os.ReadFile(s.LogPath())
			t.Logf("%s: %s, %v", s.LogPath(), log, err)
		}
		begin := time.Now()
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		t.Logf("stopped after %v", time.Since(begin).Round(time.Millisecond))
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
			t.Errorf("headscale still runs as process %d", pid)
		}
	})
	return s
}

// join adds a node to the tailnet and returns its address.
func join(ctx context.Context, t *testing.T, s *Server, node *tsnet.Server) (netip.Addr, error) {
	node.Dir, node.ControlURL = tempdir.New(t), s.URL()
	node.Logf, node.UserLogf = logger.Discard, logger.Discard
	t.Cleanup(func() { node.Close() })
	if _, err := node.Up(ctx); err != nil {
		return netip.Addr{}, fmt.Errorf("join as %s: %w", node.Hostname, err)
	}
	ip4, _ := node.TailscaleIPs()
	return ip4, nil
}

// whois returns what node knows about the peer with the given address.
func whois(ctx context.Context, t *testing.T, node *tsnet.Server, peer netip.Addr) (*apitype.WhoIsResponse, error) {
	t.Helper()
	client, err := node.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	return client.WhoIs(ctx, peer.String())
}

// eventually polls until ok reports true.
func eventually(ctx context.Context, t *testing.T, what string, ok func() bool) {
	t.Helper()
	begin := time.Now()
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatalf("not within %v: %s", time.Since(begin), what)
		case <-time.After(20 * time.Millisecond):
		}
	}
	t.Logf("after %v: %s", time.Since(begin).Round(time.Millisecond), what)
}

func TestWhoIs_FollowsPolicy(t *testing.T) {
	ctx := testContext(t)
	s := start(ctx, t, policy(readers))
	if err := s.CreateUser(ctx, "alice@example.com"); err != nil {
		t.Fatal(err)
	}
	aliceKey, err := s.UserKey(ctx, "alice@example.com")
	if err != nil {
		t.Fatal(err)
	}
	proxyKey, err := s.TagKey(ctx, "tag:k8s")
	if err != nil {
		t.Fatal(err)
	}
	runnerKey, err := s.TagKey(ctx, "tag:runner")
	if err != nil {
		t.Fatal(err)
	}

	type node struct {
		server *tsnet.Server
		ip     netip.Addr
	}
	nodes := make(map[string]node)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for name, key := range map[string]string{"proxy": proxyKey, "laptop": aliceKey, "runner": runnerKey} {
		wg.Go(func() {
			server := &tsnet.Server{Hostname: name, AuthKey: key}
			ip, err := join(ctx, t, s, server)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			nodes[name] = node{server, ip}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	proxy, laptop, runner := nodes["proxy"], nodes["laptop"], nodes["runner"]

	// A user's device has the login name and the unchanged rules of the grant.
	var who *apitype.WhoIsResponse
	eventually(ctx, t, "the grant is in force", func() bool {
		who, err = whois(ctx, t, proxy.server, laptop.ip)
		return err == nil && who.CapMap.HasCapability(capability)
	})
	if got, want := who.UserProfile.LoginName, "alice@example.com"; got != want {
		t.Errorf("login name %q; want %q", got, want)
	}
	if got, want := who.Node.Name, "laptop.tailnet.example."; got != want {
		t.Errorf("node name %q; want %q", got, want)
	}
	if len(who.Node.Tags) != 0 {
		t.Errorf("tags %q; want none", who.Node.Tags)
	}
	if got, want := compact(t, who.CapMap[capability]), []string{`{"impersonate":{"groups":["tailnet-readers"]}}`}; !slices.Equal(got, want) {
		t.Errorf("rules %q; want %q", got, want)
	}

	// A tagged device has its tags and no grant.
	eventually(ctx, t, "the tagged device is known", func() bool {
		who, err = whois(ctx, t, proxy.server, runner.ip)
		return err == nil
	})
	if got, want := who.Node.Tags, []string{"tag:runner"}; !slices.Equal(got, want) {
		t.Errorf("tags %q; want %q", got, want)
	}
	if who.CapMap.HasCapability(capability) {
		t.Errorf("the tagged device has a grant: %v", who.CapMap)
	}

	// A policy that Headscale refuses changes nothing.
	err = s.SetPolicy(ctx, []byte(`{"grants": [{"src": ["group:nobody"], "dst": ["*"], "ip": ["*"]}]}`))
	if err == nil || !strings.Contains(err.Error(), "group:nobody") {
		t.Errorf("SetPolicy with an unknown group: error %v; want the group's name", err)
	}
	if got, err := os.ReadFile(s.PolicyPath()); err != nil || string(got) != string(policy(readers)) {
		t.Errorf("the policy file is now %q, %v; want it unchanged", got, err)
	}

	// Grants are removed and added without a restart.
	if err := s.SetPolicy(ctx, policy()); err != nil {
		t.Fatal(err)
	}
	eventually(ctx, t, "the grant is withdrawn", func() bool {
		who, err = whois(ctx, t, proxy.server, laptop.ip)
		return err == nil && !who.CapMap.HasCapability(capability)
	})
	if err := s.SetPolicy(ctx, policy(readers)); err != nil {
		t.Fatal(err)
	}
	eventually(ctx, t, "the grant is restored", func() bool {
		who, err = whois(ctx, t, proxy.server, laptop.ip)
		return err == nil && who.CapMap.HasCapability(capability)
	})

	if err := s.ExpireNode(ctx, "laptop"); err != nil {
		t.Fatal(err)
	}
	eventually(ctx, t, "the node has expired", func() bool {
		who, err = whois(ctx, t, proxy.server, laptop.ip)
		return err != nil || who.Node.Expired
	})
	if err := s.DeleteNode(ctx, "runner"); err != nil {
		t.Fatal(err)
	}
	eventually(ctx, t, "the node is removed", func() bool {
		_, err = whois(ctx, t, proxy.server, runner.ip)
		return err != nil
	})
	if err := s.DeleteNode(ctx, "runner"); err == nil || !strings.Contains(err.Error(), "no such node") {
		t.Errorf("DeleteNode of a missing node: error %v; want no such node", err)
	}
}

// compact returns the rules without whitespace.
func compact(t *testing.T, rules []tailcfg.RawMessage) []string {
	t.Helper()
	var got []string
	for _, rule := range rules {
		var b bytes.Buffer
		if err := json.Compact(&b, []byte(rule)); err != nil {
			t.Fatal(err)
		}
		got = append(got, b.String())
	}
	return got
}

func TestTailnets_SideBySideShareAddresses(t *testing.T) {
	ctx := testContext(t)
	var addrs [2]netip.Addr
	var wg sync.WaitGroup
	for i := range addrs {
		s := start(ctx, t, policy())
		key, err := s.TagKey(ctx, "tag:k8s")
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			if addrs[i], err = join(ctx, t, s, &tsnet.Server{Hostname: "proxy", AuthKey: key}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if want := netip.MustParseAddr("100.64.0.1"); addrs[0] != want || addrs[1] != want {
		t.Errorf("addresses %v; want %v twice", addrs, want)
	}
}

func TestStart_FailureNamesReason(t *testing.T) {
	cancelled, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("changed my mind")
	cancel(reason)
	for name, tt := range map[string]struct {
		ctx  context.Context
		cfg  Config
		want string
	}{
		"policy": {t.Context(), Config{Policy: []byte(`{"grants": [{"src": ["group:nobody"], "dst": ["*"], "ip": ["*"]}]}`)}, "group:nobody"},
		"empty":  {t.Context(), Config{}, "the policy is empty"},
		"binary": {t.Context(), Config{Policy: policy(), Binary: "/does/not/exist"}, "no such file"},
		"ctx":    {cancelled, Config{Policy: policy()}, reason.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			tt.cfg.Dir = t.TempDir()
			_, err := Start(tt.ctx, tt.cfg)
			if err == nil {
				t.Fatal("headscale started; want an error")
			}
			for _, want := range []string{"start headscale: ", tt.want, filepath.Join(tt.cfg.Dir, logFile)} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q; want it to contain %q", err, want)
				}
			}
		})
	}
}
