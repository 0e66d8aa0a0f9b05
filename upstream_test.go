// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
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

func TestBuffersInTheWayOfStreamsAreWarnedAbout(t *testing.T) {
	const ours, proxy = `{"handler":"tailscale_impersonate"}`, `{"handler":"reverse_proxy"}`
	for _, tt := range []struct{ name, handlers, want string }{
		{"nothing in the way", `[` + ours + `,` + proxy + `]`, ""},
		{"encode", `[` + ours + `,{"handler":"encode"},` + proxy + `]`, "encode"},
		{"encode around a subroute", `[{"handler":"encode"},{"handler":"subroute","routes":[{"handle":[` + ours + `,` + proxy + `]}]}]`, "encode"},
		{"response buffers", `[` + ours + `,{"handler":"reverse_proxy","response_buffers":1024}]`, "response_buffers of reverse_proxy"},
		{"request buffers", `[` + ours + `,{"handler":"subroute","routes":[{"handle":[{"handler":"reverse_proxy","request_buffers":-1}]}]}]`, "request_buffers of reverse_proxy"},
		{"another route's business", `[{"handler":"encode"},` + proxy + `]`, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var handlers []json.RawMessage
			if err := json.Unmarshal([]byte(tt.handlers), &handlers); err != nil {
				t.Fatal(err)
			}
			core, logs := observer.New(zap.WarnLevel)
			warnOfBuffers(zap.New(core), &caddyhttp.Server{Routes: caddyhttp.RouteList{{HandlersRaw: handlers}}})
			got := ""
			for _, entry := range logs.All() {
				for _, cause := range entry.ContextMap()["because_of"].([]any) {
					got += cause.(string)
				}
			}
			if got != tt.want {
				t.Errorf("warned because of %q; want %q", got, tt.want)
			}
		})
	}
}
