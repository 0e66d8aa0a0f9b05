// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"slices"
	"sync"
)

// running are the handlers of the config that runs in this process. For the moment
// in which Caddy replaces one config by another, those of both are among it.
var running handlers

type handlers struct {
	mu   sync.Mutex
	list []*Handler
}

func (l *handlers) add(h *Handler) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.list = append(l.list, h)
}

// remove removes h, which may never have been added.
func (l *handlers) remove(h *Handler) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.list = slices.DeleteFunc(l.list, func(other *Handler) bool { return other == h })
}

func (l *handlers) all() []*Handler {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.list)
}
