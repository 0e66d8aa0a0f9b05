// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/standin"
)

// Ports of a site that is different in each config: over plain HTTP, on both nodes, and
// over TLS, which offers HTTP/2.
const (
	portReloaded    = "8010"
	portReloadedTLS = "8447"
)

const reloadedTLS = "https://" + lab.ProxyName + "." + lab.Domain + ":" + portReloadedTLS

// withVersion returns the lab's config with a site whose answers name version. Options
// are those of its tailscale_impersonate.
func withVersion(version string, options ...string) string {
	return sites(theLab) + fmt.Sprintf(`
(reloaded) {
	tailscale_impersonate {
		%s
	}
	header X-Version %s
	reverse_proxy %s
}
http://:%s {
	bind tailscale/%s tailscale/%s
	import reloaded
}
%s {
	bind tailscale/%[5]s
	tls internal
	import reloaded
}
`, strings.Join(options, "\n"), version, plain.addr, portReloaded, lab.ProxyName, secondNode, reloadedTLS)
}

// reload makes Caddy run a config until the test ends.
func reload(t *testing.T, config string) {
	t.Helper()
	t.Cleanup(func() { firstConfig(t) })
	if err := theLab.Caddy.Load(config); err != nil {
		t.Fatal(err)
	}
}

// firstConfig restores the config that all tests start with.
func firstConfig(t *testing.T) {
	t.Helper()
	if err := theLab.Caddy.Load(sites(theLab)); err != nil {
		t.Errorf("restoring the first config: %v", err)
	}
}

// wantVersion sends bob's requests over new connections, one after the other, to all
// listeners of the site that withVersion adds, and fails the test unless version answers
// all of them, as bob.
func wantVersion(t *testing.T, version string) {
	t.Helper()
	second, err := theLab.Caddy.Node(t.Context(), secondNode)
	if err != nil {
		t.Fatal(err)
	}
	ip4, _ := second.TailscaleIPs()
	bob := theLab.Callers["bob"]
	for i := range 8 { // more than the reloads of any test that calls this
		for _, address := range []string{lab.ProxyName + ":" + portReloaded, ip4.String() + ":" + portReloaded} {
			plain.take()
			resp, err := trySend(t, bob.Server, address, get("/api", "Host: "+address))
			if err != nil {
				t.Fatalf("connection %d to %s: %v; want an answer", i, address, err)
			}
			if got := resp.Header.Get("X-Version"); got != version || resp.StatusCode != http.StatusOK {
				t.Fatalf("connection %d to %s: %s from config %q: %s; want 200 from %q", i, address, resp.Status, got, resp.body, version)
			}
			if address == lab.ProxyName+":"+portReloaded {
				wantOnlyBob(t, plain.take(), "")
			}
		}
		plain.take()
		status, got := askVersion(t, clientOf(t, bob, "HTTP/2.0"))
		if status != http.StatusOK || got != version {
			t.Fatalf("connection %d over HTTP/2: status %d from config %q; want 200 from %q", i, status, got, version)
		}
		wantOnlyBob(t, plain.take(), "")
	}
}

// askVersion returns the status and the version that a client gets from the site that
// withVersion adds.
func askVersion(t *testing.T, client *http.Client) (status int, version string) {
	t.Helper()
	resp, err := client.Get(reloadedTLS + "/api")
	if err != nil {
		t.Fatal(err)
	}
	if err := resp.Body.Close(); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header.Get("X-Version")
}

// A closed listener handle of caddy-tailscale accepts one more connection, whenever one
// comes. None may be left when a reload has returned.
func TestReload_NewConnectionsUseNewestConfig(t *testing.T) {
	for i := range 5 {
		reload(t, withVersion(fmt.Sprint("v", i)))
	}
	wantVersion(t, "v4")
	for i := range 3 { // not idle: the old config accepts a connection last
		version := fmt.Sprint("busy", i)
		reload(t, withVersion(version))
		wantVersion(t, version)
	}
}

// Caddy adds a server of its own for redirects, to which the handler does not belong.
func TestReload_NewConnectionsAreRedirected(t *testing.T) {
	config := strings.Replace(sites(theLab), "auto_https disable_redirects\n", "", 1) +
		"https://redirected.example {\n\tbind tailscale/" + secondNode + "\n\ttls internal\n\trespond ok\n}\n"
	for i := range 5 {
		reload(t, fmt.Sprintf("%s\n# %d\n", config, i))
	}
	second, err := theLab.Caddy.Node(t.Context(), secondNode)
	if err != nil {
		t.Fatal(err)
	}
	ip4, _ := second.TailscaleIPs()
	for i := range 6 {
		resp, err := trySend(t, theLab.Callers["bob"].Server, ip4.String()+":80", get("/", "Host: redirected.example"))
		if err != nil || resp.StatusCode != http.StatusPermanentRedirect {
			t.Errorf("connection %d: %v, %v; want a redirect", i, resp.Response, err)
		}
	}
}

func TestReload_NextExecSucceeds(t *testing.T) {
	forEachProtocol(t, func(t *testing.T, p protocol) {
		for i := range 3 {
			for range 2 { // kubectl opens another connection before that of the command
				reload(t, withVersion(p.name))
			}
			stdout, stderr, err := runKubectl(t, theLab.Callers["alice"].Kubeconfig, p.env, "exec", "-v=6", lab.Pod, "--", "echo", "done")
			if err != nil || stdout != "done\n" || strings.Contains(stderr, `status="503`) {
				t.Errorf("kubectl exec after %d reloads: %v: %s%s", 2*(i+1), err, stdout, stderr)
			}
		}
	})
}

func TestReload_HundredReloadsLeaveNothing(t *testing.T) {
	reload(t, withVersion("before"))
	wantVersion(t, "before")
	before := runtime.NumGoroutine()
	for i := range 100 {
		if err := theLab.Caddy.Load(withVersion(fmt.Sprint("v", i))); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 100 {
		resp, err := trySend(t, theLab.Callers["bob"].Server, lab.ProxyName+":"+portReloaded, get("/api"))
		if err != nil || resp.Header.Get("X-Version") != "v99" {
			t.Fatalf("connection %d: %v, %v; want an answer of the newest config", i, resp.Response, err)
		}
	}
	wantVersion(t, "v99")
	// A goroutine for each reload, or more, would be left. Others come and go.
	within(t, time.Minute, "the goroutines of old configs have ended", func() error {
		if after := runtime.NumGoroutine(); after >= before+50 {
			return fmt.Errorf("%d goroutines; before there were %d", after, before)
		}
		return nil
	})
}

func TestReload_WithdrawnGroupHoldsForNewConnections(t *testing.T) {
	groups := func() []string {
		t.Helper()
		plain.take()
		if status, _ := askVersion(t, clientOf(t, theLab.Callers["alice"], "HTTP/2.0")); status != http.StatusOK {
			t.Fatalf("the answer is %d; want 200", status)
		}
		return plain.take()[0].Header["Impersonate-Group"]
	}
	reload(t, withVersion("granted"))
	if got := groups(); len(got) != 1 || got[0] != masters() {
		t.Fatalf("alice arrived in groups %q; want %s", got, masters())
	}
	reload(t, withVersion("cut", "deny_groups "+masters()))
	for i := range 3 {
		if got := groups(); len(got) > 0 {
			t.Errorf("connection %d: alice arrived in groups %q; want none", i, got)
		}
	}
}

// A connection whose TLS handshake ends after the reload has missed that the old config's
// server told its connections to go away.
func TestReload_EarlierConnectionGoesAway(t *testing.T) {
	reload(t, withVersion("old"))
	raw := dial(t, theLab.Callers["bob"].Server, lab.ProxyName+":"+portReloadedTLS)
	time.Sleep(200 * time.Millisecond) // until it has been accepted
	reload(t, withVersion("new"))

	ca, err := theLab.Caddy.CA()
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	conn, err := new(http2.Transport).NewClientConn(tls.Client(raw, &tls.Config{ServerName: lab.ProxyName + "." + lab.Domain, RootCAs: roots, NextProtos: []string{"h2"}})) //nolint:staticcheck // that of http.Transport dials by itself
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ask := func(ctx context.Context, path string) (*http.Response, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, reloadedTLS+path, nil)
		if err != nil {
			return nil, err
		}
		resp, err := conn.RoundTrip(req)
		if err != nil {
			return nil, err
		}
		return resp, resp.Body.Close()
	}
	// The server itself would tell the connection once it is idle.
	ctx, cancel := context.WithCancel(t.Context())
	open := make(chan struct{})
	go func() {
		defer close(open)
		_, _ = ask(ctx, "/slow?after=1m")
	}()
	defer func() {
		cancel()
		<-open
	}()
	eventually(t, "a request is open", func() error {
		if n := conn.State().StreamsActive; n != 1 {
			return fmt.Errorf("%d requests are open", n)
		}
		return nil
	})
	resp, err := ask(ctx, "/api")
	if err != nil {
		t.Fatal(err)
	}
	if got := resp.Header.Get("X-Version"); got != "old" || resp.StatusCode != http.StatusOK {
		t.Errorf("%s from config %q; want 200 from the config that accepted the connection", resp.Status, got)
	}
	within(t, 5*time.Second, "the connection takes no other request", func() error {
		if conn.CanTakeNewRequest() {
			return errors.New("it does")
		}
		return nil
	})
}

func TestReload_SiteThatIsGoneAcceptsNothing(t *testing.T) {
	gone := func() {
		t.Helper()
		for _, port := range []string{portReloaded, portReloadedTLS} {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			conn, err := lab.Dial(ctx, theLab.Callers["bob"].Server, "tcp", lab.ProxyName+":"+port)
			if err == nil {
				_ = conn.Close()
				t.Errorf("port %s of a site that is gone accepts a connection", port)
			}
		}
	}
	reload(t, withVersion("there"))
	reload(t, sites(theLab))
	gone()
	reload(t, withVersion("again"))
	wantVersion(t, "again")
	// Another site, without the handler, takes over one of the ports.
	reload(t, sites(theLab)+"http://:"+portReloaded+" {\n\tbind tailscale/"+lab.ProxyName+"\n\trespond other\n}\n")
	for i := range 3 {
		if resp, err := trySend(t, theLab.Callers["bob"].Server, lab.ProxyName+":"+portReloaded, get("/api")); err != nil || resp.body != "other" {
			t.Errorf("connection %d: %q, %v; want the answer of the other site", i, resp.body, err)
		}
	}
}

// The config with the handler is told that it stops, whatever comes next.
func TestReload_ConfigWithoutHandlerTakesOver(t *testing.T) {
	reload(t, withVersion("with"))
	wantVersion(t, "with")
	globals, _, _ := strings.Cut(sites(theLab), "\nhttps://")
	// On all nodes, so that none of them leaves its tailnet.
	reload(t, fmt.Sprintf("%s\nhttp://:%s {\n\tbind tailscale/%s tailscale/%s tailscale/%s\n\trespond other\n}\n",
		globals, portReloaded, lab.ProxyName, secondNode, foreignNode))
	for i := range 3 {
		if resp, err := trySend(t, theLab.Callers["bob"].Server, lab.ProxyName+":"+portReloaded, get("/api")); err != nil || resp.body != "other" {
			t.Errorf("connection %d: %q, %v; want the answer of the config without the handler", i, resp.body, err)
		}
	}
}

// Servers of a config that fails to start may already accept connections.
func TestReload_ConfigThatFailsToStartAcceptsNothing(t *testing.T) {
	reload(t, withVersion("running"))
	for i := range 5 {
		// No machine has this address.
		if err := theLab.Caddy.Load(withVersion(fmt.Sprint("failing", i)) + "http://:8011 {\n\tbind 192.0.2.1\n}\n"); err == nil {
			t.Fatal("a config with an address that the machine does not have was loaded")
		}
	}
	wantVersion(t, "running")
}

func TestReload_DroppedNodeDelaysNothing(t *testing.T) {
	const dropped, offline = "k8s-dropped", "k8s-offline"
	config := replaceOnce(withVersion("with")+"http://:8098 {\n\tbind tailscale/"+dropped+" tailscale/"+offline+"\n\ttailscale_impersonate\n}\n",
		"\ttailscale {\n", "\ttailscale {\n\t\t"+offline+" {\n\t\t\tcontrol_url http://127.0.0.1:1\n\t\t}\n")
	quickly := func(config string) {
		t.Helper()
		began := time.Now()
		reload(t, config)
		if d := time.Since(began); d > 5*time.Second {
			t.Errorf("the reload took %v", d)
		}
	}
	quickly(config)
	if _, err := theLab.Caddy.Node(t.Context(), dropped); err != nil {
		t.Fatal(err)
	}
	quickly(config + "# again, while one node is not connected\n")
	quickly(withVersion("without"))
	wantVersion(t, "without")
	eventually(t, "the nodes are gone", func() error {
		for _, name := range []string{dropped, offline} {
			if _, runs := standin.Node(name); runs {
				return fmt.Errorf("%s runs", name)
			}
		}
		return nil
	})
}

func TestReload_FollowedLogContinues(t *testing.T) {
	lines := follow(t, "bob", "logs", "-f", lab.Pod)
	if line := <-lines; !strings.HasPrefix(line, "line ") {
		t.Fatalf("kubectl logs -f printed %q", line)
	}
	reload(t, withVersion("other"))
	for range 3 {
		if line := <-lines; !strings.HasPrefix(line, "line ") {
			t.Fatalf("after a reload, kubectl logs -f printed %q", line)
		}
	}
}
