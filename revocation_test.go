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
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// Open requests end when their caller loses a group, and say why.
func TestRevocation_OpenRequestEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node := proxytest.NewChangingNode()
		h := newHandler(t, caddyfile.Config{}, node.Node)
		r := proxytest.NewConn()()
		ended := make(chan error)
		watch := proxytest.NextFunc(func(r *http.Request) {
			<-r.Context().Done()
			ended <- context.Cause(r.Context())
		})
		go func() { _ = h.ServeHTTP(proxytest.NoAnswer{}, r, watch) }()
		time.Sleep(time.Minute)
		select {
		case err := <-ended:
			t.Fatalf("ended too soon: %v", err)
		default:
		}
		node.Says(proxytest.WhoIs(), nil)
		withdrawn := time.Now()
		err := <-ended
		if took := time.Since(withdrawn); took > h.Interval() {
			t.Errorf("it took %v; want at most %v", took, h.Interval())
		}
		if err == nil || err.Error() != "access was withdrawn: alice@example.com is no longer in group tailnet-readers" {
			t.Errorf("the cause is %v", err)
		}
	})
}

// Once recording is enforced, connections that may be unrecorded sessions end. Other
// requests continue.
func TestRevocation_UnrecordedSessionEndsOnceEnforced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node := proxytest.NewChangingNode()
		h := newHandler(t, caddyfile.Config{}, node.Node)
		session, watch := proxytest.NewConn()(), proxytest.NewConn()()
		session.Header.Set("Connection", "Upgrade")
		session.Header.Set("Upgrade", "websocket")
		leave := make(chan struct{})
		// open sends r, and returns why it ended, nil if it did not before leave was closed.
		open := func(r *http.Request) <-chan error {
			ended := make(chan error, 1)
			go func() {
				_ = h.ServeHTTP(proxytest.NoAnswer{}, r, proxytest.NextFunc(func(r *http.Request) {
					select {
					case <-r.Context().Done():
						ended <- context.Cause(r.Context())
					case <-leave:
						ended <- nil
					}
				}))
			}()
			return ended
		}
		ended, watching := open(session), open(watch)
		time.Sleep(time.Minute)
		node.Says(proxytest.WhoIs(proxytest.Readers, proxytest.SessionsEnforced), nil)
		time.Sleep(time.Minute)
		close(leave)
		if err := <-ended; err == nil || !strings.Contains(err.Error(), "recording is now enforced") {
			t.Errorf("the cause is %v", err)
		}
		if err := <-watching; err != nil {
			t.Errorf("the watch has ended as well: %v", err)
		}
	})
}

// A request that has ended costs no further question.
func TestRevocation_EndedRequestIsNotRechecked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node := proxytest.NewChangingNode()
		h := newHandler(t, caddyfile.Config{}, node.Node)
		proxytest.CheckUser(t, h, proxytest.NewConn()(), "alice@example.com")
		time.Sleep(3 * h.Interval())
		if n := node.Asked(); n != 1 {
			t.Errorf("the node was asked %d times; want once", n)
		}
	})
}

// While LocalAPI stalls, requests are refused soon and open requests continue for the
// grace period. No caller is mistaken for another, and no goroutine is left: it would
// keep the test from ending.
func TestRevocation_StallKeepsOpenRequestsForGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var stalled atomic.Bool
		h := newHandler(t, caddyfile.Config{}, stalling(&stalled))
		callers := map[string]string{proxytest.AliceAddr: "alice@example.com", proxytest.MalloryAddr: "mallory@example.com"}
		kept := make(map[string]context.Context)
		for addr := range callers {
			kept[addr] = proxytest.FromPeer(httptest.NewRequest(http.MethodGet, "https://k8s/api", nil), addr).Context()
		}
		// round sends requests of each caller, one over the kept connection and one
		// over a new one, all at once. It fails unless they pass as the flags say.
		round := func(overKept, overNew bool) {
			t.Helper()
			done := make(chan struct{})
			for addr, user := range callers {
				for _, over := range []struct {
					ctx    context.Context
					passes bool
				}{
					{context.WithValue(kept[addr], caddy.ReplacerCtxKey, caddy.NewReplacer()), overKept},
					{proxytest.FromPeer(httptest.NewRequest(http.MethodGet, "https://k8s/api", nil), addr).Context(), overNew},
				} {
					go func() {
						defer func() { done <- struct{}{} }()
						began := time.Now()
						resp, got := proxytest.Serve(t, h, httptest.NewRequest(http.MethodGet, "https://k8s/api", nil).WithContext(over.ctx))
						switch {
						case (got != nil) != over.passes:
							t.Errorf("%s: answered %s; want it to pass: %v", user, resp.Status, over.passes)
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
			_ = h.ServeHTTP(proxytest.NoAnswer{}, proxytest.NewRequest("GET", "https://k8s/api?watch=true"), proxytest.NextFunc(func(r *http.Request) {
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

// stalling returns a node that knows alice and mallory, and does not answer while stalled
// is true. A tailnet node's LocalAPI is in its own process and cannot be made to stall
// from outside, so this node is a fake.
func stalling(stalled *atomic.Bool) *tailnet.Node {
	node := proxytest.AliceNode()
	node.Ask = func(ctx context.Context, remote, _ netip.Addr) (*apitype.WhoIsResponse, error) {
		if stalled.Load() {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		if remote == netip.MustParseAddr(proxytest.MalloryAddr) {
			return proxytest.WhoIsMallory(), nil
		}
		return proxytest.WhoIs(proxytest.Readers), nil
	}
	return node
}
