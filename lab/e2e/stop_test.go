// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/process"
)

// ownCaddy is the environment variable that makes the test's binary a Caddy.
const ownCaddy = "LAB_E2E_CADDY"

// caddyProcess is a Caddy in a process of its own, on a tailnet node of its own.
type caddyProcess struct {
	// node is the name of the node.
	node string
	// globals are further global options, tailscale those of the tailscale app.
	globals, tailscale string
	// protocols are those that the servers speak. Default: h1 h2.
	protocols string

	*process.Process
	dir    string
	health string // the address of the example's site for probes
}

// start starts c.
func (c *caddyProcess) start(t *testing.T) {
	t.Helper()
	c.dir, c.health = t.TempDir(), "127.0.0.1:"+freePort()
	const site = `
	bind tailscale/%s
	tailscale_kubernetes {
		kubeconfig %s
	}
`
	proxy := fmt.Sprintf(site, c.node, theLab.Kubeconfig())
	c.configure(t, fmt.Sprintf("https://%s.%s {\n\ttls internal\n%s}\nhttp:// {%s}\n", c.node, lab.Domain, proxy, proxy))
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "run", "--config", c.caddyfile(), "--adapter", "caddyfile")
	cmd.Env = append(os.Environ(), ownCaddy+"=yes")
	if c.Process, err = process.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Kill()
		if t.Failed() {
			t.Logf("Caddy's log:\n%s", c.log(t))
		}
	})
}

// configure writes a Caddyfile with the given sites and that for probes.
func (c *caddyProcess) configure(t *testing.T, sites string) {
	t.Helper()
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	example, err := os.ReadFile(filepath.Join(root, "examples", "kubernetes", "Caddyfile"))
	if err != nil {
		t.Fatal(err)
	}
	_, health, _ := strings.Cut(string(example), "\nhttp://:8080 {")
	if err := os.WriteFile(c.caddyfile(), fmt.Appendf(nil, `{
	admin off
	persist_config off
	skip_install_trust
	auto_https disable_redirects
	storage file_system %s
	log {
		output file %s
		format json
	}
	%s
	tailscale {
		control_url %s
		auth_key %s
		state_dir %s
		%s
	}
	servers {
		protocols %s
	}
}
%s
http://%s {%s`, filepath.Join(theLab.Dir, "caddy"), filepath.Join(c.dir, "caddy.log"), c.globals, theLab.Headscale.URL(), theLab.ProxyKey(),
		filepath.Join(c.dir, "nodes"), c.tailscale, cmp.Or(c.protocols, "h1 h2"), sites, c.health, health), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (c *caddyProcess) caddyfile() string { return filepath.Join(c.dir, "Caddyfile") }

func (c *caddyProcess) log(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(c.dir, "caddy.log"))
	if err != nil {
		t.Error(err)
	}
	return string(text)
}

// kubeconfig returns a kubeconfig with which kubectl calls c as a caller, once c answers.
func (c *caddyProcess) kubeconfig(t *testing.T, caller, scheme string) string {
	t.Helper()
	path := filepath.Join(c.dir, caller+"-"+scheme+".kubeconfig")
	if err := theLab.Callers[caller].WriteKubeconfig(path, scheme+"://"+c.node+"."+lab.Domain); err != nil {
		t.Fatal(err)
	}
	eventually(t, "Caddy answers", func() error {
		_, stderr, err := runKubectl(t, path, nil, "get", "--raw", "/api")
		if err != nil {
			return fmt.Errorf("%w: %s", err, stderr)
		}
		return nil
	})
	return path
}

// connect sends a request as a caller over each of n connections, and closes them if they are
// not to stay open.
func (c *caddyProcess) connect(t *testing.T, caller string, n int, stay bool) {
	t.Helper()
	var left atomic.Int64
	left.Store(int64(n))
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				conn, err := c.request(t.Context(), caller)
				switch {
				case err != nil:
					t.Error(err)
				case stay:
					t.Cleanup(func() { _ = conn.Close() })
				default:
					_ = conn.Close()
				}
			}
		})
	}
	wg.Wait()
}

// request sends a request as a caller, and returns its connection.
func (c *caddyProcess) request(ctx context.Context, caller string) (conn net.Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if conn, err = theLab.Callers[caller].Dial(ctx, "tcp", c.node+":80"); err != nil {
		return nil, err
	}
	if _, err := io.WriteString(conn, "GET /version HTTP/1.1\r\nHost: "+c.node+"\r\n\r\n"); err != nil {
		return conn, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return conn, err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return conn, err
}

// wantReady waits until the readiness probe is answered with the status code want. Caddy
// asks its node how it is every 15 seconds.
func (c *caddyProcess) wantReady(t *testing.T, want int) {
	t.Helper()
	eventually(t, fmt.Sprintf("the readiness probe is answered with %d", want), func() error {
		resp, err := http.Get("http://" + c.health + "/readyz")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != want {
			return fmt.Errorf("got %d", resp.StatusCode)
		}
		return nil
	})
}

// terminate sends SIGTERM, calls during, and waits for the end. It fails the test if that
// comes later than limit.
func (c *caddyProcess) terminate(t *testing.T, limit time.Duration, during func()) {
	t.Helper()
	began := time.Now()
	if err := c.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	during()
	select {
	case <-c.Done():
		t.Logf("Caddy has exited after %.1f s: %v", time.Since(began).Seconds(), c.Err())
	case <-time.After(time.Until(began.Add(limit))):
		t.Errorf("Caddy still runs %v after SIGTERM", limit)
		c.Kill()
	}
}

// stream is a watch over a connection of its own, as [net/http] does not tell when that
// ends.
func (c *caddyProcess) stream(t *testing.T, caller string) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	conn, err := theLab.Callers[caller].Dial(ctx, "tcp", c.node+":80")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if _, err := io.WriteString(conn, "GET /api/v1/namespaces?watch=true HTTP/1.1\r\nHost: "+c.node+"\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// streams are what clients have open at a Caddy.
type streams struct {
	watch, log *session
	execs      map[string]*session // by protocol
	raw        net.Conn            // a watch
}

func openAll(t *testing.T, c *caddyProcess, scheme string) *streams {
	t.Helper()
	config := c.kubeconfig(t, "alice", scheme)
	s := &streams{execs: make(map[string]*session)}
	for _, p := range protocols {
		s.execs[p.name] = startKubectl(t, config, p.env, "exec", "-i", lab.Pod, "--", "cat")
		s.execs[p.name].echoes(t, "hello")
	}
	s.watch = startKubectl(t, config, nil, "get", "namespaces", "--watch", "--output-watch-events", "--no-headers")
	s.watch.want(t, "ADDED")
	// Not all of the log: nobody reads more than some lines before the end.
	s.log = startKubectl(t, config, nil, "logs", "--follow", "--tail=5", lab.Pod)
	s.log.line(t)
	s.raw = c.stream(t, "alice")
	return s
}

// wantTold fails the test unless each client ends and has printed why.
func (s *streams) wantTold(t *testing.T, reason string) {
	t.Helper()
	for _, client := range append(slices.Collect(maps.Values(s.execs)), s.watch, s.log) {
		select {
		case <-client.ended:
		case <-time.After(10 * time.Second):
			t.Errorf("%s goes on", client.what)
		}
	}
	for name, exec := range s.execs {
		exec.failedWith(t, reason)
		t.Logf("exec over %s: %v: %s", name, exec.err, exec.stderr.String())
	}
	if s.watch.err != nil {
		t.Errorf("the watch ended with %v: %s; want it to end as one that the API server ends", s.watch.err, s.watch.stderr.String())
	}
	s.log.failedWith(t, "")
	var last string
	for line := range s.log.lines {
		last = line
	}
	t.Logf("log: %v: %s", s.log.err, last)
	if !strings.Contains(last, reason) {
		t.Errorf("the log ends with %q; want the reason", last)
	}
	if err := s.raw.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(s.raw)
	if err != nil || !strings.HasSuffix(string(answer), "\r\n0\r\n\r\n") {
		t.Errorf("a watch ends with %.100q, and its connection with %v; want both to end properly", answer[max(0, len(answer)-100):], err)
	}
}

// Every client is told, and Caddy exits in time. A tailnet node never closes if it has more
// connections than its queue of packets is long, or has had some thousand.
func TestStop_ClientsAreTold(t *testing.T) {
	const grace, hanging = "grace_period 10s", "tailnet nodes take long to close"
	for _, tt := range []struct {
		name    string
		caddy   caddyProcess
		scheme  string        // of the watch and the log
		earlier int           // connections
		stay    bool          // they stay open
		delay   time.Duration // shutdown_delay
		logs    string
	}{
		{name: "HTTP2", caddy: caddyProcess{node: "stop-h2", globals: grace}, scheme: "https"},
		{name: "HTTP1", caddy: caddyProcess{node: "stop-h1", globals: grace}, scheme: "http"},
		{name: "shutdown_delay", caddy: caddyProcess{node: "stop-delay", globals: grace + "\n\tshutdown_delay 6s"}, scheme: "https", delay: 6 * time.Second},
		{name: "node that hangs, without grace_period", caddy: caddyProcess{node: "stop-hang", tailscale: "hang_on_close"}, scheme: "https", logs: hanging},
		{name: "800 connections", caddy: caddyProcess{node: "stop-busy", globals: grace}, scheme: "https", earlier: 800, stay: true},
		{name: "earlier connections", caddy: caddyProcess{node: "stop-old", globals: grace}, scheme: "https", earlier: *stopConnections},
	} {
		t.Run(tt.name, func(t *testing.T) {
			caddy := &tt.caddy
			caddy.start(t)
			open := openAll(t, caddy, tt.scheme)
			began := time.Now()
			for _, caller := range []string{"bob", "carol"} { // one alone would hold too much
				caddy.connect(t, caller, tt.earlier/2, tt.stay)
			}
			t.Logf("%d connections took %.1f s", tt.earlier, time.Since(began).Seconds())
			if tt.delay > 0 {
				caddy.wantReady(t, http.StatusOK)
			}
			caddy.terminate(t, tt.delay+11*time.Second, func() {
				if tt.delay > 0 {
					caddy.wantReady(t, http.StatusServiceUnavailable)
					open.execs["SPDY"].echoes(t, "still here")
				}
			})
			if err := caddy.Err(); err != nil {
				t.Errorf("Caddy ended with %v", err)
			}
			open.wantTold(t, "the proxy is stopping")
			if log := caddy.log(t); !strings.Contains(log, tt.logs) {
				t.Errorf("Caddy did not log %q", tt.logs)
			}
		})
	}
}

// Caddy waits without a limit for listeners that only it can close, such as that of HTTP/3.
func TestStop_ExitsAfterGracePeriod(t *testing.T) {
	caddy := &caddyProcess{node: "stop-h3", globals: "grace_period 6s", tailscale: "hang_on_close", protocols: "h1 h2 h3"}
	caddy.start(t)
	open := openAll(t, caddy, "https")
	caddy.terminate(t, 9*time.Second, func() {})
	if err := caddy.Err(); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("Caddy ended with %v; want exit status 3", err)
	}
	open.wantTold(t, "the proxy is stopping")
	if message := "Caddy exits, as its grace period is over and it still waits"; !strings.Contains(caddy.log(t), message) {
		t.Errorf("Caddy did not log %q", message)
	}
}

// With its last config, a node leaves the tailnet.
func TestReload_DroppedNodeTellsClients(t *testing.T) {
	caddy := &caddyProcess{node: "stop-dropped", tailscale: "hang_on_close"}
	caddy.start(t)
	open := openAll(t, caddy, "https")
	site := "127.0.0.1:" + freePort()
	caddy.configure(t, "http://"+site+" {\n\trespond new\n}\n")
	began := time.Now()
	if err := caddy.Signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	open.wantTold(t, "the proxy leaves this tailnet node")
	eventually(t, "the reload returns", func() error {
		for _, want := range []string{"successfully reloaded config from file", "tailnet nodes take long to close"} {
			if !strings.Contains(caddy.log(t), want) {
				return fmt.Errorf("caddy did not log %q", want)
			}
		}
		return nil
	})
	t.Logf("the reload took %.1f s", time.Since(began).Seconds())
	resp, err := http.Get("http://" + site)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	caddy.terminate(t, 10*time.Second, func() {})
	if err := caddy.Err(); err != nil {
		t.Errorf("Caddy ended with %v", err)
	}
}
