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
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

const counter = "revoked_requests_total"

// A counter that begins with its first event looks to Prometheus as if there was none.
func TestMetric_HasEachReasonFromStart(t *testing.T) {
	counts := proxytest.Counts(t, counter)
	for _, reason := range []Reason{LostGroup, LostTag, OtherUser, Refused, Unconfirmed, Enforced, Dropped} {
		if _, ok := counts[counter+" "+string(reason)]; !ok {
			t.Errorf("there is no count for %s in %v", reason, counts)
		}
	}
}

func TestMetric_CountsRequests(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		since := proxytest.CountsSince(t, counter)
		n := newNetwork()
		tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
		for range 2 {
			defer tracker.track(t.Context(), caller(connect(t, aliceAddr), alice, time.Now()), requestinfo.Watch).Close()
		}
		defer tracker.track(t.Context(), caller(connect(t, bobAddr), bob, time.Now()), requestinfo.Watch).Close()
		n.knows(aliceAddr, nil)
		time.Sleep(interval)
		synctest.Wait()
		registry.Drop(bobAddr, nodeAddr, bob.Node, "an operator said so")
		want := map[string]float64{counter + " refused": 2, counter + " dropped": 1}
		if diff := cmp.Diff(want, since()); diff != "" {
			t.Errorf("counted (-want +got):\n%s", diff)
		}
	})
}

// A collector that describes nothing can be registered twice, and then no metric is read.
func TestRegistry_DescribesItsMetric(t *testing.T) {
	registry := prometheus.NewRegistry()
	streams := new(Registry)
	registry.MustRegister(streams)
	if err := registry.Register(streams); !errors.As(err, &prometheus.AlreadyRegisteredError{}) {
		t.Errorf("got %v; want that it is registered already", err)
	}
}

func TestOpen_CountsOpenRequests(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		tracker := registry.NewGeneration().NewTracker(nil, nil, newNetwork().policy())
		c := connect(t, aliceAddr)
		var requests []*Request
		for _, kind := range []requestinfo.Kind{requestinfo.Watch, requestinfo.Watch, requestinfo.Short} {
			requests = append(requests, tracker.track(t.Context(), caller(c, alice, time.Now()), kind))
		}
		for range 2 { // it does not keep what it locks
			if diff := cmp.Diff(map[requestinfo.Kind]int{requestinfo.Watch: 2, requestinfo.Short: 1}, registry.Open()); diff != "" {
				t.Errorf("open (-want +got):\n%s", diff)
			}
		}
		for _, r := range requests {
			r.Close()
		}
		if open := registry.Open(); len(open) > 0 {
			t.Errorf("with nothing open, got %v", open)
		}
	})
}

// What waits for the context of a stream must not wait for that of its connection.
func TestClose_EndsContextOfStream(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		tracker := registry.NewGeneration().NewTracker(nil, nil, newNetwork().policy())
		c := connect(t, aliceAddr)
		r := tracker.track(c.ctx, caller(c, alice, time.Now()), requestinfo.Watch)
		r.Close()
		if r.Err() == nil {
			t.Error("the context goes on")
		}
		c.wantOpen(t)
	})
}

func TestCauses_AreNothingButCancelled(t *testing.T) {
	for _, cause := range []error{&Revoked{}, Exiting} {
		if !errors.Is(cause, context.Canceled) {
			t.Errorf("%T is no context.Canceled", cause)
		}
		if errors.Is(cause, context.DeadlineExceeded) {
			t.Errorf("%T is a context.DeadlineExceeded as well", cause)
		}
	}
}

// After two sites became two others, a caller's request may be that of either.
func TestReload_EachPolicyHasToAllow(t *testing.T) {
	// policies are those of one request.
	policies := func(registry *Registry, of ...Policy) *Tracker {
		before, after := registry.NewGeneration(), registry.NewGeneration()
		tracker := before.NewTracker([]string{":443"}, "before", of[0])
		before.Run()
		for i, policy := range of {
			after.NewTracker([]string{":443"}, i, policy)
		}
		after.Run()
		return tracker
	}
	t.Run("a request that violates both is one request", func(t *testing.T) {
		inBubble(t, func(t *testing.T, registry *Registry) {
			n := without(aliceAddr)
			tracker := policies(registry, n.policy(), n.policy())
			defer tracker.track(t.Context(), caller(connect(t, aliceAddr), alice, time.Now()), requestinfo.Watch).Close()
			time.Sleep(interval)
			synctest.Wait()
			if _, ended := n.seen(); len(ended) != 1 || ended[0].Requests != 1 {
				t.Errorf("reported %+v; want one request", ended)
			}
		})
	})
	t.Run("one that answers does not make up for one that does not", func(t *testing.T) {
		inBubble(t, func(t *testing.T, registry *Registry) {
			silent, answers := newNetwork(), newNetwork()
			silent.fails(errors.New("no answer"))
			tracker := policies(registry, silent.policy(), answers.policy())
			c := connect(t, aliceAddr)
			defer tracker.track(t.Context(), caller(c, alice, time.Now()), requestinfo.Watch).Close()
			time.Sleep(grace + interval)
			synctest.Wait()
			c.wantEnded(t, Unconfirmed)
		})
	})
}

// Whoever is another user is told so, and not that a session is not recorded.
func TestCheck_LostAccessComesBeforeRecording(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
		c := connect(t, aliceAddr)
		request := tracker.track(t.Context(), caller(c, alice, time.Now()), requestinfo.Exec)
		defer request.Close()
		request.endWhenEnforced()
		enforced := *bob
		enforced.Recording.Enforce = true
		n.knows(aliceAddr, &enforced)
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, OtherUser)
	})
}

// The API server is not asked about a request that has ended, and is still being closed.
func TestActAs_EndedRequestIsNotReviewed(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		tracker := registry.NewGeneration().NewTracker(nil, nil, newNetwork().policy())
		reviews := 0
		c := act(t, tracker, func(context.Context, *impersonate.Identity, time.Time) error {
			reviews++
			return apistatus.Forbidden(apistatus.Impersonation, "alice may not act as bob")
		})
		time.Sleep(10 * interval)
		synctest.Wait()
		c.wantEnded(t, Refused)
		if reviews != 1 {
			t.Errorf("%d reviews; want one", reviews)
		}
	})
}

// Audit fields that a config turns on tell nothing about a request that has none.
func TestCheck_UIDThatComesUpEndsNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		told := *alice
		told.UID = "n1"
		n.knows(aliceAddr, &told)
		tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
		c := connect(t, aliceAddr)
		defer tracker.track(t.Context(), caller(c, alice, time.Now()), requestinfo.Watch).Close()
		time.Sleep(interval)
		synctest.Wait()
		c.wantOpen(t)
	})
}

// The text is what clients read, and the log.
func TestStopping_Text(t *testing.T) {
	for _, why := range []Stopping{Exiting, Leaving} {
		if why.Error() != string(why) || why == "" {
			t.Errorf("the error reads %q", why.Error())
		}
	}
}

// A watch over WebSocket is written to as well, so its body has to stay what it is.
func TestEndWhenStopping_LeavesUpgradedConnection(t *testing.T) {
	r := httptest.NewRequest(http.MethodGet, "/api/v1/pods?watch=true", nil)
	body := struct{ io.ReadCloser }{io.NopCloser(strings.NewReader(""))}
	resp := &http.Response{StatusCode: http.StatusSwitchingProtocols, Body: body}
	EndWhenStopping(r, resp)
	if resp.Body != io.ReadCloser(body) {
		t.Errorf("the body is a %T", resp.Body)
	}
}
