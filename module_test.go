// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/admin"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/app"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

// A server's listeners are known only once the whole config runs. Until then requests
// wait.
func TestServeHTTP_WaitsForStart(t *testing.T) {
	for _, tt := range []struct {
		name    string
		release func(*Handler, context.CancelFunc)
		passes  bool
		want    proxytest.Refusal
	}{
		{"started", func(h *Handler, _ context.CancelFunc) { h.UseNodes(tailnet.Nodes{proxytest.AliceNode()}) }, true, proxytest.Refusal{}},
		{"cleaned up without having started", func(h *Handler, _ context.CancelFunc) {
			if err := h.Cleanup(); err != nil {
				t.Error(err)
			}
		}, false, proxytest.TryAgain},
		{"client gone", func(_ *Handler, cancel context.CancelFunc) { cancel() }, false, proxytest.TryAgain},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newUnstartedHandler(t, caddyfile.Config{}, newGeneration(), zap.NewNop())
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				r := proxytest.FromPeer(httptest.NewRequest("GET", "http://k8s/api", nil).WithContext(ctx), proxytest.AliceAddr)
				rec, n, done := httptest.NewRecorder(), new(proxytest.Next), make(chan error, 1)
				go func() { done <- h.ServeHTTP(rec, r, n) }()
				synctest.Wait()
				select {
				case err := <-done:
					t.Fatalf("the request was answered before the config has started: %v, %v", rec.Result().Status, err)
				default:
				}
				tt.release(h, cancel)
				if err := <-done; err != nil {
					t.Fatal(err)
				}
				if passed := n.Got != nil; passed != tt.passes {
					t.Fatalf("the next handler was called: %v; want %v", passed, tt.passes)
				}
				if !tt.passes {
					proxytest.CheckRefused(t, rec.Result(), tt.want)
				}
			})
		})
	}
}

// A handler answers on connections from before its Cleanup, which is at a reload, and
// refuses those from after it. HTTP/2 clients are told to open another connection.
func TestCleanup_HandlerKeepsEarlierConnections(t *testing.T) {
	for _, proto := range []int{1, 2} {
		t.Run(fmt.Sprintf("HTTP/%d", proto), func(t *testing.T) {
			h := newHandler(t, caddyfile.Config{}, proxytest.AliceNode())
			request := proxytest.NewConn()
			ask := func(r *http.Request) (*http.Response, *http.Request) {
				r.ProtoMajor = proto
				return proxytest.Serve(t, h, r)
			}
			if resp, got := ask(request()); got == nil || resp.Header.Get("Connection") != "" {
				t.Errorf("before Cleanup: %s with Connection: %q; want an answer without", resp.Status, resp.Header.Get("Connection"))
			}
			if err := h.Cleanup(); err != nil {
				t.Fatal(err)
			}
			earlier, got := ask(request())
			if got == nil {
				t.Errorf("refused after Cleanup: %s", earlier.Status)
			}
			later, got := ask(proxytest.NewConn()())
			if got != nil {
				t.Error("a request on a later connection passed")
			}
			proxytest.CheckRefused(t, later, proxytest.TryAgain, "no longer in use")
			for _, resp := range []*http.Response{earlier, later} {
				if gone := resp.Header.Get("Connection") == "close"; gone != (proto == 2) {
					t.Errorf("%s has Connection: %q; want close over HTTP/2 only", resp.Status, resp.Header.Get("Connection"))
				}
			}
		})
	}
}

func TestProvision_NeedsHTTPServer(t *testing.T) {
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	defer cancel()
	h := new(Handler)
	if err := h.Provision(ctx); err == nil || !strings.Contains(err.Error(), "HTTP server") {
		t.Errorf("got error %v; want one that asks for an HTTP server", err)
	}
	if err := h.Cleanup(); err != nil { // as Caddy does
		t.Errorf("Cleanup: %v", err)
	}
}

// The handler finds the tailnet nodes behind the listeners of its server.
func TestProvision_NodesComeFromListeners(t *testing.T) {
	for _, overTLS := range []bool{false, true} {
		t.Run(fmt.Sprintf("TLS %t", overTLS), func(t *testing.T) {
			proxytest.Config{TLS: overTLS, Bind: "127.0.0.1 tailnettest/one", Body: "tailscale_impersonate"}.Start(t)
			app, err := caddy.ActiveContext().App("http")
			if err != nil {
				t.Fatal(err)
			}
			var handlers []*Handler
			for _, server := range app.(*caddyhttp.App).Servers {
				handlers = append(handlers, proxytest.HandlersOf[*Handler](server)...)
			}
			if len(handlers) != 1 {
				t.Fatalf("got %d handlers; want 1", len(handlers))
			}
			// The node does not run, and cannot look anything up.
			facts, err := handlers[0].auth.ExplainPeer(t.Context(), "laptop")
			if len(facts) > 0 || err == nil || strings.Count(err.Error(), "tailnet node") != 1 || !strings.Contains(err.Error(), `tailnet node "one"`) {
				t.Errorf("got %v and error %v; want an error of the node named one only", facts, err)
			}
		})
	}
}

// An unset variable must not turn recording off.
func TestProvision_UnsetRecordDirectoryIsAnError(t *testing.T) {
	h := &Handler{Config: caddyfile.Config{Record: "{env.NO_SUCH_VARIABLE}"}}
	if err := h.setUp(newGeneration(), zap.NewNop(), nil); err == nil || !strings.Contains(err.Error(), "NO_SUCH_VARIABLE") {
		t.Errorf("got error %v; want one that names the variable", err)
	}
}

func TestCaddyfile_UnknownOptionIsAnError(t *testing.T) {
	_, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte("http:// {\ntailscale_impersonate {\nallow_origin https://a.example.com\n}\n}"), nil)
	if err == nil || !strings.Contains(err.Error(), `"allow_origin"`) {
		t.Errorf("got error %v; want one that names the option", err)
	}
}

// Caddy wraps the connections of a server that speaks only one of the protocols.
func TestServer_OneProtocol(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	for _, tt := range []struct {
		protocols string
		request   func(*testing.T, *proxytest.Site) string // returns the answer's status
	}{
		{"h1", func(t *testing.T, s *proxytest.Site) string {
			return strconv.Itoa(s.Get(t, "/api", "").StatusCode)
		}},
		{"h2c", func(t *testing.T, s *proxytest.Site) string {
			return s.HTTP2(t, [][2]string{{":method", "GET"}, {":scheme", "http"}, {":authority", "k8s"}, {":path", "/api"}})
		}},
	} {
		t.Run(tt.protocols, func(t *testing.T) {
			s := proxytest.Config{
				API:    up,
				Nodes:  []*tailnet.Node{proxytest.AliceNode()},
				Server: "protocols " + tt.protocols,
				Body:   proxytest.ToKubernetes,
			}.Start(t)
			if got := tt.request(t, s); got != "200" {
				t.Errorf("answered %s; want 200", got)
			}
			up.CheckOne(t, proxytest.AliceAsProxy)
		})
	}
}

// Validating a config starts nothing; running one leaves nothing behind.
func TestLifecycle_LeavesNoGoroutines(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	site := up.Expand(t, "http://:%d {\nbind tailnettest/k8s\nprovide_nodes\ntailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}\n}")
	round := func(t *testing.T) {
		t.Helper()
		t.Run("validate", func(t *testing.T) {
			var config caddy.Config
			if err := json.Unmarshal(proxytest.Adapt(t, "{\nadmin off\nlog {\noutput discard\n}\n}\n"+fmt.Sprintf(site, 1)), &config); err != nil {
				t.Fatal(err)
			}
			if err := caddy.Validate(&config); err != nil {
				t.Fatal(err)
			}
		})
		t.Run("run", func(t *testing.T) {
			s := proxytest.StartSite(t, up, proxytest.ToKubernetes, proxytest.AliceNode())
			s.Get(t, "/api", "Connection: close\r\n")
			up.CheckOne(t, proxytest.AliceAsProxy)
		})
	}
	round(t) // starts what Caddy keeps for the life of the process
	before := runtime.NumGoroutine()
	for range 10 {
		round(t)
	}
	proxytest.WaitForGoroutines(t, before, nil)
}

// After a reload, the admin API knows the handlers of the running config only. Counters
// continue.
func TestReload_AdminAndMetricsFollowRunningConfig(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	process := app.Acquire()
	defer process.Release()
	since := proxytest.CountsSince(t, "decisions_total")
	for config := 1; config <= 3; config++ {
		t.Run("", func(t *testing.T) {
			s := proxytest.StartSite(t, up, "tailscale_impersonate {\nwhoami\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", proxytest.AliceNode())
			s.Get(t, "/api", "Connection: close\r\n")
			up.CheckOne(t, proxytest.AliceAsProxy)
			if n := len(process.Running()); n != 1 {
				t.Errorf("%d handlers are running; want 1", n)
			}
			if got := adminPeers(t); strings.Count(got, `"user"`) != 1 || !strings.Contains(got, `"user": "alice@example.com"`) {
				t.Errorf("got callers %s; want alice", got)
			}
			resp := s.Get(t, "/whoami", "Accept: application/json\r\nConnection: close\r\n")
			var facts whoami.Facts
			if err := json.NewDecoder(resp.Body).Decode(&facts); err != nil || facts.Server != "http://k8s" {
				t.Errorf("whoami: %v, %+v", err, facts)
			}
			if diff := cmp.Diff(map[string]float64{"decisions_total allowed grants": float64(config)}, since()); diff != "" {
				t.Errorf("requests counted up to config %d (-want +got):\n%s", config, diff)
			}
		})
	}
	if n := len(process.Running()); n > 0 {
		t.Errorf("%d handlers are running after the last config", n)
	}
}

// adminPeers returns the answer of the admin API to a request for all peers.
func adminPeers(t *testing.T) string {
	t.Helper()
	for _, route := range new(admin.Admin).Routes() {
		if route.Pattern == "/tailscale_impersonate/peers" {
			rec := httptest.NewRecorder()
			if err := route.Handler.ServeHTTP(rec, httptest.NewRequest("GET", route.Pattern, nil)); err != nil {
				t.Fatal(err)
			}
			return rec.Body.String()
		}
	}
	t.Fatal("the admin API has no route for peers")
	return ""
}
