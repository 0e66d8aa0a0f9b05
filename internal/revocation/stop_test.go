// SPDX-License-Identifier: Apache-2.0

package revocation

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

func TestStop_EndsStreamsOfAllConfigs(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		old, current := registry.NewGeneration(), registry.NewGeneration()
		oldTracker := old.NewTracker([]string{":443"}, "old", newNetwork().policy())
		currentTracker := current.NewTracker([]string{":8443"}, "current", newNetwork().policy())
		old.Run()
		a, b := connect(t, aliceAddr), connect(t, bobAddr)
		watch := oldTracker.track(a.ctx, caller(a, alice, time.Now()), requestinfo.Watch)
		current.Run()
		session := currentTracker.track(b.ctx, caller(b, bob, time.Now()), requestinfo.Exec)
		short := currentTracker.track(b.ctx, caller(b, bob, time.Now()), requestinfo.Short)
		time.AfterFunc(2*time.Second, func() {
			if short.Err() != nil {
				t.Error("a short request ends with the streams")
			}
			short.Close()
		})
		for _, stream := range []*Request{watch, session} {
			go func() {
				select {
				case <-stream.Done():
				case <-time.After(time.Minute):
				}
				time.Sleep(time.Second)
				stream.Close()
			}()
		}

		began := time.Now()
		stopped := make(chan map[requestinfo.Kind]int)
		go func() { stopped <- registry.Stop(time.Minute) }()
		synctest.Wait()
		if session.Err() == nil {
			t.Error("the streams go on")
		}
		if diff := cmp.Diff(map[requestinfo.Kind]int{requestinfo.Watch: 1, requestinfo.Exec: 1}, <-stopped); diff != "" {
			t.Errorf("ended (-want +got):\n%s", diff)
		}
		if took, want := time.Since(began), 2*time.Second+DeliveryTime; took < want || took > want+time.Second {
			t.Errorf("it took %v; want the two seconds of the short request, and the time for what is sent last", took)
		}
		for _, stream := range []*Request{watch, session} {
			cause := context.Cause(stream)
			if !errors.Is(cause, Exiting) || !errors.Is(cause, context.Canceled) {
				t.Errorf("a stream ends with %v", cause)
			}
		}
		if a.ctx.Err() == nil || b.ctx.Err() == nil {
			t.Error("a connection is left open, and a client would go on using it")
		}
	})
}

func TestEndOn_OtherAddressesContinue(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		tracker := registry.NewGeneration().NewTracker(nil, nil, newNetwork().policy())
		other := netip.MustParseAddr("100.64.9.9")
		gone, stays := connect(t, aliceAddr), connectTo(t, aliceAddr, other)
		watch := tracker.track(gone.ctx, caller(gone, alice, time.Now()), requestinfo.Watch)
		context.AfterFunc(watch, watch.Close)
		kept := tracker.track(stays.ctx, caller(stays, alice, time.Now()), requestinfo.Watch)
		defer kept.Close()
		began := time.Now()
		ended := registry.EndOn(func(dialled netip.AddrPort) bool { return dialled.Addr() != other }, Leaving, time.Minute)
		if diff := cmp.Diff(map[requestinfo.Kind]int{requestinfo.Watch: 1}, ended); diff != "" {
			t.Errorf("ended (-want +got):\n%s", diff)
		}
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("it took %v, though what goes on is on another address", took)
		}
		if cause := context.Cause(watch); !errors.Is(cause, Leaving) || gone.ctx.Err() == nil {
			t.Errorf("the watch on the node that closes ends with %v", cause)
		}
		if kept.Err() != nil || stays.ctx.Err() != nil {
			t.Error("the watch on another node ends")
		}
		if another := tracker.track(stays.ctx, caller(stays, alice, time.Now()), requestinfo.Watch); another.Err() != nil {
			t.Error("no other watch can be opened")
		} else {
			another.Close()
		}
	})
}

func TestStop_WaitsForLimitedTime(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		tracker := registry.NewGeneration().NewTracker(nil, nil, newNetwork().policy())
		c := connect(t, aliceAddr)
		defer tracker.track(c.ctx, caller(c, alice, time.Now()), requestinfo.Watch).Close()
		began := time.Now()
		registry.Stop(3 * time.Second)
		if took := time.Since(began); took > 3*time.Second+100*time.Millisecond {
			t.Errorf("it took %v; want 3 s", took)
		}
	})
}

func TestStop_WithoutRequestsDoesNotWait(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		tracker := registry.NewGeneration().NewTracker(nil, nil, newNetwork().policy())
		c := connect(t, aliceAddr)
		tracker.track(c.ctx, caller(c, alice, time.Now()), requestinfo.Watch).Close()
		began := time.Now()
		registry.Stop(3 * time.Second)
		if took := time.Since(began); took > 0 {
			t.Errorf("it took %v", took)
		}
	})
}

func TestStop_ConnectionsCloseAfterDelivery(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		tracker := registry.NewGeneration().NewTracker(nil, nil, newNetwork().policy())
		c := connect(t, aliceAddr)
		watch := tracker.track(c.ctx, caller(c, alice, time.Now()), requestinfo.Watch)
		context.AfterFunc(watch, watch.Close)
		began := time.Now()
		context.AfterFunc(c.ctx, func() {
			if took := time.Since(began); took < DeliveryTime {
				t.Errorf("the connection was closed after %v; want the client to be told before that", took)
			}
		})
		registry.Stop(3 * time.Second)
		synctest.Wait()
		if c.ctx.Err() == nil {
			t.Error("the connection is open; the client would send its next request to a node that is gone")
		}
	})
}

func TestStop_RefusesNewStreams(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		tracker := registry.NewGeneration().NewTracker(nil, nil, newNetwork().policy())
		registry.Stop(time.Second)
		c := connect(t, aliceAddr)
		for kind := range requestinfo.Kinds {
			r := tracker.track(c.ctx, caller(c, alice, time.Now()), kind)
			err := StoppingError(r)
			if refused := err != nil; refused == (kind == requestinfo.Short) {
				t.Errorf("%s: got %v", kind, err)
			}
			if status, ok := apistatus.From(err); err != nil && (!ok || status.Details.RetryAfterSeconds != 1) {
				t.Errorf("%s: got %v; want one that asks for a retry", kind, err)
			}
			r.Close()
		}
	})
}

// A request that ends in any other way is not refused.
func TestStoppingError_OnlyWhenStopping(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		tracker := registry.NewGeneration().NewTracker(nil, nil, newNetwork().policy())
		c := connect(t, aliceAddr)
		ctx, cancel := context.WithCancel(c.ctx)
		r := tracker.track(ctx, caller(c, alice, time.Now()), requestinfo.Watch)
		defer r.Close()
		cancel()
		if err := StoppingError(r); err != nil {
			t.Error(err)
		}
	})
}

func TestEndWhenStopping(t *testing.T) {
	failed := errors.New("connection lost")
	const watch, log = "/api/v1/pods?watch=true", "/api/v1/namespaces/default/pods/web/log?follow=true"
	const text = "text/plain"
	for _, tt := range []struct {
		name, target, media string
		cause               error // with which the request is cancelled, nil if it is not
		err                 error // with which the API server's body ends
		want                string
		ends                error // nil for a proper end
	}{
		{"watch", watch, "application/json", Exiting, Exiting, "{}", nil},
		{"watch that fails", watch, "application/json", nil, failed, "{}", failed},
		{"watch whose caller lost access", watch, "application/json", &Revoked{}, failed, "{}", failed},
		{"log", log, text, Exiting, Exiting, "{}\nThe log goes on, but the proxy is stopping.\n", context.Canceled},
		{"log that is over", log, text, Exiting, io.EOF, "{}", nil},
		{"log that fails", log, text, nil, failed, "{}", failed},
		{"log in another format", log, "application/json", Exiting, Exiting, "{}", context.Canceled},
		{"short", "/api/v1/pods", "application/json", Exiting, failed, "{}", failed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			if tt.cause != nil {
				cancel(tt.cause)
			}
			defer cancel(nil)
			r := httptest.NewRequestWithContext(ctx, http.MethodGet, tt.target, nil)
			resp := &http.Response{
				Header: http.Header{"Content-Type": {tt.media}},
				Body:   io.NopCloser(io.MultiReader(strings.NewReader("{}"), iotest.ErrReader(tt.err))),
			}
			EndWhenStopping(r, resp)
			got, err := io.ReadAll(iotest.OneByteReader(resp.Body))
			if string(got) != tt.want || !errors.Is(err, tt.ends) {
				t.Errorf("got %q, %v; want %q, %v", got, err, tt.want, tt.ends)
			}
		})
	}
}
