// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"context"
	"net/netip"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/once"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// cacheSize is how many peers a cache holds, at a few hundred bytes each and what their
// grants take. Beyond that, the peers that have been silent for longest are looked up
// again.
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
	// remote is the peer's address, dialled what it dialled. The port is 0 if it has not
	// dialled yet.
	remote  netip.Addr
	dialled netip.AddrPort
}

// cache caches recent answers of type V about peers, both by peer and on the connection
// that they were last used for. The latter alone saves a request 40 % of what the
// handler costs: BenchmarkHandler.
//
// An answer may be that the peer is refused: a peer that asks again and again must not
// make the proxy ask. Two rules keep an answer from being used for the wrong peer:
//
//   - An answer that was asked for before a connection was accepted is not used for
//     it: the address may have been another peer's then.
//   - An expired answer is never used, even if nobody can be asked. Nothing announces
//     that a grant was withdrawn; only asking shows it.
type cache[V any] struct {
	ttl     time.Duration
	find    func(context.Context, peerKey) (V, error)
	entries *lru.Cache[peerKey, *answer[V]]
	asking  once.Group[peerKey, *answer[V]]
	// forgotten is how often a peer was forgotten. It makes all earlier answers stale.
	forgotten atomic.Int64
}

// answer is an answer of a cache. It does not change.
type answer[V any] struct {
	cache *cache[V]
	value V
	// asked is when it was asked for, and forgotten what cache.forgotten was then.
	asked     time.Time
	forgotten int64
}

// isFresh reports whether a may be used for a connection that was accepted at since.
func (a *answer[V]) isFresh(since time.Time) bool {
	return !a.asked.Before(since) && a.forgotten == a.cache.forgotten.Load() && time.Since(a.asked) < a.cache.ttl
}

// newCache returns a cache of what find returns. It keeps answers for ttl; 0 disables
// caching. It calls find once at a time for each key, with a context that ends after
// [tailnet.WhoIsTimeout], and does not keep errors.
func newCache[V any](ttl time.Duration, find func(context.Context, peerKey) (V, error)) (*cache[V], error) {
	entries, err := lru.New[peerKey, *answer[V]](cacheSize)
	if err != nil {
		return nil, err
	}
	return &cache[V]{ttl: ttl, find: find, entries: entries}, nil
}

// on returns the answer that was last used for conn, and whether it may be used again.
func (c *cache[V]) on(conn *tailnet.Conn) (value V, ok bool) {
	// The handlers of one server share its connections, but not their caches.
	a, _ := conn.Note.Load().(*answer[V])
	if a == nil || a.cache != c || !a.isFresh(conn.Accepted) {
		return value, false
	}
	hits.Inc()
	return a.value, true
}

// get returns an answer about key for conn.
func (c *cache[V]) get(ctx context.Context, key peerKey, conn *tailnet.Conn) (value V, err error) {
	a, err := c.since(ctx, key, conn.Accepted)
	if err != nil {
		return value, err
	}
	conn.Note.Store(a)
	return a.value, nil
}

// since returns an answer about key that was asked for at since or later.
func (c *cache[V]) since(ctx context.Context, key peerKey, since time.Time) (*answer[V], error) {
	if a, ok := c.entries.Get(key); ok && a.isFresh(since) {
		hits.Inc()
		return a, nil
	}
	misses.Inc()
	if c.ttl == 0 {
		since = time.Now()
	}
	return c.ask(ctx, key, since)
}

// last returns the last answer about key, however old it is.
func (c *cache[V]) last(key peerKey) (value V, ok bool) {
	a, ok := c.entries.Peek(key)
	if !ok {
		return value, false
	}
	return a.value, true
}

// all calls f for every cached key, with the last answer about it, which may be stale.
func (c *cache[V]) all(f func(peerKey, V)) {
	for _, key := range c.entries.Keys() {
		if a, ok := c.entries.Peek(key); ok {
			f(key, a.value)
		}
	}
}

// forget removes the answers about the peer at remote that dialled local. A question
// that is being asked answers only those who already wait for it.
func (c *cache[V]) forget(remote, local netip.Addr) {
	c.forgotten.Add(1)
	for _, key := range c.entries.Keys() {
		if key.remote == remote && key.dialled.Addr() == local {
			c.entries.Remove(key)
		}
	}
}

// ask asks about key, once for all who wait.
func (c *cache[V]) ask(ctx context.Context, key peerKey, since time.Time) (*answer[V], error) {
	ctx, cancel := context.WithTimeout(ctx, tailnet.WhoIsTimeout)
	defer cancel()
	forgotten := c.forgotten.Load()
	for {
		a, err := c.asking.Ask(ctx, key, since, func(ctx context.Context, asked time.Time) (*answer[V], error) {
			// Before the question: the answer may be about what changes later.
			a := &answer[V]{cache: c, asked: asked, forgotten: c.forgotten.Load()}
			ctx, cancel := context.WithTimeout(ctx, tailnet.WhoIsTimeout)
			defer cancel()
			var err error
			if a.value, err = c.find(ctx, key); err != nil {
				c.entries.Remove(key)
				return nil, err
			}
			if a.forgotten == c.forgotten.Load() {
				c.entries.Add(key, a)
			}
			return a, nil
		})
		if err != nil {
			return nil, err
		}
		if a.forgotten >= forgotten {
			return a, nil
		}
		since = time.Now() // the question is from before the peer was forgotten
	}
}
