// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"tailscale.com/client/tailscale/apitype"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// malloryAddr is mallory's phone.
const malloryAddr = "100.64.0.3"

// stalling returns a node that knows alice and mallory, and that does not answer
// while stalled says so. A tailnet node's LocalAPI is reached through memory and
// cannot be made to stall from outside, so this one is injected.
func stalling(stalled *atomic.Bool) *tailnet.Node {
	node := aliceNode()
	node.Ask = func(ctx context.Context, remote, _ netip.Addr) (*apitype.WhoIsResponse, error) {
		if stalled.Load() {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		if remote == netip.MustParseAddr(malloryAddr) {
			return mallory(), nil
		}
		return whoIs(readers), nil
	}
	return node
}

// While LocalAPI stalls, requests are refused within a moment, open ones go on for
// the grace, nobody is taken for somebody else, and nothing is left of it: a
// goroutine would keep the test from ending.
func TestWhileLocalAPIStallsRequestsAreRefusedAndOpenOnesGoOnForTheGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var stalled atomic.Bool
		h := newHandler(t, caddyfile.Config{}, stalling(&stalled))
		callers := map[string]string{aliceAddr: "alice@example.com", malloryAddr: "mallory@example.com"}
		kept := make(map[string]context.Context)
		for addr := range callers {
			kept[addr] = fromPeer(httptest.NewRequest(http.MethodGet, "https://k8s/api", nil), addr).Context()
		}
		// round sends a request of each caller over the connection that is kept and
		// one over a new one, all at once, and fails unless they are let through as
		// the flags say.
		round := func(overKept, overNew bool) {
			t.Helper()
			done := make(chan struct{})
			for addr, user := range callers {
				for _, over := range []struct {
					ctx    context.Context
					passes bool
				}{
					{context.WithValue(kept[addr], caddy.ReplacerCtxKey, caddy.NewReplacer()), overKept},
					{fromPeer(httptest.NewRequest(http.MethodGet, "https://k8s/api", nil), addr).Context(), overNew},
				} {
					go func() {
						defer func() { done <- struct{}{} }()
						began := time.Now()
						resp, got := serve(t, h, httptest.NewRequest(http.MethodGet, "https://k8s/api", nil).WithContext(over.ctx))
						switch {
						case (got != nil) != over.passes:
							t.Errorf("%s: answered %s; want it to be let through: %v", user, resp.Status, over.passes)
						case got != nil && !slices.Equal(got.Header["Impersonate-User"], []string{user}):
							t.Errorf("%s: passed on as %v", user, got.Header["Impersonate-User"])
						case got == nil && (resp.StatusCode != http.StatusServiceUnavailable || time.Since(began) > tailnet.WhoIsTimeout):
							t.Errorf("%s: answered %s after %v; want 503 within %v", user, resp.Status, time.Since(began), tailnet.WhoIsTimeout)
						}
					}()
				}
			}
			for range 2 * len(callers) {
				<-done
			}
		}
		ended := make(chan error, 1)
		go func() {
			_ = h.ServeHTTP(noAnswer{}, newRequest("GET", "https://k8s/api?watch=true"), caddyNext(func(r *http.Request) {
				<-r.Context().Done()
				ended <- context.Cause(r.Context())
			}))
		}()
		synctest.Wait() // until it is open

		round(true, true)
		stalled.Store(true)
		time.Sleep(time.Millisecond) // so that new connections are newer than the last answers
		round(true, false)
		time.Sleep(h.TTL())
		began := time.Now()
		for time.Since(began) < h.Grace()/2 {
			round(false, false)
			time.Sleep(time.Second)
		}
		select {
		case err := <-ended:
			t.Fatalf("the open request has ended: %v", err)
		default:
		}
		stalled.Store(false)
		round(true, true)
		time.Sleep(2 * h.Interval())

		stalled.Store(true)
		began = time.Now()
		err := <-ended
		if took := time.Since(began); took < h.Grace()-h.Interval() || took > h.Grace()+2*h.Interval() {
			t.Errorf("the open request ended after %v; want about %v", took, h.Grace())
		}
		if err == nil || !strings.Contains(err.Error(), "could not be checked") {
			t.Errorf("the cause is %v", err)
		}
	})
}
