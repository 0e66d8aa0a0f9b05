// SPDX-License-Identifier: Apache-2.0

package revocation

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

const (
	interval = 5 * time.Second
	grace    = 30 * time.Second
)

var (
	nodeAddr  = netip.MustParseAddr("100.64.0.1")
	aliceAddr = netip.MustParseAddr("100.64.0.2")
	bobAddr   = netip.MustParseAddr("100.64.0.3")

	alice = &impersonate.Identity{User: "alice@example.com", Groups: []string{"a", "b"}}
	bob   = &impersonate.Identity{User: "bob@example.com", Groups: []string{"a"}}
)

// network is a fake tailnet that records questions and revocations.
type network struct {
	mu    sync.Mutex
	known map[netip.Addr]*impersonate.Identity
	err   error // instead of an answer
	asked map[netip.Addr]int
	ended []*Revoked
}

func newNetwork() *network {
	return &network{
		known: map[netip.Addr]*impersonate.Identity{aliceAddr: alice, bobAddr: bob},
		asked: make(map[netip.Addr]int),
	}
}

func (n *network) policy() Policy {
	return Policy{
		Interval: interval,
		Grace:    grace,
		Identify: func(_ context.Context, remote netip.Addr, dialled netip.AddrPort, since time.Time) (*impersonate.Identity, error) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.asked[remote]++
			switch id, ok := n.known[remote]; {
			case dialled != netip.AddrPortFrom(nodeAddr, 0):
				return nil, apistatus.Forbidden(apistatus.UnknownPeer, "asked with the local address %v", dialled)
			case since != time.Now(): // the bubble's clock stands still meanwhile
				return nil, apistatus.Forbidden(apistatus.UnknownPeer, "an answer from %v will do", since)
			case n.err != nil:
				return nil, n.err
			case !ok:
				return nil, apistatus.Forbidden(apistatus.UnknownPeer, "no peer with the address %v", remote)
			default:
				return id, nil
			}
		},
		Revoked: func(e *Revoked) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.ended = append(n.ended, e)
		},
	}
}

// knows sets the identity at an address; nil removes it.
func (n *network) knows(addr netip.Addr, id *impersonate.Identity) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if id == nil {
		delete(n.known, addr)
		return
	}
	n.known[addr] = id
}

func (n *network) fails(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.err = err
}

// seen returns how often each address was asked about, and the revocations.
func (n *network) seen() (asked map[netip.Addr]int, ended []*Revoked) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return maps.Clone(n.asked), slices.Clone(n.ended)
}

// client is the far end of a connection.
type client struct {
	ctx  context.Context // that of its requests
	conn *tailnet.Conn
}

func connect(t *testing.T, from netip.Addr) client {
	t.Helper()
	return connectTo(t, from, nodeAddr)
}

func connectTo(t *testing.T, from, to netip.Addr) client {
	t.Helper()
	ctx := tailnet.WithConn(t.Context(), netip.AddrPortFrom(from, 1), to)
	conn, err := tailnet.ConnFrom(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return client{ctx, conn}
}

// wantOpen fails t if the client's requests were ended.
func (c client) wantOpen(t *testing.T) {
	t.Helper()
	if err := context.Cause(c.ctx); err != nil {
		t.Errorf("the requests of %v were ended: %v", c.conn.Remote, err)
	}
}

// wantEnded fails t unless the client's requests were ended for that reason, with
// the words in the cause.
func (c client) wantEnded(t *testing.T, want Reason, words ...string) {
	t.Helper()
	var got *Revoked
	if !errors.As(context.Cause(c.ctx), &got) {
		t.Errorf("the requests of %v were not ended; want them to be, for %s", c.conn.Remote, want)
		return
	}
	if got.Reason != want {
		t.Errorf("the requests of %v were ended for %s; want %s", c.conn.Remote, got.Reason, want)
	}
	for _, word := range words {
		if !strings.Contains(got.Error(), word) {
			t.Errorf("the cause is %q; want it to mention %q", got, word)
		}
	}
}

// inBubble runs f with a fake clock and a registry, and fails t if the registry is not
// released once nothing is tracked.
func inBubble(t *testing.T, f func(t *testing.T, registry *Registry)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		held := 0
		registry := &Registry{Hold: func() { held++ }, Release: func() { held-- }}
		t.Cleanup(func() { // after those of f
			time.Sleep(time.Hour) // until the last check has found nothing
			registry.mu.Lock()
			defer registry.mu.Unlock()
			if held != 0 {
				t.Errorf("the registry is held %d times; want 0", held)
			}
		})
		f(t, registry)
	})
}

// caller is the caller that id is at the far end of c's connection.
func caller(c client, id *impersonate.Identity, asked time.Time) authn.Caller {
	return authn.Caller{Conn: c.conn, Identity: id, Asked: asked}
}

func TestCheck_LostAccessEndsRequestsWithinInterval(t *testing.T) {
	for _, tt := range []struct {
		name   string
		now    *impersonate.Identity
		reason Reason
		words  []string
	}{
		{"lost a group", &impersonate.Identity{User: alice.User, Groups: []string{"b"}}, LostGroup, []string{alice.User, "group a"}},
		{"lost all groups", &impersonate.Identity{User: alice.User}, LostGroup, []string{"group a"}},
		{"swapped a group", &impersonate.Identity{User: alice.User, Groups: []string{"a", "c"}}, LostGroup, []string{"group b"}},
		{"is another user", &impersonate.Identity{User: "mallory@example.com", Groups: alice.Groups}, OtherUser, []string{alice.User, "mallory@example.com"}},
		{"is unknown", nil, Refused, []string{"no peer with the address 100.64.0.2"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, registry *Registry) {
				n := newNetwork()
				tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
				of, other := connect(t, aliceAddr), connect(t, bobAddr)
				request := tracker.track(t.Context(), caller(of, alice, time.Now()), requestinfo.Watch)
				defer request.Close()
				defer tracker.track(t.Context(), caller(other, bob, time.Now()), requestinfo.Watch).Close()
				time.Sleep(time.Minute)
				of.wantOpen(t)
				n.knows(aliceAddr, tt.now)
				time.Sleep(interval)
				synctest.Wait()
				of.wantEnded(t, tt.reason, tt.words...)
				other.wantOpen(t)
				time.Sleep(time.Minute)
				if _, ended := n.seen(); len(ended) != 1 {
					t.Errorf("reported %d times; want once", len(ended))
				}
			})
		})
	}
}

// An admission policy may depend on UID and extra fields.
func TestCheck_LostTagOrUIDEndsRequests(t *testing.T) {
	told := func(uid string, tags ...string) *impersonate.Identity {
		return &impersonate.Identity{User: "ci.example.ts.net", UID: uid, Extra: map[string][]string{impersonate.ExtraTags: tags}}
	}
	for _, tt := range []struct {
		name   string
		now    *impersonate.Identity
		reason Reason // none: the request goes on
	}{
		{"lost a tag", told("n1", "tag:b"), LostTag},
		{"is another device of that name", told("n2", "tag:a", "tag:b"), OtherUser},
		{"has a tag more", told("n1", "tag:c", "tag:b", "tag:a"), ""},
		{"audit was turned off", &impersonate.Identity{User: "ci.example.ts.net"}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, registry *Registry) {
				n := newNetwork()
				n.knows(aliceAddr, tt.now)
				tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
				c := connect(t, aliceAddr)
				defer tracker.track(t.Context(), caller(c, told("n1", "tag:a", "tag:b"), time.Now()), requestinfo.Short).Close()
				time.Sleep(interval)
				synctest.Wait()
				if tt.reason == "" {
					c.wantOpen(t)
					return
				}
				c.wantEnded(t, tt.reason, "ci.example.ts.net")
			})
		})
	}
}

func TestCheck_EnforcedRecordingEndsUnrecordedSessions(t *testing.T) {
	for _, unrecorded := range []bool{true, false} {
		inBubble(t, func(t *testing.T, registry *Registry) {
			n := newNetwork()
			tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
			c := connect(t, aliceAddr)
			request := tracker.track(t.Context(), caller(c, alice, time.Now()), requestinfo.Exec)
			defer request.Close()
			if unrecorded {
				request.endWhenEnforced()
			}
			time.Sleep(time.Minute)
			c.wantOpen(t)
			enforced := *alice
			enforced.Recording.Enforce = true
			n.knows(aliceAddr, &enforced)
			time.Sleep(interval)
			synctest.Wait()
			if !unrecorded {
				c.wantOpen(t)
				return
			}
			c.wantEnded(t, Enforced, alice.User, "recorded")
		})
	}
}

// Whether a session has to be recorded can depend on the groups that it uses.
func TestCheck_PolicyDecidesWhichSessionsAreRecorded(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		policy := n.policy()
		policy.MustRecord = func(request, _ *impersonate.Identity) bool { return slices.Contains(request.Groups, "b") }
		tracker := registry.NewGeneration().NewTracker(nil, nil, policy)
		without := &impersonate.Identity{User: alice.User, Groups: []string{"a"}, HeldBack: []string{"b"}, Chosen: true}
		c, d := connect(t, aliceAddr), connect(t, aliceAddr)
		for conn, id := range map[client]*impersonate.Identity{c: alice, d: without} {
			request := tracker.track(t.Context(), caller(conn, id, time.Now()), requestinfo.Exec)
			defer request.Close()
			request.endWhenEnforced()
		}
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Enforced, alice.User)
		d.wantOpen(t)
	})
}

// What a request asked for may be held back from other requests, but not withdrawn.
func TestCheck_ChosenGroups(t *testing.T) {
	held := &impersonate.Identity{User: alice.User, Groups: []string{"a"}, HeldBack: []string{"b"}}
	chosen := &impersonate.Identity{User: alice.User, Groups: []string{"b"}, HeldBack: []string{"a"}, Chosen: true}
	for _, tt := range []struct {
		name     string
		had, has *impersonate.Identity
		ends     bool
	}{
		{"an optional group stays granted", chosen, held, false},
		{"it becomes one that is always used", chosen, &impersonate.Identity{User: alice.User, Groups: []string{"b"}}, false},
		{"it is withdrawn", chosen, &impersonate.Identity{User: alice.User, Groups: []string{"a"}}, true},
		{"a group that the request left out is withdrawn", chosen, &impersonate.Identity{User: alice.User, HeldBack: []string{"b"}}, false},
		{"a group that was used unasked becomes optional", alice, held, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, registry *Registry) {
				n := newNetwork()
				tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
				c := connect(t, aliceAddr)
				defer tracker.track(t.Context(), caller(c, tt.had, time.Now()), requestinfo.Watch).Close()
				n.knows(aliceAddr, tt.has)
				time.Sleep(interval)
				synctest.Wait()
				if tt.ends {
					c.wantEnded(t, LostGroup, "group b")
				} else {
					c.wantOpen(t)
				}
			})
		})
	}
}

func TestCheck_GainedGroupEndsNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
		c := connect(t, aliceAddr)
		defer tracker.track(t.Context(), caller(c, alice, time.Now()), requestinfo.Watch).Close()
		n.knows(aliceAddr, &impersonate.Identity{User: alice.User, Groups: []string{"c", "b", "a"}})
		time.Sleep(time.Minute)
		c.wantOpen(t)
	})
}

func TestCheck_GroupsAtBeginningOfRequestCount(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
		less := &impersonate.Identity{User: alice.User, Groups: []string{"b"}}
		c, d := connect(t, aliceAddr), connect(t, aliceAddr)
		defer tracker.track(t.Context(), caller(c, less, time.Now()), requestinfo.Watch).Close()
		defer tracker.track(t.Context(), caller(d, alice, time.Now()), requestinfo.Watch).Close()
		n.knows(aliceAddr, less)
		time.Sleep(time.Minute)
		c.wantOpen(t)
		d.wantEnded(t, LostGroup)
	})
}

func TestCheck_AsksOncePerCaller(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
		for range 1000 {
			defer tracker.track(t.Context(), caller(connect(t, aliceAddr), alice, time.Now()), requestinfo.Watch).Close()
		}
		defer tracker.track(t.Context(), caller(connect(t, bobAddr), bob, time.Now()), requestinfo.Watch).Close()
		time.Sleep(10*interval + interval/2)
		asked, _ := n.seen()
		if diff := cmp.Diff(map[netip.Addr]int{aliceAddr: 10, bobAddr: 10}, asked, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Errorf("questions in ten intervals (-want +got):\n%s", diff)
		}
	})
}

func TestCheck_ShortRequestsAskNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
		for range 1000 {
			tracker.track(t.Context(), caller(connect(t, aliceAddr), alice, time.Now()), requestinfo.Watch).Close()
			time.Sleep(101 * time.Millisecond) // a check, after intervals of 5 s, falls between two of them
		}
		time.Sleep(time.Minute)
		if asked, _ := n.seen(); len(asked) > 0 {
			t.Errorf("asked %v times; want none", asked)
		}
		registry.mu.Lock()
		defer registry.mu.Unlock()
		if tracker.armed {
			t.Error("a check is due, and there is nothing to check")
		}
	})
}

func TestCheck_UnansweredCallerKeepsRequestsForGrace(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
		c := connect(t, aliceAddr)
		defer tracker.track(t.Context(), caller(c, alice, time.Now()), requestinfo.Watch).Close()
		time.Sleep(interval)
		synctest.Wait() // the last check that succeeds
		n.fails(apistatus.TryAgain(apistatus.NoAnswer, "no answer"))
		time.Sleep(grace)
		synctest.Wait()
		c.wantOpen(t)
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Unconfirmed, alice.User, "30s", "no answer")
	})
}

func TestCheck_SuccessRestartsGrace(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
		c := connect(t, aliceAddr)
		defer tracker.track(t.Context(), caller(c, alice, time.Now()), requestinfo.Watch).Close()
		for range 5 {
			n.fails(errors.New("no answer"))
			time.Sleep(grace - interval)
			n.fails(nil)
			time.Sleep(interval)
			synctest.Wait()
		}
		c.wantOpen(t)
	})
}

// The request may have been let in by a cached answer.
func TestCheck_GraceStartsAtAnswer(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		n.fails(apistatus.TryAgain(apistatus.NoAnswer, "no answer"))
		tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
		c := connect(t, aliceAddr)
		defer tracker.track(t.Context(), caller(c, alice, time.Now().Add(-2*interval)), requestinfo.Watch).Close()
		time.Sleep(grace - 2*interval)
		synctest.Wait()
		c.wantOpen(t)
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Unconfirmed, alice.User)
	})
}

// Grants may depend on the address that was dialled.
func TestCheck_DialledAddressesAreSeparate(t *testing.T) {
	otherAddr := netip.MustParseAddr("100.64.0.9") // about which nobody gets in
	for _, last := range []netip.Addr{nodeAddr, otherAddr} {
		t.Run("last to "+last.String(), func(t *testing.T) {
			inBubble(t, func(t *testing.T, registry *Registry) {
				n := newNetwork()
				tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
				c, other := connectTo(t, aliceAddr, nodeAddr), connectTo(t, aliceAddr, otherAddr)
				clients := []client{c, other}
				if last == nodeAddr {
					slices.Reverse(clients)
				}
				for _, c := range clients {
					defer tracker.track(t.Context(), caller(c, alice, time.Now()), requestinfo.Watch).Close()
				}
				want := []Client{
					{Remote: aliceAddr, Local: nodeAddr, Identity: alice, Open: map[requestinfo.Kind]int{requestinfo.Watch: 1}},
					{Remote: aliceAddr, Local: otherAddr, Identity: alice, Open: map[requestinfo.Kind]int{requestinfo.Watch: 1}},
				}
				if diff := cmp.Diff(want, registry.Clients(), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
					t.Errorf("callers (-want +got):\n%s", diff)
				}
				time.Sleep(interval)
				synctest.Wait()
				c.wantOpen(t)
				other.wantEnded(t, Refused, "100.64.0.9")
			})
		})
	}
}

// act opens a request in which alice acts as bob while stillAllowed allows it.
func act(t *testing.T, tracker *Tracker, stillAllowed impersonate.StillAllowed) client {
	t.Helper()
	id := *alice
	id.ActAs = &impersonate.ActAsRequest{Target: &impersonate.Target{User: "bob"}}
	c := connect(t, aliceAddr)
	request := tracker.track(t.Context(), caller(c, &id, time.Now()), requestinfo.Short)
	t.Cleanup(request.Close)
	request.require(stillAllowed)
	return c
}

func TestActAs_WithdrawnRightEndsRequest(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
		var withdrawn atomic.Bool
		acting := act(t, tracker, func(_ context.Context, caller *impersonate.Identity, since time.Time) error {
			if caller != alice || since != time.Now() {
				t.Errorf("asked about %+v since %v; want the current caller", caller, since)
			}
			if withdrawn.Load() {
				return apistatus.Forbidden(apistatus.Impersonation, "alice may not act as bob")
			}
			return nil
		})
		other := act(t, tracker, func(context.Context, *impersonate.Identity, time.Time) error { return nil })
		herself := connect(t, aliceAddr)
		defer tracker.track(t.Context(), caller(herself, alice, time.Now()), requestinfo.Short).Close()
		time.Sleep(time.Minute)
		synctest.Wait()
		acting.wantOpen(t)
		withdrawn.Store(true)
		time.Sleep(interval)
		synctest.Wait()
		acting.wantEnded(t, Refused, "alice may not act as bob")
		other.wantOpen(t)
		herself.wantOpen(t)
	})
}

func TestActAs_CallerLosesGroup(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
		c := act(t, tracker, func(context.Context, *impersonate.Identity, time.Time) error { return nil })
		n.knows(aliceAddr, &impersonate.Identity{User: alice.User, Groups: []string{"b"}})
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, LostGroup, "group a")
	})
}

// Neither the policy nor the API server, which allow the target, make up for that.
func TestActAs_RefusedCallerLosesTarget(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		policy := n.policy()
		policy.CheckTarget = func(*impersonate.Target) error { return nil }
		tracker := registry.NewGeneration().NewTracker(nil, nil, policy)
		c := act(t, tracker, func(context.Context, *impersonate.Identity, time.Time) error { return nil })
		time.Sleep(interval)
		synctest.Wait()
		c.wantOpen(t)
		n.knows(aliceAddr, nil)
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Refused, "no peer with the address 100.64.0.2")
	})
}

func TestActAs_UnansweredReviewKeepsRequestForGrace(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
		c := act(t, tracker, func(ctx context.Context, _ *impersonate.Identity, _ time.Time) error {
			<-ctx.Done() // an API server that does not answer
			return ctx.Err()
		})
		time.Sleep(grace - interval)
		synctest.Wait()
		c.wantOpen(t)
		time.Sleep(4 * interval)
		synctest.Wait()
		c.wantEnded(t, Unconfirmed, alice.User)
	})
}

func TestActAs_ReloadUsesNewestPolicy(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		listeners := []string{"tailscale/k8s:443"}
		before := registry.NewGeneration()
		tracker := before.NewTracker(listeners, "before", n.policy())
		before.Run()
		c := act(t, tracker, func(context.Context, *impersonate.Identity, time.Time) error { return nil })
		policy := n.policy()
		policy.CheckTarget = func(target *impersonate.Target) error {
			return apistatus.Forbidden(apistatus.Impersonation, "nobody is %s here", target.User)
		}
		after := registry.NewGeneration()
		after.NewTracker(listeners, "after", policy)
		after.Run()
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Refused, "nobody is bob here")
	})
}

func TestCheck_CallersAreLookedUpConcurrently(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		policy := n.policy()
		silence := make(chan struct{})
		defer close(silence)
		identify := policy.Identify
		policy.Identify = func(ctx context.Context, remote netip.Addr, dialled netip.AddrPort, since time.Time) (*impersonate.Identity, error) {
			if remote == aliceAddr {
				<-silence
				return nil, errors.New("no answer")
			}
			return identify(ctx, remote, dialled, since)
		}
		tracker := registry.NewGeneration().NewTracker(nil, nil, policy)
		silent, c := connect(t, aliceAddr), connect(t, bobAddr)
		defer tracker.track(t.Context(), caller(silent, alice, time.Now()), requestinfo.Watch).Close()
		defer tracker.track(t.Context(), caller(c, bob, time.Now()), requestinfo.Watch).Close()
		n.knows(bobAddr, nil)
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Refused)
	})
}

func TestCheck_ConcurrentLookupsAreBounded(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		policy := n.policy()
		silence := make(chan struct{})
		defer close(silence)
		var asking atomic.Int32
		policy.Identify = func(context.Context, netip.Addr, netip.AddrPort, time.Time) (*impersonate.Identity, error) {
			asking.Add(1)
			<-silence
			return nil, errors.New("no answer")
		}
		tracker := registry.NewGeneration().NewTracker(nil, nil, policy)
		for addr := range lookups + 1 {
			from := netip.AddrFrom4([4]byte{100, 64, 1, byte(addr)})
			defer tracker.track(t.Context(), caller(connect(t, from), alice, time.Now()), requestinfo.Watch).Close()
		}
		time.Sleep(interval)
		synctest.Wait()
		if got := asking.Load(); got != lookups {
			t.Errorf("%d callers are asked about at a time; want %d", got, lookups)
		}
	})
}

func TestReload_WithoutReplacementOldPolicyStays(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		first, second := registry.NewGeneration(), registry.NewGeneration()
		tracker := first.NewTracker([]string{":443"}, "a", n.policy())
		second.NewTracker([]string{":8443"}, "a", newNetwork().policy())
		first.Run()
		c := connect(t, aliceAddr)
		defer tracker.track(t.Context(), caller(c, alice, time.Now()), requestinfo.Watch).Close()
		second.Run()
		n.knows(aliceAddr, nil)
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Refused)
	})
}

// without returns a network that does not know addr.
func without(addr netip.Addr) *network {
	n := newNetwork()
	n.knows(addr, nil)
	return n
}

func TestReload_NewestPolicyApplies(t *testing.T) {
	on := func(listeners ...string) []string { return listeners }
	type tracker struct {
		listeners []string
		settings  string
		denies    bool // alice, who has been let in by the first of the old trackers
	}
	for _, tt := range []struct {
		name     string
		old, new []tracker
		ended    bool
	}{
		{"the same", []tracker{{on(":443"), "a", false}}, []tracker{{on(":443"), "a", false}}, false},
		{"the same, and she has lost access", []tracker{{on(":443"), "a", false}}, []tracker{{on(":443"), "a", true}}, true},
		{"changed", []tracker{{on(":443"), "a", false}}, []tracker{{on(":443"), "b", true}}, true},
		{"changed in her favour", []tracker{{on(":443"), "a", true}}, []tracker{{on(":443"), "b", false}}, false},
		{"one more listener", []tracker{{on(":443"), "a", false}}, []tracker{{on(":80", ":443"), "b", true}}, true},
		{
			"two, one of them changed: hers", []tracker{{on(":443"), "a", false}, {on(":443"), "b", false}},
			[]tracker{{on(":443"), "b", false}, {on(":443"), "c", true}}, true,
		},
		{
			"two, one of them changed, in her favour: the one that stays has no say", []tracker{{on(":443"), "a", true}, {on(":443"), "b", true}},
			[]tracker{{on(":443"), "b", true}, {on(":443"), "c", false}}, false,
		},
		{
			"two, one of them changed: the other", []tracker{{on(":443"), "a", false}, {on(":443"), "b", false}},
			[]tracker{{on(":443"), "c", true}, {on(":443"), "a", false}}, false,
		},
		{
			"two, both changed: either may be hers", []tracker{{on(":443"), "a", false}, {on(":443"), "b", false}},
			[]tracker{{on(":443"), "c", false}, {on(":443"), "d", true}}, true,
		},
		{
			"two, both changed: the first may be hers", []tracker{{on(":443"), "a", false}, {on(":443"), "b", false}},
			[]tracker{{on(":443"), "c", true}, {on(":443"), "d", false}}, true,
		},
		{
			"two, both changed, and both let her in", []tracker{{on(":443"), "a", true}, {on(":443"), "b", true}},
			[]tracker{{on(":443"), "c", false}, {on(":443"), "d", false}}, false,
		},
		{"one more tracker beside the same", []tracker{{on(":443"), "a", false}}, []tracker{{on(":443"), "b", true}, {on(":443"), "a", false}}, false},
		{"another listener", []tracker{{on(":443"), "a", false}}, []tracker{{on(":8443"), "a", true}}, false},
		{"no tracker", []tracker{{on(":443"), "a", false}}, nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, registry *Registry) {
				config := func(trackers []tracker) (*Generation, []*Tracker) {
					c := registry.NewGeneration()
					var made []*Tracker
					for _, s := range trackers {
						n := newNetwork()
						if s.denies {
							n = without(aliceAddr)
						}
						made = append(made, c.NewTracker(s.listeners, s.settings, n.policy()))
					}
					return c, made
				}
				before, trackers := config(tt.old)
				before.Run()
				c := connect(t, aliceAddr)
				request := trackers[0].track(t.Context(), caller(c, alice, time.Now()), requestinfo.Watch)
				defer request.Close()
				after, _ := config(tt.new)
				after.Run()
				after.Run() // does nothing
				// A connection that the old config has accepted outlives it.
				late := connect(t, aliceAddr)
				defer trackers[0].track(t.Context(), caller(late, alice, time.Now()), requestinfo.Watch).Close()
				time.Sleep(interval)
				synctest.Wait()
				for _, c := range []client{c, late} {
					if tt.ended {
						c.wantEnded(t, Refused)
					} else {
						c.wantOpen(t)
					}
				}
			})
		})
	}
}

// A config without a handler, and then one with it again.
func TestReload_ConfigAfterNextApplies(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		first, none, second := registry.NewGeneration(), registry.NewGeneration(), registry.NewGeneration()
		tracker := first.NewTracker([]string{":443"}, "a", newNetwork().policy())
		second.NewTracker([]string{":443"}, "b", without(aliceAddr).policy())
		first.Run()
		c := connect(t, aliceAddr)
		defer tracker.track(t.Context(), caller(c, alice, time.Now()), requestinfo.Watch).Close()
		none.Run()
		time.Sleep(time.Minute)
		c.wantOpen(t)
		second.Run()
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Refused)
	})
}

// A connection that was accepted before may send a request long after its config went.
func TestReload_LateRequestUsesNewestPolicy(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		first, none, second := registry.NewGeneration(), registry.NewGeneration(), registry.NewGeneration()
		tracker := first.NewTracker([]string{":443"}, "a", newNetwork().policy())
		second.NewTracker([]string{":443"}, "b", without(aliceAddr).policy())
		first.Run()
		none.Run()
		c := connect(t, aliceAddr)
		defer tracker.track(t.Context(), caller(c, alice, time.Now()), requestinfo.Short).Close()
		second.Run()
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Refused)
	})
}

func TestReload_LateRequestOfArmedTrackerUsesNewestPolicy(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		first, none, second := registry.NewGeneration(), registry.NewGeneration(), registry.NewGeneration()
		tracker := first.NewTracker([]string{":443"}, "a", newNetwork().policy())
		second.NewTracker([]string{":443"}, "b", without(aliceAddr).policy())
		first.Run()
		tracker.track(t.Context(), caller(connect(t, bobAddr), bob, time.Now()), requestinfo.Short).Close()
		none.Run()
		c := connect(t, aliceAddr)
		defer tracker.track(t.Context(), caller(c, alice, time.Now()), requestinfo.Exec).Close()
		if callers := registry.Clients(); len(callers) != 1 {
			t.Errorf("got callers %v; want alice", callers)
		}
		second.Run()
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Refused)
	})
}

// The race detector sees what requests and a reload share.
func TestReload_WhileRequestsEnd(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		start := func() *Tracker {
			g := registry.NewGeneration()
			tracker := g.NewTracker([]string{":443"}, 0, n.policy())
			g.Run()
			return tracker
		}
		tracker := start()
		c := connect(t, aliceAddr)
		var ending sync.WaitGroup
		for range 20 {
			for range 50 {
				r := tracker.track(t.Context(), caller(c, alice, time.Now()), requestinfo.Exec)
				ending.Go(func() {
					r.require(func(context.Context, *impersonate.Identity, time.Time) error { return nil })
					r.endWhenEnforced()
					r.Close()
				})
			}
			tracker = start()
		}
		ending.Wait()
		if clients := registry.Clients(); len(clients) > 0 {
			t.Errorf("with nothing open, got %v", clients)
		}
	})
}

func TestRevoked_Report(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
		one, two := connect(t, aliceAddr), connect(t, aliceAddr)
		for _, c := range []client{one, one, two} {
			defer tracker.track(t.Context(), caller(c, alice, time.Now()), requestinfo.Watch).Close()
		}
		n.knows(aliceAddr, bob)
		time.Sleep(interval)
		synctest.Wait()
		want := []*Revoked{{
			Reason: OtherUser, Detail: "alice@example.com is now bob@example.com",
			Remote: aliceAddr, User: alice.User, Requests: 3,
		}}
		_, ended := n.seen()
		if diff := cmp.Diff(want, ended, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Errorf("reported (-want +got):\n%s", diff)
		}
		// Otherwise reverse_proxy would count a failure of the API server, and retry.
		if !errors.Is(ended[0], context.Canceled) {
			t.Error("the cause is not a context.Canceled")
		}
	})
}
