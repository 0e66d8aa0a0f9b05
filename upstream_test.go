// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/encode"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/encode/gzip"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/encode/zstd"
	_ "github.com/caddyserver/caddy/v2/modules/logging"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/matcher"
)

// failing is a next handler that fails as reverse_proxy does.
func failing(err error) caddyhttp.Handler {
	return caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return err })
}

func TestAnUpstreamThatIsAwayIsExplained(t *testing.T) {
	core, logs := observer.New(zap.ErrorLevel)
	h := newHandler(t, caddyfile.Config{}, aliceNode())
	h.logger = zap.New(core)
	for _, status := range []int{http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout} {
		rec := httptest.NewRecorder()
		cause := errors.New("dial tcp 192.0.2.1:6443: connection refused")
		if err := h.ServeHTTP(rec, newRequest("GET", "https://k8s/api"), failing(caddyhttp.Error(status, cause))); err != nil {
			t.Fatal(err)
		}
		checkRefused(t, rec.Result(), refusedWith{http.StatusServiceUnavailable, "ServiceUnavailable", ""}, "the API server cannot be reached")
		if strings.Contains(rec.Body.String(), "192.0.2.1") {
			t.Errorf("the caller is told the address of the API server: %s", rec.Body)
		}
		entries := logs.TakeAll()
		if len(entries) != 1 || !strings.Contains(entries[0].ContextMap()["error"].(string), "connection refused") {
			t.Errorf("%d: logged %v; want the cause", status, entries)
		}
	}
}

// The caller is not taken for somebody who asks to be somebody else: what the
// handler wrote for the first try is not found by the second.
func TestAnErrorRouteCanAskForIdentityAgain(t *testing.T) {
	up := newUpstream(t)
	s := startSite(t, up, false, "", `
		tailscale_impersonate
		handle_errors {
			tailscale_impersonate
			reverse_proxy $UPSTREAM {
				$HTTP
			}
		}
		error 404`, aliceNode())
	s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\n\r\n")
	up.checkSeen(t, http.Header{"Impersonate-User": {"alice@example.com"}, "Impersonate-Group": {"tailnet-readers"}})
}

func TestConnectionThatAConfigSetsDoesNotNameIdentity(t *testing.T) {
	for _, ops := range []string{
		"header_up Connection Impersonate-User",
		"header_up Connection \"Upgrade, Impersonate-User\"\nheader_up Upgrade websocket",
	} {
		up := newUpstream(t)
		s := startSite(t, up, false, "", "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n"+ops+"\n}", aliceNode())
		s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\n\r\n")
		for _, r := range up.take() {
			if c := r.Header["Connection"]; len(c) > 0 && (len(c) != 1 || c[0] != "Upgrade") {
				t.Errorf("%s: sent with Connection %q next to %q", ops, c, r.Header["Authorization"])
			}
		}
	}
}

// A matcher cannot answer by itself.
func TestWhatAMatcherCannotDecideAboutIsExplained(t *testing.T) {
	core, logs := observer.New(zap.WarnLevel)
	h := newHandler(t, caddyfile.Config{}, aliceNode())
	h.logger = zap.New(core)
	rec := httptest.NewRecorder()
	err := h.ServeHTTP(rec, newRequest("GET", "https://k8s/api//v1"), caddyhttp.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) error {
		_, err := matcher.Matcher{Verb: []string{"get"}}.MatchWithError(r)
		return err
	}))
	if err != nil {
		t.Fatal(err)
	}
	checkRefused(t, rec.Result(), refusedWith{http.StatusBadRequest, "BadRequest", ""}, "more than one way")
	if entries := logs.FilterMessage("request refused").All(); len(entries) != 1 {
		t.Errorf("logged %v; want that the request was refused", logs.All())
	}
}

func TestOtherErrorsAreCaddys(t *testing.T) {
	h := newHandler(t, caddyfile.Config{}, aliceNode())
	for _, want := range []error{
		errors.New("plain"),
		caddyhttp.Error(http.StatusNotFound, errors.New("from a handler in between")),
		caddyhttp.Error(499, errors.New("the client is gone")),
	} {
		rec := httptest.NewRecorder()
		if err := h.ServeHTTP(rec, newRequest("GET", "https://k8s/api"), failing(want)); !errors.Is(err, want) {
			t.Errorf("got error %v; want %v", err, want)
		}
	}
}

// The configured routes are only there while the config is being provisioned; that
// they are there then is Caddy's to keep.
func TestTheWarningIsLoggedWhenAConfigIsLoaded(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	config := adapt(t, fmt.Sprintf(`{
		admin off
		persist_config off
		auto_https off
		storage file_system %s
		log {
			output file %s
		}
	}
	http://127.0.0.1:%d {
		encode
		tailscale_impersonate
		reverse_proxy 127.0.0.1:9
	}`, t.TempDir(), log, freePort(t)))
	if err := caddy.Load(config, true); err != nil {
		t.Fatal(err)
	}
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(content), `"because_of":["encode"]`) {
		t.Errorf("the log has no warning of encode:\n%s", content)
	}
}

// One API server of several that cannot be dialled costs no request: the transport
// tells reverse_proxy that nothing was sent, which may then try the next, also with
// a request that must not be sent twice.
func TestAnAPIServerThatIsAwayIsPassedOver(t *testing.T) {
	up := newUpstream(t)
	s := startSite(t, up, false, "", fmt.Sprintf(`
		tailscale_impersonate
		reverse_proxy 127.0.0.1:%d $UPSTREAM {
			lb_policy first
			lb_try_duration 5s
			fail_duration 1m
			$KUBERNETES
		}`, freePort(t)), aliceNode())
	for _, method := range []string{"POST", "GET"} {
		if resp := s.http1(t, aliceAddr, method+" /api HTTP/1.1\r\nHost: k8s\r\nContent-Length: 2\r\n\r\n{}"); resp.StatusCode != http.StatusOK {
			t.Errorf("%s: %s; want 200", method, resp.Status)
		}
		if n := len(up.take()); n != 1 {
			t.Errorf("%s: the API server that answers saw %d requests; want 1", method, n)
		}
	}
}

// reverse_proxy's own health checks reach the API server, as nobody.
func TestActiveHealthChecksAreNobodys(t *testing.T) {
	up := newUpstream(t)
	s := startSite(t, up, false, "", `
		tailscale_impersonate
		reverse_proxy $UPSTREAM {
			health_uri /readyz
			health_interval 50ms
			$KUBERNETES
		}`, aliceNode())
	var checks []*http.Request
	for deadline := time.Now().Add(10 * time.Second); len(checks) < 2 && time.Now().Before(deadline); {
		checks = append(checks, up.take()...)
		time.Sleep(10 * time.Millisecond) // between two looks
	}
	if len(checks) < 2 {
		t.Fatalf("%d health checks arrived; want more", len(checks))
	}
	for _, r := range checks {
		if h := protected(r.Header); r.URL.Path != "/readyz" || len(h) > 0 {
			t.Errorf("a health check of %s arrived with %v; want /readyz with nothing", r.URL.Path, h)
		}
	}
	if resp := s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\n\r\n"); resp.StatusCode != http.StatusOK {
		t.Errorf("a request beside the checks: %s; want 200", resp.Status)
	}
}
