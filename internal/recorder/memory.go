// SPDX-License-Identifier: Apache-2.0

package recorder

import (
	"net/netip"
	"sync"
	"time"
)

// maxRemembered is how many recorders a memory holds.
const maxRemembered = 256

// memory remembers which recorders did not answer in time.
type memory struct {
	mu sync.Mutex
	// late holds the recorders that took longer than their head start and have not
	// answered since, with the time of the latest timeout, zero if there was none.
	late map[netip.AddrPort]time.Time
}

// order returns the recorders to ask, in order: those that were late come last, and
// those that timed out recently are left out.
func (m *memory) order(recorders []netip.AddrPort) []netip.AddrPort {
	m.mu.Lock()
	defer m.mu.Unlock()
	var prompt, late []netip.AddrPort
	for _, recorder := range recorders {
		timedOut, ok := m.late[recorder]
		switch {
		case !ok:
			prompt = append(prompt, recorder)
		case time.Since(timedOut) >= timeout:
			late = append(late, recorder)
		}
	}
	return append(prompt, late...)
}

// noteLate notes that a recorder used up its head start.
func (m *memory) noteLate(recorder netip.AddrPort) { m.note(recorder, time.Time{}) }

// noteTimeout notes that a recorder did not answer within the timeout.
func (m *memory) noteTimeout(recorder netip.AddrPort) { m.note(recorder, time.Now()) }

func (m *memory) note(recorder netip.AddrPort, timedOut time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.late == nil {
		m.late = make(map[netip.AddrPort]time.Time)
	}
	// Recorders come from the tailnet's policy, so there are few. Forgetting them
	// costs a few head starts.
	if _, ok := m.late[recorder]; !ok && len(m.late) >= maxRemembered {
		clear(m.late)
	}
	if !timedOut.Before(m.late[recorder]) {
		m.late[recorder] = timedOut
	}
}

// noteAnswer notes that a recorder answered.
func (m *memory) noteAnswer(recorder netip.AddrPort) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.late, recorder)
}
