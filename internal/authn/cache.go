// SPDX-License-Identifier: Apache-2.0

package authn

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

// cacheSize is how many peers a cache holds, at a few hundred bytes each. Beyond that,
// the peers that have been silent for longest are looked up again.
const cacheSize = 8192

type lookupResult string

const (
	hit  lookupResult = "hit"
	miss lookupResult = "miss"
)

var (
	lookups = metrics.NewCounter("cache_lookups_total",
		"Questions about who a caller is, by whether the answer was known from a moment ago (hit) or a tailnet node had to be asked (miss).",
		"result", hit, miss)
	hits, misses = lookups.With(hit), lookups.With(miss)
)

// peerKey is a peer as a node knows it. A client writes nothing of it.
type peerKey struct {
	// node is the node that accepted the connection.
	node *tailnet.Node
	// remote is the peer's address, local the one that it dialled.
	remote, local netip.Addr
}

// cache caches recent answers of type V about peers.
//
// Two rules keep an answer from being used for the wrong peer:
//
//   - An answer that was asked for before a connection was accepted is not used for
//     it: the address may have been another peer's then.
//   - An expired answer is never used, even if nobody can be asked. Nothing announces
//     that a grant was withdrawn; only asking shows it.
type cache[V any] struct {
	ttl     time.Duration
	find    func(context.Context, peerKey) (V, error)
	entries *lru.Cache[peerKey, answer[V]]
	finding singleflight.Group[peerKey, answer[V]]

	// mu is held while an answer is added, or an entry is forgotten.
	mu        sync.Mutex
	forgotten int // how often an entry was forgotten
}

// answer is an answer, and when it was asked for.
type answer[V any] struct {
	value V
	asked time.Time
}

// newCache returns a cache of what find returns. It keeps answers for ttl; 0 disables
// caching. It calls find once at a time for each key, with a context that ends after
// [tailnet.WhoIsTimeout], and does not keep errors.
func newCache[V any](ttl time.Duration, find func(context.Context, peerKey) (V, error)) (*cache[V], error) {
	entries, err := lru.New[peerKey, answer[V]](cacheSize)
	if err != nil {
		return nil, err
	}
	return &cache[V]{ttl: ttl, find: find, entries: entries}, nil
}

// get returns an answer about key that was asked for at since or later: when the
// connection was accepted.
func (c *cache[V]) get(ctx context.Context, key peerKey, since time.Time) (V, error) {
	now := time.Now()
	if a, ok := c.entries.Get(key); ok && !a.asked.Before(since) && now.Sub(a.asked) < c.ttl {
		hits.Inc()
		return a.value, nil
	}
	misses.Inc()
	if c.ttl == 0 {
		since = now
	}
	return c.ask(ctx, key, since)
}

// all calls f for every cached key, with the last answer about it, which may have
// expired.
func (c *cache[V]) all(f func(peerKey, V)) {
	for _, key := range c.entries.Keys() {
		if a, ok := c.entries.Peek(key); ok {
			f(key, a.value)
		}
	}
}

// forget removes the answer about key. A question that is being asked answers only
// those who already wait for it.
func (c *cache[V]) forget(key peerKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forgotten++
	c.entries.Remove(key)
	c.finding.Forget(key)
}

// add caches a, unless an entry was forgotten since it was asked for.
func (c *cache[V]) add(key peerKey, a answer[V], forgotten int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if forgotten == c.forgotten {
		c.entries.Add(key, a)
	}
}

// timesForgotten returns how often an entry was forgotten.
func (c *cache[V]) timesForgotten() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.forgotten
}

// ask asks about key.
func (c *cache[V]) ask(ctx context.Context, key peerKey, since time.Time) (V, error) {
	ctx, cancel := context.WithTimeout(ctx, tailnet.WhoIsTimeout)
	defer cancel()
	for {
		// All concurrent callers wait for the same answer, which does not end with
		// the request of the first of them.
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
			// A question that was already being asked at since may be about another
			// peer. The next one is not.
			if !got.Val.asked.Before(since) {
				return got.Val.value, got.Err
			}
		}
	}
}
