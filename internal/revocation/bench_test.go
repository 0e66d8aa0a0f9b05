// SPDX-License-Identifier: Apache-2.0

package revocation

import (
	"net/netip"
	"testing"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// BenchmarkTrack measures the list of open requests, whose one lock each request takes
// twice: shared, as a process has it, and own, where each processor has a list to itself.
// The difference is what requests wait for one another: run it with -cpu 1,2,4,8,16,32.
func BenchmarkTrack(b *testing.B) {
	conn, err := tailnet.ConnFrom(tailnet.WithConn(b.Context(), netip.AddrPortFrom(aliceAddr, 1), nodeAddr))
	if err != nil {
		b.Fatal(err)
	}
	from := authn.Caller{Identity: alice, Conn: conn, Asked: time.Now()}
	newTracker := func() *Tracker {
		registry := &Registry{Hold: func() {}, Release: func() {}}
		return registry.NewGeneration().NewTracker([]string{":443"}, "a", Policy{Interval: time.Hour})
	}
	for _, tt := range []struct {
		name    string
		tracker func(shared *Tracker) *Tracker
	}{
		{"shared", func(shared *Tracker) *Tracker { return shared }},
		{"own", func(*Tracker) *Tracker { return newTracker() }},
	} {
		b.Run(tt.name, func(b *testing.B) {
			b.ReportAllocs()
			shared := newTracker()
			defer proxytest.ReportCPU(b)()
			b.RunParallel(func(pb *testing.PB) {
				tracker := tt.tracker(shared)
				for pb.Next() {
					tracker.track(b.Context(), from, requestinfo.Short).Close()
				}
			})
		})
	}
}
