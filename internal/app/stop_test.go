// SPDX-License-Identifier: Apache-2.0

package app

import (
	"context"
	"net/http/httptest"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/revocation"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// openWatch returns a registry with an open watch.
func openWatch(t *testing.T) (*revocation.Registry, *revocation.Request) {
	t.Helper()
	registry := &revocation.Registry{Hold: func() {}, Release: func() {}}
	tracker := registry.NewGeneration().NewTracker(nil, nil, revocation.Policy{Interval: time.Hour})
	r := httptest.NewRequestWithContext(tailnet.WithConn(t.Context(), netip.MustParseAddrPort("100.64.0.2:1"), netip.MustParseAddr("100.64.0.1")), "GET", "/api?watch=true", nil)
	conn, err := tailnet.ConnFrom(r.Context())
	if err != nil {
		t.Fatal(err)
	}
	return registry, tracker.Track(r, authn.Caller{Identity: new(impersonate.Identity), Conn: conn})
}

// Something that Caddy waits for hangs, or a request never ends.
func TestStop_EndsProcessAfterGracePeriod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.InfoLevel)
		registry := new(revocation.Registry)
		exited := make(chan struct{})
		s := &stop{
			requests: registry, logger: zap.New(core), closeNodes: func() {}, store: func(context.Context) {},
			delay: 5 * time.Second, grace: 30 * time.Second, exit: func() { close(exited) },
		}
		began := time.Now()
		s.run()
		if took := time.Since(began); took > 0 {
			t.Errorf("without a stream, Caddy had to wait for %v", took)
		}
		<-exited
		// Caddy has a second to exit by itself.
		if took, want := time.Since(began), 36*time.Second; took != want {
			t.Errorf("the process ends after %v; want %v", took, want)
		}
		if n := logs.FilterMessage("Caddy has not exited yet").Len(); n != 3 {
			t.Errorf("it was reported %d times what Caddy waits for; want 3", n)
		}
		last := logs.All()[logs.Len()-1]
		if fields := last.ContextMap(); last.Level != zap.ErrorLevel || fields["open_requests"] == nil {
			t.Errorf("the last message is %v with %v", last.Entry, fields)
		}
	})
}

// During the shutdown_delay, probes find out that Caddy exits, and new connections succeed.
func TestStop_StreamsEndBeforeNodesClose(t *testing.T) {
	for _, tt := range []struct{ delay, ends, closes time.Duration }{
		{0, 0, streamsTimeout},
		{time.Second, 0, streamsTimeout},
		{10 * time.Second, 7 * time.Second, 10 * time.Second},
	} {
		t.Run(tt.delay.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				registry, watch := openWatch(t)
				began := time.Now()
				closed, exited := make(chan time.Duration, 1), make(chan struct{})
				s := &stop{
					requests: registry, logger: zap.NewNop(), store: func(context.Context) {}, closeNodes: func() { closed <- time.Since(began) },
					delay: tt.delay, grace: time.Minute, exit: func() { close(exited) },
				}
				returned := make(chan time.Duration, 1)
				go func() { s.run(); returned <- time.Since(began) }()
				<-watch.Done()
				if took := time.Since(began); took != tt.ends {
					t.Errorf("the watch ends after %v; want %v", took, tt.ends)
				}
				if took := <-closed; took != tt.closes {
					t.Errorf("the nodes close after %v; want %v, as the watch is not over", took, tt.closes)
				}
				if took := <-returned; took > streamsTimeout || tt.delay == 0 && took < tt.closes {
					t.Errorf("Caddy has to wait for %v", took)
				}
				watch.Close()
				<-exited
			})
		})
	}
}
