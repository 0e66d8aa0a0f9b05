// SPDX-License-Identifier: Apache-2.0

package once_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/once"
)

// counter answers with how often it was asked, after a second.
type counter struct {
	asked int
	once.Group[string, int]
}

func (c *counter) ask(ctx context.Context, since time.Time) (int, error) {
	return c.Ask(ctx, "", since, func(ctx context.Context, _ time.Time) (int, error) {
		c.asked++ // one at a time
		time.Sleep(time.Second)
		return c.asked, ctx.Err()
	})
}

func TestAsk_OnceForAllWhoWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := new(counter)
		var all sync.WaitGroup
		for range 1000 {
			all.Go(func() {
				if got, err := c.ask(t.Context(), time.Now()); got != 1 || err != nil {
					t.Errorf("got answer %d, %v; want the first", got, err)
				}
			})
		}
		all.Wait()
	})
}

// Who comes while a question is being asked, and needs a later answer, shares the next
// question with all others.
func TestAsk_AnswerIsNotFromBeforeSince(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := new(counter)
		var all sync.WaitGroup
		ask := func(since time.Time, want int) {
			all.Go(func() {
				if got, err := c.ask(t.Context(), since); got != want || err != nil {
					t.Errorf("got answer %d, %v; want %d", got, err, want)
				}
			})
		}
		first := time.Now()
		ask(first, 1)
		time.Sleep(time.Millisecond)
		ask(first, 1)
		for range 100 {
			ask(time.Now(), 2)
		}
		all.Wait()
	})
}

func TestAsk_CancelledFirstFailsNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := new(counter)
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		all.Go(func() {
			if _, err := c.ask(ctx, time.Now()); !errors.Is(err, context.Canceled) {
				t.Errorf("who has gone got error %v; want %v", err, context.Canceled)
			}
		})
		synctest.Wait()
		all.Go(func() {
			if got, err := c.ask(t.Context(), time.Now()); got != 1 || err != nil {
				t.Errorf("who waits got answer %d, %v; want the first", got, err)
			}
		})
		synctest.Wait()
		cancel()
		all.Wait()
	})
}

// Keys have questions of their own.
func TestAsk_KeysAreSeparate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g once.Group[string, string]
		var all sync.WaitGroup
		for _, key := range []string{"a", "b"} {
			all.Go(func() {
				got, err := g.Ask(t.Context(), key, time.Now(), func(context.Context, time.Time) (string, error) {
					time.Sleep(time.Second)
					return key, nil
				})
				if got != key || err != nil {
					t.Errorf("got %q, %v; want %q", got, err, key)
				}
			})
		}
		all.Wait()
	})
}
