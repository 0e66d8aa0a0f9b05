// SPDX-License-Identifier: Apache-2.0

package revocation

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

const execURL = "/api/v1/namespaces/default/pods/web/exec"

func TestTrack_OnlyUnrecordedUpgradesEndWhenEnforced(t *testing.T) {
	for _, tt := range []struct {
		name              string
		upgrade, enforced bool // when the request begins
		ends              bool
	}{
		{"upgrade", true, false, true},
		{"upgrade that is recorded already", true, true, false},
		{"no upgrade", false, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, registry *Registry) {
				n := newNetwork()
				policy := n.policy()
				policy.MustRecord = func(_, now *impersonate.Identity) bool { return now.Recording.Enforce }
				tracker := registry.NewGeneration().NewTracker(nil, nil, policy)
				c := connect(t, aliceAddr)
				r := httptest.NewRequestWithContext(c.ctx, http.MethodPost, execURL, nil)
				if tt.upgrade {
					r.Header.Set("Connection", "Upgrade")
				}
				id := *alice
				id.Recording.Enforce = tt.enforced
				tracked := tracker.Track(r, caller(c, &id, time.Now()))
				defer tracked.Close()
				enforced := *alice
				enforced.Recording.Enforce = true
				n.knows(aliceAddr, &enforced)
				time.Sleep(interval)
				synctest.Wait()
				if tt.ends {
					c.wantEnded(t, Enforced)
				} else {
					c.wantOpen(t)
				}
			})
		})
	}
}

func TestTrack_GrantedRightIsAskedAboutAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		tracker := registry.NewGeneration().NewTracker(nil, nil, newNetwork().policy())
		c := connect(t, aliceAddr)
		id := *alice
		id.ActAs = &impersonate.ActAsRequest{Target: &impersonate.Target{User: "bob"}}
		tracked := tracker.Track(httptest.NewRequestWithContext(c.ctx, http.MethodGet, "/api", nil), caller(c, &id, time.Now()))
		defer tracked.Close()
		id.ActAs.Granted(func(context.Context, *impersonate.Identity, time.Time) error {
			return apistatus.Forbidden(apistatus.Impersonation, "alice may not act as bob")
		})
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Refused)
	})
}

func TestTrack_ContextHasIdentity(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		tracker := registry.NewGeneration().NewTracker(nil, nil, newNetwork().policy())
		c := connect(t, aliceAddr)
		tracked := tracker.Track(httptest.NewRequestWithContext(c.ctx, http.MethodGet, "/api", nil), caller(c, alice, time.Now()))
		defer tracked.Close()
		if id, ok := impersonate.FromContext(tracked); !ok || id != alice {
			t.Errorf("got identity %+v", id)
		}
	})
}

// Settings that were in use before count as new once they have been gone.
func TestReload_SettingsThatComeBackApply(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		generation := func(settings string, n *network) *Tracker {
			g := registry.NewGeneration()
			tracker := g.NewTracker([]string{":443"}, settings, n.policy())
			g.Run()
			return tracker
		}
		tracker := generation("a", newNetwork())
		c := connect(t, aliceAddr)
		defer tracker.track(t.Context(), caller(c, alice, time.Now()), requestinfo.Watch).Close()
		generation("b", newNetwork())
		generation("a", without(aliceAddr))
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Refused)
	})
}

// The same settings on another listener are another site's.
func TestReload_SettingsMoveToAnotherListener(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		before, after := registry.NewGeneration(), registry.NewGeneration()
		tracker := before.NewTracker([]string{":443"}, "a", newNetwork().policy())
		before.NewTracker([]string{":8443"}, "b", newNetwork().policy())
		before.Run()
		c := connect(t, aliceAddr)
		defer tracker.track(t.Context(), caller(c, alice, time.Now()), requestinfo.Watch).Close()
		after.NewTracker([]string{":443"}, "b", without(aliceAddr).policy())
		after.Run()
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Refused)
	})
}

func TestReload_TrackersWithoutRequestsGo(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		for range 10 {
			g := registry.NewGeneration()
			g.NewTracker([]string{":443"}, 0, newNetwork().policy())
			g.Run()
			registry.NewGeneration().Run() // a config without a handler
		}
		if n := len(registry.trackers); n > 0 {
			t.Errorf("%d trackers are left", n)
		}
	})
}

// The API server's last words may come together with the end of its answer.
func TestEndWhenStopping_KeepsWhatComesWithEnd(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(Exiting)
	for _, last := range []string{"last words", ""} {
		r := httptest.NewRequestWithContext(ctx, http.MethodGet, "/api/v1/namespaces/default/pods/web/log?follow=true", nil)
		resp := &http.Response{
			Header: http.Header{"Content-Type": {"text/plain"}},
			Body:   io.NopCloser(iotest.DataErrReader(io.MultiReader(strings.NewReader(last), iotest.ErrReader(Exiting)))),
		}
		EndWhenStopping(r, resp)
		var got strings.Builder
		var err error
		for p := make([]byte, 1000); err == nil; {
			var n int
			n, err = resp.Body.Read(p)
			got.Write(p[:n])
			if n == 0 && err == nil {
				t.Error("a call of Read returns nothing, and no error")
			}
		}
		if want := last + "\nThe log goes on, but the proxy is stopping.\n"; got.String() != want || !errors.Is(err, context.Canceled) {
			t.Errorf("got %q, %v; want %q and a canceled context", got.String(), err, want)
		}
	}
}
