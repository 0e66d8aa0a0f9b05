// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"context"
	"errors"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// asker counts the questions and answers each with its number.
type asker struct {
	questions atomic.Int32
	// takes is how long an answer takes, err what it is.
	takes time.Duration
	err   error
}

func (a *asker) find(ctx context.Context, _ peerKey) (string, error) {
	n := a.questions.Add(1)
	select {
	case <-time.After(a.takes):
	case <-ctx.Done():
		return "", ctx.Err()
	}
	return strconv.Itoa(int(n)), a.err
}

func testCache(t *testing.T, ttl time.Duration, a *asker) *cache[string] {
	t.Helper()
	c, err := newCache(ttl, a.find)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

var (
	node  = &tailnet.Node{Name: "k8s"}
	alice = peerKey{node, netip.MustParseAddr("100.64.0.2"), netip.MustParseAddrPort("100.64.0.1:443")}
)

// want fails t unless key's answer is want. asked after since.
func want(t *testing.T, c *cache[string], key peerKey, since time.Time, want string) {
	t.Helper()
	got, err := c.since(t.Context(), key, since)
	if err != nil {
		t.Fatal(err)
	}
	if got.value != want {
		t.Errorf("got answer %s; want %s", got.value, want)
	}
}

func TestCache_AnswerIsUsedUntilItExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := testCache(t, time.Second, new(asker))
		accepted := time.Now()
		want(t, c, alice, accepted, "1")
		time.Sleep(time.Second - time.Nanosecond)
		want(t, c, alice, accepted, "1")
		time.Sleep(time.Nanosecond)
		want(t, c, alice, accepted, "2")
	})
}

// The address may have been another peer's before.
func TestCache_AnswerFromBeforeConnectionIsNotUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := testCache(t, time.Second, new(asker))
		first := time.Now()
		want(t, c, alice, first, "1")
		time.Sleep(time.Millisecond)
		want(t, c, alice, time.Now(), "2")
		want(t, c, alice, first, "2")
	})
}

// Nor is one that was on its way when the connection was accepted.
func TestCache_QuestionFromBeforeConnectionIsNotUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := testCache(t, time.Second, &asker{takes: 100 * time.Millisecond})
		first := time.Now()
		go func() { _, _ = c.since(t.Context(), alice, first) }()
		time.Sleep(50 * time.Millisecond)
		want(t, c, alice, time.Now(), "2")
	})
}

// An answer may be about what was so when it was asked for.
func TestCache_AnswerIsAsOldAsItsQuestion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := testCache(t, time.Second, &asker{takes: 100 * time.Millisecond})
		first := time.Now()
		want(t, c, alice, first, "1")
		want(t, c, alice, first.Add(50*time.Millisecond), "2")
	})
}

func TestCache_ZeroTTLAsksForEveryRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := testCache(t, 0, new(asker))
		accepted := time.Now()
		for _, answer := range []string{"1", "2", "3"} {
			want(t, c, alice, accepted, answer)
			time.Sleep(time.Nanosecond) // or it is the same moment
		}
	})
}

// Nor does it wait for an answer that another request, on the same connection, asked
// for before.
func TestCache_ZeroTTLDoesNotShareQuestions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := testCache(t, 0, &asker{takes: 100 * time.Millisecond})
		accepted := time.Now()
		go func() { _, _ = c.since(t.Context(), alice, accepted) }()
		time.Sleep(50 * time.Millisecond)
		want(t, c, alice, accepted, "2")
	})
}

func TestCache_KeysThatDifferInAnyPartAreSeparate(t *testing.T) {
	c := testCache(t, time.Hour, new(asker))
	accepted := time.Now()
	want(t, c, alice, accepted, "1")
	for i, other := range []peerKey{
		{&tailnet.Node{Name: "k8s"}, alice.remote, alice.dialled},
		{node, netip.MustParseAddr("100.64.0.3"), alice.dialled},
		{node, alice.remote, netip.MustParseAddrPort("[fd7a:115c:a1e0::1]:443")},
		{node, alice.remote, netip.MustParseAddrPort("100.64.0.1:80")},
	} {
		want(t, c, other, accepted, strconv.Itoa(i+2))
	}
	want(t, c, alice, accepted, "1")
}

func TestCache_ConcurrentQuestionsAreMerged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &asker{takes: 100 * time.Millisecond}
		c := testCache(t, time.Second, a)
		accepted := time.Now()
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() { want(t, c, alice, accepted, "1") })
		}
		wg.Wait()
		if got := a.questions.Load(); got != 1 {
			t.Errorf("%d questions were asked; want 1", got)
		}
	})
}

// The request that asks first may be gone before the answer comes.
func TestCache_QuestionOutlivesFirstRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &asker{takes: 100 * time.Millisecond}
		c := testCache(t, time.Second, a)
		accepted := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			time.Sleep(10 * time.Millisecond)
			cancel()
		}()
		go func() {
			if _, err := c.since(ctx, alice, accepted); !errors.Is(err, context.Canceled) {
				t.Errorf("who has gone got error %v; want %v", err, context.Canceled)
			}
		}()
		synctest.Wait()
		want(t, c, alice, accepted, "1")
		if got := a.questions.Load(); got != 1 {
			t.Errorf("%d questions were asked; want 1", got)
		}
	})
}

// An old answer does not help out when there is no new one.
func TestCache_ExpiredAnswerIsNotUsedWhenAskingFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := new(asker)
		c := testCache(t, time.Second, a)
		accepted := time.Now()
		want(t, c, alice, accepted, "1")
		time.Sleep(time.Second)
		a.err = errors.New("no answer")
		if got, err := c.since(t.Context(), alice, accepted); !errors.Is(err, a.err) {
			t.Errorf("got answer %v, error %v; want error %v", got, err, a.err)
		}
	})
}

// What was found out later counts, also for those that might have used the old.
func TestCache_ErrorReplacesAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := new(asker)
		c := testCache(t, time.Second, a)
		first := time.Now()
		want(t, c, alice, first, "1")
		time.Sleep(time.Millisecond)
		a.err = errors.New("unknown")
		for _, since := range []time.Time{time.Now(), first} {
			if got, err := c.since(t.Context(), alice, since); !errors.Is(err, a.err) {
				t.Errorf("got answer %v, error %v; want error %v", got, err, a.err)
			}
		}
		a.err = nil
		want(t, c, alice, first, "4")
	})
}

func TestCache_QuestionTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := testCache(t, time.Second, &asker{takes: time.Hour})
		began := time.Now()
		go func() { _, _ = c.since(t.Context(), alice, began) }()
		time.Sleep(tailnet.WhoIsTimeout / 2)
		// This one has to wait for the first before it can ask by itself.
		asked := time.Now()
		if got, err := c.since(t.Context(), alice, asked); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got answer %v, error %v; want error %v", got, err, context.DeadlineExceeded)
		}
		if took := time.Since(asked); took > tailnet.WhoIsTimeout {
			t.Errorf("it took %v; want at most %v", took, tailnet.WhoIsTimeout)
		}
		synctest.Wait()
		time.Sleep(tailnet.WhoIsTimeout) // for the question that nobody waits for
	})
}

func TestCache_IsBounded(t *testing.T) {
	a := new(asker)
	c := testCache(t, time.Hour, a)
	accepted := time.Now()
	key := alice
	for range cacheSize + 100 {
		key.remote = key.remote.Next()
		if _, err := c.since(t.Context(), key, accepted); err != nil {
			t.Fatal(err)
		}
	}
	if got := c.entries.Len(); got != cacheSize {
		t.Errorf("the cache holds %d answers; want %d", got, cacheSize)
	}
}

// Every other answer becomes stale too, which is simpler, and rare.
func TestCache_ForgottenAnswerIsAskedForAgain(t *testing.T) {
	asked := make(map[peerKey]int)
	c, err := newCache(time.Hour, func(_ context.Context, key peerKey) (int, error) {
		asked[key]++
		return asked[key], nil
	})
	if err != nil {
		t.Fatal(err)
	}
	a, b := peerKey{remote: netip.MustParseAddr("100.64.0.2")}, peerKey{remote: netip.MustParseAddr("100.64.0.3")}
	for _, key := range []peerKey{a, b, a, b} {
		if _, err := c.since(t.Context(), key, time.Time{}); err != nil {
			t.Fatal(err)
		}
	}
	c.forget(a.remote, a.dialled.Addr())
	known := make(map[peerKey]int)
	c.all(func(key peerKey, value int) { known[key] = value })
	if len(known) != 1 || known[b] != 1 {
		t.Errorf("cached are %v; want the other peer's first answer", known)
	}
	for _, key := range []peerKey{a, b} {
		if _, err := c.since(t.Context(), key, time.Time{}); err != nil {
			t.Fatal(err)
		}
	}
	if asked[a] != 2 || asked[b] != 2 {
		t.Errorf("asked %d and %d times; want 2 and 2", asked[a], asked[b])
	}
}

func TestCache_ForgetDuringQuestionDiscardsAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		answers := make(chan int)
		c, err := newCache(time.Hour, func(context.Context, peerKey) (int, error) { return <-answers, nil })
		if err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		get := func(want int) {
			all.Go(func() {
				if a, err := c.since(t.Context(), peerKey{}, time.Time{}); err != nil || a.value != want {
					t.Errorf("got %+v, %v; want %d", a, err, want)
				}
			})
			synctest.Wait() // for the answer
		}
		get(1)
		c.forget(netip.Addr{}, netip.Addr{})
		get(2) // not what was asked before
		answers <- 1
		synctest.Wait()
		answers <- 2
		all.Wait()

		c.forget(netip.Addr{}, netip.Addr{})
		get(3)
		c.forget(netip.Addr{}, netip.Addr{})
		answers <- 3
		all.Wait()
		c.all(func(_ peerKey, value int) { t.Errorf("%d is remembered", value) })
	})
}

// The answer on a connection is used until it is stale, whatever other handlers of the
// server note there.
func TestCache_AnswerOnConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, other := testCache(t, time.Second, new(asker)), testCache(t, time.Hour, new(asker))
		conn := &tailnet.Conn{Accepted: time.Now()}
		wantOn := func(c *cache[string], value string) {
			t.Helper()
			if got, ok := c.on(conn); ok != (value != "") || got != value {
				t.Errorf("got answer %q, %v; want %q", got, ok, value)
			}
		}
		wantOn(c, "")
		get := func(c *cache[string]) {
			t.Helper()
			if _, err := c.get(t.Context(), alice, conn); err != nil {
				t.Fatal(err)
			}
		}
		get(c)
		wantOn(c, "1")
		wantOn(other, "")
		time.Sleep(time.Second - time.Nanosecond)
		wantOn(c, "1")
		time.Sleep(time.Nanosecond)
		wantOn(c, "")
		get(c)
		wantOn(c, "2")
		c.forget(netip.Addr{}, netip.Addr{}) // any peer
		wantOn(c, "")
		get(other)
		wantOn(c, "")
		wantOn(other, "1")
		conn.Accepted = time.Now().Add(time.Second) // as if another peer had opened it
		wantOn(other, "")
	})
}

func TestCache_CountsHitsAndMisses(t *testing.T) {
	c, err := newCache(time.Hour, func(context.Context, peerKey) (int, error) { return 1, nil })
	if err != nil {
		t.Fatal(err)
	}
	wasHits, wasMisses := testutil.ToFloat64(hits), testutil.ToFloat64(misses)
	for range 3 {
		if _, err := c.since(t.Context(), peerKey{}, time.Time{}); err != nil {
			t.Fatal(err)
		}
	}
	if hits, misses := testutil.ToFloat64(hits)-wasHits, testutil.ToFloat64(misses)-wasMisses; hits != 2 || misses != 1 {
		t.Errorf("got %v hits and %v misses; want 2 and 1", hits, misses)
	}
}
