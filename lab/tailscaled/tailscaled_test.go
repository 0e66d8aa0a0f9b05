// SPDX-License-Identifier: Apache-2.0

package tailscaled

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"tailscale.com/client/local"
	"tailscale.com/ipn"
	"tailscale.com/tsnet"

	_ "github.com/tailscale-impersonate/caddy-tailscale-impersonate"
	_ "github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/cli"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/headscale"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/netns"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/process"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/tempdir"
)

const policy = `{
	"tagOwners": {"tag:k8s": []},
	"grants": [
		{"src": ["*"], "dst": ["*"], "ip": ["*"]},
		{"src": ["alice@example.com"], "dst": ["tag:k8s"], "app": {"tailscale.com/cap/kubernetes": [{"impersonate": {"groups": ["tailnet-readers"]}}]}},
	],
}`

// port is Caddy's port, in a namespace without other servers.
const port = "8080"

func TestTailscaled_IdentifiesPeers(t *testing.T) {
	if netns.Inside() {
		inNamespace(t)
		return
	}
	tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("tailscaled needs a network interface: %v", err)
	}
	_ = tun.Close()
	if err := netns.Command("-test.run=^$").Run(); err != nil {
		t.Skipf("cannot create a network namespace: %v", err)
	}
	out, err := netns.Command("-test.run=^"+t.Name()+"$", "-test.v").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("in the namespace: %v\n%s", err, out)
	}
}

func inNamespace(t *testing.T) {
	if err := os.Setenv("TS_NO_LOGS_NO_SUPPORT", "true"); err != nil { // before the first node
		t.Fatal(err)
	}
	if err := netns.SetUp(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	control, err := headscale.Start(ctx, headscale.Config{Dir: t.TempDir(), Policy: []byte(policy)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := control.Stop(); err != nil {
			t.Error(err)
		}
	}()
	socket := startDaemon(t)
	address := join(ctx, t, socket, control)
	for _, login := range []string{"alice@example.com", "bob@example.com"} {
		if err := control.CreateUser(ctx, login); err != nil {
			t.Fatal(err)
		}
	}
	alice, bob := startNode(ctx, t, control, "alice@example.com"), startNode(ctx, t, control, "bob@example.com")
	site := "http://" + net.JoinHostPort(address.String(), port)

	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = json.NewEncoder(w).Encode(map[string][]string{
			"user": r.Header.Values("Impersonate-User"), "groups": r.Header.Values("Impersonate-Group"), "from": r.Header.Values("X-Forwarded-For"),
		})
	}))
	defer upstream.Close()
	config, err := lab.Adapt(fmt.Sprintf(`{
	admin 127.0.0.1:2019
	persist_config off
	log default {
		level PANIC
	}
}
%s {
	bind %s
	tailscale_impersonate {
		tailscaled %s
	}
	reverse_proxy %s
}
`, site, address, socket, upstream.URL))
	if err != nil {
		t.Fatal(err)
	}
	if err := caddy.Load(config, true); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	}()

	for _, tt := range []struct {
		login string
		node  *tsnet.Server
		want  map[string][]string
	}{
		{"alice@example.com", alice, map[string][]string{"user": {"alice@example.com"}, "groups": {"tailnet-readers"}}},
		{"bob@example.com", bob, map[string][]string{"user": {"bob@example.com"}, "groups": nil}},
	} {
		dial := func(ctx context.Context, network, address string) (net.Conn, error) {
			return lab.Dial(ctx, tt.node, network, address)
		}
		status, body := get(ctx, t, site, dial)
		var got map[string][]string
		if err := json.Unmarshal(body, &got); status != http.StatusOK || err != nil {
			t.Errorf("%s is answered with status %d: %s", tt.login, status, body)
			continue
		}
		own, _ := tt.node.TailscaleIPs()
		tt.want["from"] = []string{own.String()}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("headers for %s at the API server (-want +got):\n%s", tt.login, diff)
		}
	}

	// The command asks Caddy, which asks the daemon.
	said, err := explain("alice")
	if err != nil {
		t.Errorf("explain --peer alice: %v", err)
	}
	for _, want := range []string{"alice@example.com on alice", "tailnet-readers", "from grant 1", `tailscale.com/cap/kubernetes: {"impersonate":{"groups":["tailnet-readers"]}}`} {
		if !strings.Contains(said, want) {
			t.Errorf("explain --peer alice lacks %q:\n%s", want, said)
		}
	}
	if said, err := explain("nobody"); err == nil || !strings.Contains(err.Error(), "nobody") {
		t.Errorf("explain --peer nobody: %v, and it printed %q; want an error that names the peer", err, said)
	}

	// Requests from the host itself come from the daemon's own address.
	status, body := get(ctx, t, site, (&net.Dialer{}).DialContext)
	var refused metav1.Status
	if err := json.Unmarshal(body, &refused); err != nil || status != http.StatusForbidden || !strings.Contains(refused.Message, "itself") {
		t.Errorf("a request from the host is answered with status %d: %s", status, body)
	}
}

// explain runs `caddy tailscale-impersonate explain` and returns its output.
func explain(peer string) (string, error) {
	const name = "tailscale-impersonate"
	cmd := &cobra.Command{Use: name, SilenceUsage: true, SilenceErrors: true}
	caddycmd.Commands()[name].CobraFunc(cmd)
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetArgs([]string{"explain", "--peer", peer, "--address", "127.0.0.1:2019"})
	err := cmd.Execute()
	return out.String(), err
}

// startDaemon starts a daemon and returns its socket.
func startDaemon(t *testing.T) (socket string) {
	t.Helper()
	path, err := components.Path("tailscaled")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	log, err := os.Create(filepath.Join(dir, "tailscaled.log"))
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "socket")
	cmd := exec.Command(path, "--statedir="+dir, "--socket="+socket, "--tun=tailscale0", "--port=0")
	cmd.Env = append(os.Environ(), "TS_LOGS_DIR="+dir) // otherwise it writes to the host's folders
	cmd.Stdout, cmd.Stderr = log, log
	daemon, err := process.Start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := daemon.Stop(10 * time.Second); err != nil {
			t.Error(err)
		}
		if err := log.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			said, err := os.ReadFile(log.Name())
			t.Logf("tailscaled (%v):\n%s", err, said)
		}
	})
	return socket
}

// join connects the daemon to the tailnet as tag:k8s and returns its address.
func join(ctx context.Context, t *testing.T, socket string, control *headscale.Server) netip.Addr {
	t.Helper()
	client := &local.Client{Socket: socket, UseSocketOnly: true}
	for {
		if _, err := client.StatusWithoutPeers(ctx); err == nil {
			break
		} else if ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	key, err := control.TagKey(ctx, "tag:k8s")
	if err != nil {
		t.Fatal(err)
	}
	prefs := ipn.NewPrefs()
	prefs.ControlURL, prefs.Hostname, prefs.WantRunning = control.URL(), "server", true
	prefs.CorpDNS = false // otherwise it changes the host's DNS settings
	if err := client.Start(ctx, ipn.Options{AuthKey: key, UpdatePrefs: prefs}); err != nil {
		t.Fatal(err)
	}
	if err := client.StartLoginInteractive(ctx); err != nil {
		t.Fatal(err)
	}
	for {
		status, err := client.StatusWithoutPeers(ctx)
		if err == nil && status.BackendState == ipn.Running.String() && len(status.TailscaleIPs) > 0 {
			return status.TailscaleIPs[0]
		}
		if ctx.Err() != nil {
			t.Fatalf("tailscaled did not join the tailnet: %v, %+v", err, status)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// startNode connects a device of a user to the tailnet.
func startNode(ctx context.Context, t *testing.T, control *headscale.Server, login string) *tsnet.Server {
	t.Helper()
	key, err := control.UserKey(ctx, login)
	if err != nil {
		t.Fatal(err)
	}
	name, _, _ := strings.Cut(login, "@")
	quiet := func(string, ...any) {}
	node := &tsnet.Server{Hostname: name, Dir: tempdir.New(t), ControlURL: control.URL(), AuthKey: key, Ephemeral: true, Logf: quiet, UserLogf: quiet}
	t.Cleanup(func() { _ = node.Close() })
	if _, err := node.Up(ctx); err != nil {
		t.Fatal(err)
	}
	return node
}

// get sends a request with a forged X-Forwarded-For.
func get(ctx context.Context, t *testing.T, site string, dial func(context.Context, string, string) (net.Conn, error)) (status int, body []byte) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, site+"/api", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("X-Forwarded-For", "100.64.0.99")
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err = io.ReadAll(resp.Body); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, body
}
