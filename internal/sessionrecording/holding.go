// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"context"
	"errors"
	"sync"
)

var errHeld = errors.New("this device makes the proxy hold too much at once: large frames whose ends have not arrived; close sessions, or send smaller frames")

// holding counts what the buffers for a session's frames hold beyond [keep].
type holding struct {
	ctx context.Context
	// hold adds to what the session's connection counts as, see [Recorder.Hold].
	hold func(ctx context.Context, n int64) bool

	mu    sync.Mutex
	bytes int64
	over  bool
}

// grow adds n bytes, fewer if n is negative. The error says that the caller may not hold
// so much.
func (h *holding) grow(n int64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.over || h.hold == nil {
		return nil
	}
	if !h.hold(h.ctx, n) {
		return errHeld
	}
	h.bytes += n
	return nil
}

// release gives everything back, at the end of the session.
func (h *holding) release() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.over && h.hold != nil {
		h.hold(h.ctx, -h.bytes)
	}
	h.over = true
}
