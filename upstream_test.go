// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/net/http2"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

func TestUpstream_UnreachableIsExplained(t *testing.T) {
	core, logs := observer.New(zap.ErrorLevel)
	h := newLoggingHandler(t, caddyfile.Config{}, zap.New(core), proxytest.AliceNode())
	for _, status := range []int{http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout} {
		rec := httptest.NewRecorder()
		cause := errors.New("dial tcp 192.0.2.1:6443: connection refused")
		if err := h.ServeHTTP(rec, proxytest.NewRequest("GET", "https://k8s/api"), failing(caddyhttp.Error(status, cause))); err != nil {
			t.Fatal(err)
		}
		proxytest.CheckRefused(t, rec.Result(), proxytest.Unavailable, "the API server cannot be reached")
		if strings.Contains(rec.Body.String(), "192.0.2.1") {
			t.Errorf("the caller is told the address of the API server: %s", rec.Body)
		}
		entries := logs.TakeAll()
		if len(entries) != 1 || !strings.Contains(entries[0].ContextMap()["error"].(string), "connection refused") {
			t.Errorf("%d: logged %v; want the cause", status, entries)
		}
	}
}

// failing is a next handler that fails as reverse_proxy does.
func failing(err error) caddyhttp.Handler {
	return caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return err })
}

func TestUpstream_OtherErrorsAreCaddys(t *testing.T) {
	h := newHandler(t, caddyfile.Config{}, proxytest.AliceNode())
	for _, want := range []error{
		errors.New("plain"),
		caddyhttp.Error(http.StatusNotFound, errors.New("from a handler in between")),
		caddyhttp.Error(499, errors.New("the client is gone")),
	} {
		rec := httptest.NewRecorder()
		if err := h.ServeHTTP(rec, proxytest.NewRequest("GET", "https://k8s/api"), failing(want)); !errors.Is(err, want) {
			t.Errorf("got error %v; want %v", err, want)
		}
	}
}

// If one of several API servers cannot be dialled, the transport tells reverse_proxy that
// nothing was sent. It may then try the next one, also with a request that must not be
// sent twice.
func TestUpstream_UnreachableIsSkipped(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	s := proxytest.StartSite(t, up, fmt.Sprintf(`
		tailscale_impersonate
		reverse_proxy 127.0.0.1:%d $UPSTREAM {
			lb_policy first
			lb_try_duration 5s
			fail_duration 1m
			$KUBERNETES
		}`, proxytest.FreePort(t)), proxytest.AliceNode())
	for _, method := range []string{"POST", "GET"} {
		if resp := s.HTTP1(t, proxytest.AliceAddr, method+" /api HTTP/1.1\r\nHost: k8s\r\nContent-Length: 2\r\n\r\n{}"); resp.StatusCode != http.StatusOK {
			t.Errorf("%s: %s; want 200", method, resp.Status)
		}
		up.CheckOne(t, proxytest.AliceAsProxy)
	}
}

// reverse_proxy's own health checks reach the API server without an identity.
func TestUpstream_HealthChecksCarryNoIdentity(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	s := proxytest.StartSite(t, up, `
		tailscale_impersonate
		reverse_proxy $UPSTREAM {
			health_uri /readyz
			health_interval 50ms
			$KUBERNETES
		}`, proxytest.AliceNode())
	var checks []*http.Request
	for deadline := time.Now().Add(10 * time.Second); len(checks) < 2 && time.Now().Before(deadline); {
		checks = append(checks, up.Take()...)
		time.Sleep(10 * time.Millisecond) // between two looks
	}
	if len(checks) < 2 {
		t.Fatalf("%d health checks arrived; want more", len(checks))
	}
	for _, r := range checks {
		if h := proxytest.Protected(r.Header); r.URL.Path != "/readyz" || len(h) > 0 {
			t.Errorf("a health check of %s arrived with %v; want /readyz without either", r.URL.Path, h)
		}
	}
	if resp := s.Get(t, "/api", ""); resp.StatusCode != http.StatusOK {
		t.Errorf("a request beside the checks: %s; want 200", resp.Status)
	}
}

// Not when it is provisioned, as Caddy does to validate it.
func TestUpstream_PermissionIsCheckedWhenConfigStarts(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	asked := make(chan string, 10)
	up.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r.URL.Path
		http.Error(w, "no", http.StatusForbidden)
	})
	config := proxytest.Config{API: up, Body: proxytest.ToKubernetes, Nodes: []*tailnet.Node{proxytest.AliceNode()}}
	config.Start(t)
	select {
	case path := <-asked:
		if want := "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"; path != want {
			t.Errorf("the API server was asked for %s; want %s", path, want)
		}
	case <-time.After(10 * time.Second):
		t.Error("the API server was not asked what the proxy's account may do")
	}
}

// The API server often refuses a request before it has read the body, and clients wait
// for the end of that answer before they give up on sending it. An answer that waited for
// the body would never end: kubectl hung when it was not allowed to delete something.
func TestUpstream_EarlyRefusalDoesNotWaitForBody(t *testing.T) {
	for _, status := range []int{http.StatusForbidden, http.StatusConflict, http.StatusOK} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			up := proxytest.NewTunnel(t, nil)
			up.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(status)
				_, _ = io.WriteString(w, `{"message":"alice@example.com cannot impersonate"}`)
			})
			s := proxytest.Config{
				API: up, TLS: true, Nodes: []*tailnet.Node{proxytest.AliceNode()},
				Body: "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\nflush_interval -1\n}",
			}.Start(t)
			conn, err := new(http2.Transport).NewClientConn(s.Dial(t, proxytest.AliceAddr, "h2")) //nolint:staticcheck // net/http's dials itself
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			body, never := io.Pipe()
			defer never.Close()
			r, err := http.NewRequestWithContext(t.Context(), "DELETE", "https://k8s/api/v1/namespaces/a/configmaps/b", body)
			if err != nil {
				t.Fatal(err)
			}
			r.ContentLength = 35
			resp, err := conn.RoundTrip(r)
			if err != nil {
				t.Fatal(err)
			}
			// The connection has a deadline.
			if _, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != status {
				t.Errorf("answered %s, whose body ends with %v; want status %d and its end", resp.Status, err, status)
			}
		})
	}
}
