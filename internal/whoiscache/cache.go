// SPDX-License-Identifier: Apache-2.0

// Package cache answers who a caller is from what was found out a moment ago.
//
// To ask a tailnet node costs more than all else that is done for a request, so
// what it said is kept for a second. Two rules keep that from ever being about
// somebody else:
//
//   - What was asked before a connection was accepted is not used for it: the
//     address may have been another peer's then.
//   - What has expired is not used, whatever stands in the way of asking anew.
//     That a grant was withdrawn is announced by nobody, it is only seen by
//     asking.
package whoiscache

import (
	"context"
	"net/netip"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"tailscale.com/util/singleflight"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// size is how many callers a cache holds: a few hundred bytes for each. With more
// of them at once, those that have been silent for longest are asked about again.
const size = 8192

// Key is whom a node is asked about. Nothing in it is written by a client.
type Key struct {
	// Node is the node that accepted the connection.
	Node *tailnet.Node
	// Remote is the peer's address, Local the one that it dialled.
	Remote, Local netip.Addr
}

// Cache remembers answers of type V.
type Cache[V any] struct {
	ttl     time.Duration
	find    func(context.Context, Key) (V, error)
	entries *lru.Cache[Key, answer[V]]
	finding singleflight.Group[Key, answer[V]]

	// mu is held while an answer is added, or something forgotten.
	mu        sync.Mutex
	forgotten int // how often something was
}

// answer is what was found out, and when it was asked.
type answer[V any] struct {
	value V
	asked time.Time
}

// New returns a cache of what find returns, which is kept for ttl: not at all if
// that is 0. find is called once at a time for each key, and given
// [tailnet.WhoIsTimeout]. Its errors are not kept.
func New[V any](ttl time.Duration, find func(context.Context, Key) (V, error)) (*Cache[V], error) {
	entries, err := lru.New[Key, answer[V]](size)
	if err != nil {
		return nil, err
	}
	return &Cache[V]{ttl: ttl, find: find, entries: entries}, nil
}

// Get returns the answer about key. It was asked for at since or later: when the
// connection was accepted.
func (c *Cache[V]) Get(ctx context.Context, key Key, since time.Time) (V, error) {
	now := time.Now()
	if a, ok := c.entries.Get(key); ok && !a.asked.Before(since) && now.Sub(a.asked) < c.ttl {
		metrics.CacheHits.Inc()
		return a.value, nil
	}
	metrics.CacheMisses.Inc()
	if c.ttl == 0 {
		since = now
	}
	return c.ask(ctx, key, since)
}

// All calls f for every key that is remembered and the last answer about it, which
// may have expired.
func (c *Cache[V]) All(f func(Key, V)) {
	for _, key := range c.entries.Keys() {
		if a, ok := c.entries.Peek(key); ok {
			f(key, a.value)
		}
	}
}

// Forget removes what is known about key. The answer to a question that is under way
// is for those who wait for it already, and nobody else.
func (c *Cache[V]) Forget(key Key) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forgotten++
	c.entries.Remove(key)
	c.finding.Forget(key)
}

// add remembers a, about key, unless something has been forgotten since it was asked
// for.
func (c *Cache[V]) add(key Key, a answer[V], forgotten int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if forgotten == c.forgotten {
		c.entries.Add(key, a)
	}
}

// timesForgotten returns how often something has been forgotten.
func (c *Cache[V]) timesForgotten() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.forgotten
}

// ask is Get for an answer that is not there.
func (c *Cache[V]) ask(ctx context.Context, key Key, since time.Time) (V, error) {
	ctx, cancel := context.WithTimeout(ctx, tailnet.WhoIsTimeout)
	defer cancel()
	for {
		// All that want to know wait for the same answer. It does not end with
		// the request of the one that happened to be first.
		asking := c.finding.DoChan(key, func() (answer[V], error) {
			a, forgotten := answer[V]{asked: time.Now()}, c.timesForgotten()
			ctx, cancel := context.WithTimeout(context.Background(), tailnet.WhoIsTimeout)
			defer cancel()
			var err error
			if a.value, err = c.find(ctx, key); err != nil {
				c.entries.Remove(key)
				return a, err
			}
			c.add(key, a, forgotten)
			return a, nil
		})
		select {
		case <-ctx.Done():
			var none V
			return none, ctx.Err()
		case got := <-asking:
			// A question that was under way by since may have been about
			// another peer. The next one is not.
			if !got.Val.asked.Before(since) {
				return got.Val.value, got.Err
			}
		}
	}
}
