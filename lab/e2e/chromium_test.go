// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/websocket"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/process"
)

// browser is a headless Chromium on a caller's device.
type browser struct {
	path string
	// address forwards to the proxy's node over the tailnet, from the caller.
	address string
}

// onDevice returns a browser on a caller's device. It skips the test if there is no
// browser: make components installs one where it can.
func onDevice(t *testing.T, caller, port string) *browser {
	t.Helper()
	for _, name := range []string{"chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			return &browser{path, forward(t, caller, port)}
		}
	}
	t.Skip("Chromium is not installed; run apt-get install chromium-headless-shell")
	return nil
}

// forward returns an address on loopback that forwards to a port of the proxy's node,
// from a caller's device, until the test ends.
func forward(t *testing.T, caller, port string) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	device := theLab.Callers[caller]
	go func() {
		for {
			near, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer near.Close()
				far, err := device.Dial(context.Background(), "tcp", lab.ProxyName+":"+port)
				if err != nil {
					return
				}
				defer far.Close()
				go func() { defer far.Close(); _, _ = io.Copy(far, near) }()
				_, _ = io.Copy(near, far)
			}()
		}
	}()
	return ln.Addr().String()
}

// command returns a command that opens a page. rules say which addresses names stand for,
// besides the proxy's.
func (b *browser) command(ctx context.Context, t *testing.T, rules []string, args ...string) *exec.Cmd {
	rules = append(rules, "MAP "+proxyDomain+" "+b.address, "MAP * ~NOTFOUND", "EXCLUDE 127.0.0.1")
	return exec.CommandContext(ctx, b.path, append([]string{
		"--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
		"--user-data-dir=" + t.TempDir(), "--disable-background-networking", "--no-first-run",
		"--host-resolver-rules=" + strings.Join(rules, ", "),
		"--ignore-certificate-errors", // they are issued by the lab's CA
	}, args...)...)
}

// open opens a page and returns what the browser prints. Anything on its console
// fails the test, for instance a blocked style.
func (b *browser) open(t *testing.T, url string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := b.command(ctx, t, nil, append(append([]string{"--virtual-time-budget=5000"}, args...), url)...)
	var out, log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &log
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s", b.path, err, &log)
	}
	if strings.Contains(log.String(), "CONSOLE") {
		t.Errorf("the browser's console says:\n%s", &log)
	}
	return out.String()
}

// visit opens a page of site and returns what its script reports.
func (b *browser) visit(t *testing.T, url string, site *website, rules ...string) map[string]string {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := b.command(context.Background(), t, rules, "--remote-debugging-port=0", "--disable-popup-blocking", url) // which keeps it open
	cmd.Stderr = log
	running, err := process.Start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	defer running.Kill()
	select {
	case report := <-site.reports:
		return report
	case <-time.After(time.Minute):
		said, _ := os.ReadFile(log.Name())
		t.Fatalf("%s reports nothing within a minute:\n%s", url, said)
		return nil
	}
}

// website serves a page whose script reports what it could do. All paths end in a name.
type website struct {
	*httptest.Server
	reports chan map[string]string
	opened  atomic.Int32 // how often its page was
}

// serveWebsite serves a website with a script on address until the test ends.
func serveWebsite(t *testing.T, address, script string) *website {
	t.Helper()
	w := &website{reports: make(chan map[string]string, 10)}
	answer := func(contentType, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", contentType)
			_, _ = io.WriteString(w, body)
		}
	}
	pages := map[string]http.HandlerFunc{
		"page.js":    answer("text/javascript", scriptTools+script),
		"classic.js": answer("text/javascript", "window.classic = 'ran';"),
		"sw.js": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Service-Worker-Allowed", "/") // a worker for the whole site
			answer("text/javascript", "self.addEventListener('fetch', () => {});")(w, nil)
		},
		"echo": func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			_, _ = io.WriteString(w, r.Method+" "+string(body))
		},
		"events":    answer("text/event-stream", "data: event\n\n"),
		"websocket": websocket.Server{Handler: func(c *websocket.Conn) { _, _ = io.Copy(c, c) }}.ServeHTTP,
		"report": func(_ http.ResponseWriter, r *http.Request) {
			var report map[string]string
			if err := json.NewDecoder(r.Body).Decode(&report); err == nil {
				w.reports <- report
			}
		},
	}
	ln, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	w.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		page, ok := pages[path.Base(r.URL.Path)]
		if !ok {
			w.opened.Add(1)
			page = answer("text/html", `<!doctype html><link rel="icon" href="data:,"><script crossorigin src="classic.js"></script><script type="module" src="page.js"></script>`)
		}
		page(rw, r)
	}))
	w.Listener.Close()
	w.Listener = ln
	t.Cleanup(w.Close)
	return w
}

// scriptTools is what the scripts of pages have in common.
const scriptTools = `
const results = {};
const soon = () => new Promise((_, reject) => setTimeout(() => reject(new Error('no answer')), 5000));
async function step(name, f) {
  try { results[name] = String(await Promise.race([f(), soon()])); } catch (e) { results[name] = 'error: ' + e.message; }
}
async function text(url, init) {
  const answer = await fetch(url, init);
  return answer.status + ' ' + (await answer.text()).slice(0, 200);
}
const open = (url, protocols) => new Promise((resolve) => {
  const socket = new WebSocket(url, protocols);
  socket.onopen = () => { resolve('open'); socket.close(); };
  socket.onerror = () => resolve('refused');
});
const report = () => fetch('report', { method: 'POST', body: JSON.stringify(results) });
`

const proxyDomain = lab.ProxyName + "." + lab.Domain
