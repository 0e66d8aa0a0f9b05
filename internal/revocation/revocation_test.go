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

// network knows who is who, and notes what it is asked and what was ended.
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

func (n *network) policies() Policy {
	return Policy{
		Interval: interval,
		Grace:    grace,
		Identify: func(_ context.Context, remote, local netip.Addr, since time.Time) (*impersonate.Identity, error) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.asked[remote]++
			switch id, ok := n.known[remote]; {
			case local != nodeAddr:
				return nil, apistatus.Forbidden(apistatus.UnknownPeer, "asked with the local address %v", local)
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

// knows changes who is at an address: nobody, if id is nil.
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

// seen returns how often it was asked about whom, and what was ended.
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

// inBubble runs f on a clock of its own, and fails t if what f opened and closed
// leaves a check behind.
func inBubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		defer func() {
			mu.Lock()
			defer mu.Unlock()
			current = nil
		}()
		f(t)
	})
}

func TestWhoLosesAccessIsEndedWithinTheInterval(t *testing.T) {
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
			inBubble(t, func(t *testing.T) {
				n := newNetwork()
				tracker := new(Generation).NewTracker(nil, nil, n.policies())
				of, other := connect(t, aliceAddr), connect(t, bobAddr)
				request := tracker.Track(t.Context(), of.conn, alice, time.Now(), Watch)
				defer request.Close()
				defer tracker.Track(t.Context(), other.conn, bob, time.Now(), Watch).Close()
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

// What an admission policy may have gone by is looked at as well.
func TestWhoLosesWhatTheAPIServerWasToldIsEnded(t *testing.T) {
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
			inBubble(t, func(t *testing.T) {
				n := newNetwork()
				n.knows(aliceAddr, tt.now)
				tracker := new(Generation).NewTracker(nil, nil, n.policies())
				c := connect(t, aliceAddr)
				defer tracker.Track(t.Context(), c.conn, told("n1", "tag:a", "tag:b"), time.Now(), Short).Close()
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

// Only connections that may be sessions end when sessions begin to have to be recorded.
func TestWhatIsUnrecordedEndsWhenSessionsHaveToBeRecorded(t *testing.T) {
	for _, unrecorded := range []bool{true, false} {
		inBubble(t, func(t *testing.T) {
			n := newNetwork()
			tracker := new(Generation).NewTracker(nil, nil, n.policies())
			c := connect(t, aliceAddr)
			request := tracker.Track(t.Context(), c.conn, alice, time.Now(), Exec)
			defer request.Close()
			if unrecorded {
				request.Unrecorded()
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

func TestGainingSomethingEndsNothing(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		n := newNetwork()
		tracker := new(Generation).NewTracker(nil, nil, n.policies())
		c := connect(t, aliceAddr)
		defer tracker.Track(t.Context(), c.conn, alice, time.Now(), Watch).Close()
		n.knows(aliceAddr, &impersonate.Identity{User: alice.User, Groups: []string{"c", "b", "a"}})
		time.Sleep(time.Minute)
		c.wantOpen(t)
	})
}

// What a request was begun with counts, not what the caller has had in between.
func TestARequestThatBeganWithLessGoesOn(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		n := newNetwork()
		tracker := new(Generation).NewTracker(nil, nil, n.policies())
		less := &impersonate.Identity{User: alice.User, Groups: []string{"b"}}
		c, d := connect(t, aliceAddr), connect(t, aliceAddr)
		defer tracker.Track(t.Context(), c.conn, less, time.Now(), Watch).Close()
		defer tracker.Track(t.Context(), d.conn, alice, time.Now(), Watch).Close()
		n.knows(aliceAddr, less)
		time.Sleep(time.Minute)
		c.wantOpen(t)
		d.wantEnded(t, LostGroup)
	})
}

func TestAllRequestsOfACallerCostOneQuestion(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		n := newNetwork()
		tracker := new(Generation).NewTracker(nil, nil, n.policies())
		for range 1000 {
			defer tracker.Track(t.Context(), connect(t, aliceAddr).conn, alice, time.Now(), Watch).Close()
		}
		defer tracker.Track(t.Context(), connect(t, bobAddr).conn, bob, time.Now(), Watch).Close()
		time.Sleep(10*interval + interval/2)
		asked, _ := n.seen()
		if diff := cmp.Diff(map[netip.Addr]int{aliceAddr: 10, bobAddr: 10}, asked, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Errorf("questions in ten intervals (-want +got):\n%s", diff)
		}
	})
}

func TestShortRequestsCostNoQuestion(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		n := newNetwork()
		tracker := new(Generation).NewTracker(nil, nil, n.policies())
		for range 1000 {
			tracker.Track(t.Context(), connect(t, aliceAddr).conn, alice, time.Now(), Watch).Close()
			time.Sleep(101 * time.Millisecond) // a check, after intervals of 5 s, falls between two of them
		}
		time.Sleep(time.Minute)
		if asked, _ := n.seen(); len(asked) > 0 {
			t.Errorf("asked %v times; want none", asked)
		}
		mu.Lock()
		defer mu.Unlock()
		if tracker.armed {
			t.Error("a check is due, and there is nothing to check")
		}
	})
}

func TestWhoCannotBeCheckedGoesOnForTheGrace(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		n := newNetwork()
		tracker := new(Generation).NewTracker(nil, nil, n.policies())
		c := connect(t, aliceAddr)
		defer tracker.Track(t.Context(), c.conn, alice, time.Now(), Watch).Close()
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

func TestACheckThatSucceedsStartsTheGraceAnew(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		n := newNetwork()
		tracker := new(Generation).NewTracker(nil, nil, n.policies())
		c := connect(t, aliceAddr)
		defer tracker.Track(t.Context(), c.conn, alice, time.Now(), Watch).Close()
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

// A decision of a while ago may have let the request in.
func TestTheGraceCountsFromTheAnswer(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		n := newNetwork()
		n.fails(apistatus.TryAgain(apistatus.NoAnswer, "no answer"))
		tracker := new(Generation).NewTracker(nil, nil, n.policies())
		c := connect(t, aliceAddr)
		defer tracker.Track(t.Context(), c.conn, alice, time.Now().Add(-2*interval), Watch).Close()
		time.Sleep(grace - 2*interval)
		synctest.Wait()
		c.wantOpen(t)
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Unconfirmed, alice.User)
	})
}

// Grants differ by the address that was dialled.
func TestCallersThatDialledDifferentAddressesAreAskedAboutApart(t *testing.T) {
	otherAddr := netip.MustParseAddr("100.64.0.9") // about which nobody gets in
	for _, last := range []netip.Addr{nodeAddr, otherAddr} {
		t.Run("last to "+last.String(), func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				n := newNetwork()
				tracker := new(Generation).NewTracker(nil, nil, n.policies())
				c, other := connectTo(t, aliceAddr, nodeAddr), connectTo(t, aliceAddr, otherAddr)
				clients := []client{c, other}
				if last == nodeAddr {
					slices.Reverse(clients)
				}
				for _, c := range clients {
					defer tracker.Track(t.Context(), c.conn, alice, time.Now(), Watch).Close()
				}
				want := []Caller{
					{Remote: aliceAddr, Local: nodeAddr, Identity: alice, Open: map[Kind]int{Watch: 1}},
					{Remote: aliceAddr, Local: otherAddr, Identity: alice, Open: map[Kind]int{Watch: 1}},
				}
				if diff := cmp.Diff(want, Callers(), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
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

// act opens a request in which alice acts as bob, for as long as mayAct allows.
func act(t *testing.T, tracker *Tracker, mayAct impersonate.StillAllowed) client {
	t.Helper()
	id := *alice
	id.ActAs = &impersonate.ActAsRequest{Target: &impersonate.Target{User: "bob"}}
	c := connect(t, aliceAddr)
	request := tracker.Track(t.Context(), c.conn, &id, time.Now(), Short)
	t.Cleanup(request.Close)
	request.Require(mayAct)
	return c
}

func TestWhoMayNoLongerActAsSomebodyElseIsEnded(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		n := newNetwork()
		tracker := new(Generation).NewTracker(nil, nil, n.policies())
		var withdrawn atomic.Bool
		acting := act(t, tracker, func(_ context.Context, caller *impersonate.Identity, since time.Time) error {
			if caller != alice || since != time.Now() {
				t.Errorf("asked about %+v since %v; want who the caller is by now", caller, since)
			}
			if withdrawn.Load() {
				return apistatus.Forbidden(apistatus.Impersonation, "alice may not act as bob")
			}
			return nil
		})
		other := act(t, tracker, func(context.Context, *impersonate.Identity, time.Time) error { return nil })
		herself := connect(t, aliceAddr)
		defer tracker.Track(t.Context(), herself.conn, alice, time.Now(), Short).Close()
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

func TestWhoLosesAccessLosesItAsSomebodyElseToo(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		n := newNetwork()
		tracker := new(Generation).NewTracker(nil, nil, n.policies())
		c := act(t, tracker, func(context.Context, *impersonate.Identity, time.Time) error { return nil })
		n.knows(aliceAddr, &impersonate.Identity{User: alice.User, Groups: []string{"b"}})
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, LostGroup, "group a")
	})
}

// That the policies let somebody be bob, and the API server alice act as bob, does not
// make up for who may not even be alice.
func TestWhoIsRefusedIsRefusedAsSomebodyElseToo(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		n := newNetwork()
		policies := n.policies()
		policies.MayBe = func(*impersonate.Target) error { return nil }
		tracker := new(Generation).NewTracker(nil, nil, policies)
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

func TestWhenNobodyCanTellWhetherACallerMayActItGoesOnForTheGrace(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		n := newNetwork()
		tracker := new(Generation).NewTracker(nil, nil, n.policies())
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

// A config that no longer lets anybody act as somebody ends what began before it.
func TestTheNewRulesJudgeWhomSomebodyActsAs(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		n := newNetwork()
		listeners := []string{"tailscale/k8s:443"}
		before := new(Generation)
		tracker := before.NewTracker(listeners, "before", n.policies())
		before.Run()
		c := act(t, tracker, func(context.Context, *impersonate.Identity, time.Time) error { return nil })
		policies := n.policies()
		policies.MayBe = func(target *impersonate.Target) error {
			return apistatus.Forbidden(apistatus.Impersonation, "nobody is %s here", target.User)
		}
		after := new(Generation)
		after.NewTracker(listeners, "after", policies)
		after.Run()
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Refused, "nobody is bob here")
	})
}

// One caller for whom no answer comes does not keep the others waiting.
func TestCallersAreAskedAboutAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		n := newNetwork()
		policies := n.policies()
		silence := make(chan struct{})
		defer close(silence)
		identify := policies.Identify
		policies.Identify = func(ctx context.Context, remote, local netip.Addr, since time.Time) (*impersonate.Identity, error) {
			if remote == aliceAddr {
				<-silence
				return nil, errors.New("no answer")
			}
			return identify(ctx, remote, local, since)
		}
		tracker := new(Generation).NewTracker(nil, nil, policies)
		silent, c := connect(t, aliceAddr), connect(t, bobAddr)
		defer tracker.Track(t.Context(), silent.conn, alice, time.Now(), Watch).Close()
		defer tracker.Track(t.Context(), c.conn, bob, time.Now(), Watch).Close()
		n.knows(bobAddr, nil)
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Refused)
	})
}

// A few callers for whom no answer comes do not keep the others waiting, and no
// number of callers asks a node more at a time than that.
func TestSoManyCallersAreAskedAboutAtATime(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		n := newNetwork()
		policies := n.policies()
		silence := make(chan struct{})
		defer close(silence)
		var asking atomic.Int32
		policies.Identify = func(context.Context, netip.Addr, netip.Addr, time.Time) (*impersonate.Identity, error) {
			asking.Add(1)
			<-silence
			return nil, errors.New("no answer")
		}
		tracker := new(Generation).NewTracker(nil, nil, policies)
		for addr := range lookups + 1 {
			from := netip.AddrFrom4([4]byte{100, 64, 1, byte(addr)})
			defer tracker.Track(t.Context(), connect(t, from).conn, alice, time.Now(), Watch).Close()
		}
		time.Sleep(interval)
		synctest.Wait()
		if got := asking.Load(); got != lookups {
			t.Errorf("%d callers are asked about at a time; want %d", got, lookups)
		}
	})
}

// A config that is gone leaves its requests behind, and they are still judged.
func TestWithoutASuccessorASiteGoesOnByItsOwnRules(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		n := newNetwork()
		first, second := new(Generation), new(Generation)
		tracker := first.NewTracker([]string{":443"}, "a", n.policies())
		second.NewTracker([]string{":8443"}, "a", newNetwork().policies())
		first.Run()
		c := connect(t, aliceAddr)
		defer tracker.Track(t.Context(), c.conn, alice, time.Now(), Watch).Close()
		second.Run()
		n.knows(aliceAddr, nil)
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Refused)
	})
}

// The policies under which a caller has lost access, and those under which it has not.
func without(addr netip.Addr) *network {
	n := newNetwork()
	n.knows(addr, nil)
	return n
}

func TestAfterAReloadTheNewRulesJudge(t *testing.T) {
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
			inBubble(t, func(t *testing.T) {
				config := func(trackers []tracker) (*Generation, []*Tracker) {
					c := new(Generation)
					var made []*Tracker
					for _, s := range trackers {
						n := newNetwork()
						if s.denies {
							n = without(aliceAddr)
						}
						made = append(made, c.NewTracker(s.listeners, s.settings, n.policies()))
					}
					return c, made
				}
				before, trackers := config(tt.old)
				before.Run()
				c := connect(t, aliceAddr)
				request := trackers[0].Track(t.Context(), c.conn, alice, time.Now(), Watch)
				defer request.Close()
				after, _ := config(tt.new)
				after.Run()
				after.Run() // as every handler of the config calls it
				// A connection that the old config has accepted outlives it.
				late := connect(t, aliceAddr)
				defer trackers[0].Track(t.Context(), late.conn, alice, time.Now(), Watch).Close()
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

// A config without the tracker, and then one with it again.
func TestTheConfigAfterNextJudgesAsWell(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		var first, none, second Generation
		tracker := first.NewTracker([]string{":443"}, "a", newNetwork().policies())
		second.NewTracker([]string{":443"}, "b", without(aliceAddr).policies())
		first.Run()
		c := connect(t, aliceAddr)
		defer tracker.Track(t.Context(), c.conn, alice, time.Now(), Watch).Close()
		none.Run()
		time.Sleep(time.Minute)
		c.wantOpen(t)
		second.Run()
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Refused)
	})
}

// A connection that was accepted before may bring a request when the config has been
// gone for a while.
func TestTheConfigAfterNextJudgesARequestThatCameLate(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		var first, none, second Generation
		tracker := first.NewTracker([]string{":443"}, "a", newNetwork().policies())
		second.NewTracker([]string{":443"}, "b", without(aliceAddr).policies())
		first.Run()
		none.Run()
		c := connect(t, aliceAddr)
		defer tracker.Track(t.Context(), c.conn, alice, time.Now(), Short).Close()
		second.Run()
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Refused)
	})
}

// The same, when the tracker had a request a moment before its config went.
func TestTheConfigAfterNextJudgesARequestThatCameLateAfterAnother(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		var first, none, second Generation
		tracker := first.NewTracker([]string{":443"}, "a", newNetwork().policies())
		second.NewTracker([]string{":443"}, "b", without(aliceAddr).policies())
		first.Run()
		tracker.Track(t.Context(), connect(t, bobAddr).conn, bob, time.Now(), Short).Close()
		none.Run()
		c := connect(t, aliceAddr)
		defer tracker.Track(t.Context(), c.conn, alice, time.Now(), Exec).Close()
		if callers := Callers(); len(callers) != 1 {
			t.Errorf("got callers %v; want alice", callers)
		}
		second.Run()
		time.Sleep(interval)
		synctest.Wait()
		c.wantEnded(t, Refused)
	})
}

func TestWhatIsReported(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		n := newNetwork()
		tracker := new(Generation).NewTracker(nil, nil, n.policies())
		one, two := connect(t, aliceAddr), connect(t, aliceAddr)
		for _, c := range []client{one, one, two} {
			defer tracker.Track(t.Context(), c.conn, alice, time.Now(), Watch).Close()
		}
		n.knows(aliceAddr, bob)
		time.Sleep(interval)
		synctest.Wait()
		want := []*Revoked{{
			Reason: OtherUser, Detail: "alice@example.com is bob@example.com by now",
			Remote: aliceAddr, User: alice.User, Requests: 3,
		}}
		_, ended := n.seen()
		if diff := cmp.Diff(want, ended, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Errorf("reported (-want +got):\n%s", diff)
		}
		// It is no failure of the API server, which reverse_proxy would count, and try again.
		if !errors.Is(ended[0], context.Canceled) {
			t.Error("the cause of the end is not that the request was canceled")
		}
	})
}

func TestConfigOf(t *testing.T) {
	type app struct{ _ int }
	one, two := new(app), new(app)
	a, b, c := GenerationOf(one), GenerationOf(one), GenerationOf(two)
	if a != b {
		t.Error("two handlers of a config got different ones")
	}
	if a == c {
		t.Error("two configs are one")
	}
}
