// SPDX-License-Identifier: Apache-2.0

// Package once asks a question once for all who wait for the answer.
package once

import (
	"context"
	"time"

	"tailscale.com/util/singleflight"
)

// Group asks one question at a time for each key. Its zero value can be used.
type Group[K comparable, V any] struct {
	asking singleflight.Group[K, answer[V]]
}

// answer is an answer to a question that was asked at asked.
type answer[V any] struct {
	value V
	asked time.Time
}

// Ask returns what ask answers about key, from a question that was asked at since or
// later: an earlier one may be about what was different then. ask gets the time at which
// it is called, and a context that does not end with ctx, as others may wait as well.
func (g *Group[K, V]) Ask(ctx context.Context, key K, since time.Time, ask func(ctx context.Context, asked time.Time) (V, error)) (value V, err error) {
	for {
		asking := g.asking.DoChan(key, func() (answer[V], error) {
			asked := time.Now()
			value, err := ask(context.Background(), asked)
			return answer[V]{value, asked}, err
		})
		select {
		case <-ctx.Done():
			return value, ctx.Err()
		case got := <-asking:
			if !got.Val.asked.Before(since) {
				return got.Val.value, got.Err
			}
		}
	}
}
