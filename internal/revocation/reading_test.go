// SPDX-License-Identifier: Apache-2.0

package revocation

import (
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
)

// readersAre lets the members of a group read recordings.
func readersAre(group string) func(*impersonate.Identity) error {
	return func(id *impersonate.Identity) error {
		if !slices.Contains(id.Groups, group) {
			return apistatus.Forbidden(apistatus.NotReader, "%s may not read recordings", id.User)
		}
		return nil
	}
}

// A request for recordings ends once its caller may no longer read them, by a config that
// names other readers or none as well. Other requests of the caller have nothing to do
// with that.
func TestReading_EndsWithRightToRead(t *testing.T) {
	for _, tt := range []struct {
		name  string
		read  func(*impersonate.Identity) error
		ended bool
	}{
		{"the same readers", readersAre("a"), false},
		{"other readers", readersAre("c"), true},
		{"no page", nil, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, registry *Registry) {
				n := newNetwork()
				policy := n.policy()
				policy.MayRead = readersAre("a")
				first := registry.NewGeneration()
				tracker := first.NewTracker([]string{"l"}, 1, policy)
				first.Run()
				reader, other := connect(t, aliceAddr), connect(t, aliceAddr)
				request := tracker.TrackReader(httptest.NewRequestWithContext(reader.ctx, "GET", "/recordings", nil), caller(reader, alice, time.Now()))
				defer request.Close()
				watch := tracker.Track(httptest.NewRequestWithContext(other.ctx, "GET", "/api?watch=true", nil), caller(other, alice, time.Now()))
				defer watch.Close()
				time.Sleep(time.Minute)
				reader.wantOpen(t)
				next := registry.NewGeneration()
				policy.MayRead = tt.read
				next.NewTracker([]string{"l"}, 2, policy)
				next.Run()
				time.Sleep(time.Minute)
				if tt.ended {
					reader.wantEnded(t, Refused)
				} else {
					reader.wantOpen(t)
				}
				other.wantOpen(t)
			})
		})
	}
}

// A reader who asks for an optional group reads on while it is granted, though it is held
// back from those who do not ask.
func TestReading_GoesOnWithGroupThatWasAskedFor(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		granted := &impersonate.Identity{User: alice.User, Groups: []string{"b"}, HeldBack: []string{"a"}}
		n.knows(aliceAddr, granted)
		policy := n.policy()
		policy.MayRead = readersAre("a")
		first := registry.NewGeneration()
		tracker := first.NewTracker([]string{"l"}, 1, policy)
		first.Run()
		reader := connect(t, aliceAddr)
		asking := &impersonate.Identity{User: alice.User, Groups: []string{"a"}, HeldBack: []string{"b"}, Chosen: true}
		request := tracker.TrackReader(httptest.NewRequestWithContext(reader.ctx, "GET", "/recordings", nil), caller(reader, asking, time.Now()))
		defer request.Close()
		time.Sleep(time.Minute)
		reader.wantOpen(t)
		n.knows(aliceAddr, &impersonate.Identity{User: alice.User, Groups: []string{"b"}})
		time.Sleep(time.Minute)
		reader.wantEnded(t, LostGroup)
	})
}
