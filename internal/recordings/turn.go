// SPDX-License-Identifier: Apache-2.0

package recordings

import (
	"context"
	"errors"
	"runtime"
	"time"
)

// turns limits how many recordings are drawn at the same time, in the whole process. Each
// takes a processor, for as long as whoever made the recording wants it to. The other half of
// the processors is left to those who use the clusters.
var turns = make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2))

// turnTime is how long somebody draws before others who wait have their turn.
const turnTime = 20 * time.Millisecond

// worker draws a recording while it is its turn.
type worker struct {
	// ctx ends the work.
	ctx context.Context
	// most is how long the worker may draw in all. 0 has no limit.
	most time.Duration

	spent time.Duration // before began
	began time.Time
	held  bool
}

// errTooSlow says that a recording takes too long to draw.
var errTooSlow = errors.New("the recording takes too long to draw")

// do calls f when it is the worker's turn.
func (w *worker) do(f func()) error {
	if err := w.begin(); err != nil {
		return err
	}
	defer w.end() // if f panics
	f()
	w.end()
	return w.err()
}

func (w *worker) begin() error {
	select {
	case turns <- struct{}{}:
		w.began, w.held = time.Now(), true
		return nil
	case <-w.ctx.Done():
		return context.Cause(w.ctx)
	}
}

func (w *worker) end() {
	if w.held {
		w.held = false
		w.spent += time.Since(w.began)
		<-turns
	}
}

func (w *worker) err() error {
	switch {
	case w.ctx.Err() != nil:
		return context.Cause(w.ctx)
	case w.most > 0 && w.spent > w.most:
		return errTooSlow
	}
	return nil
}

// goOn reports whether the work that do has begun goes on. It must be called often, and lets
// others have their turn.
func (w *worker) goOn() bool {
	if w.held && time.Since(w.began) > turnTime {
		w.end()
		if w.err() == nil {
			_ = w.begin() // the error is that of ctx
		}
	}
	return w.held && w.ctx.Err() == nil
}
