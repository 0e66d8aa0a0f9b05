// SPDX-License-Identifier: Apache-2.0

package recorder

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestMemory_Order(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all := []netip.AddrPort{first, second, third}
		var m memory
		check := func(when string, want ...netip.AddrPort) {
			t.Helper()
			if diff := cmp.Diff(want, m.order(all), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
				t.Errorf("%s (-want +got):\n%s", when, diff)
			}
		}
		check("at first", first, second, third)
		m.noteLate(first)
		check("after the first was late", second, third, first)
		m.noteTimeout(second)
		check("after the second timed out", third, first)
		m.noteLate(second)
		check("a head start does not erase a timeout", third, first)
		time.Sleep(timeout) // of the bubble's clock
		check("later", third, first, second)
		m.noteAnswer(second)
		check("after the second answered", second, third, first)
	})
}

func TestMemory_IsBounded(t *testing.T) {
	var m memory
	for port := range uint16(3 * maxRemembered) {
		m.noteTimeout(netip.AddrPortFrom(first.Addr(), port+1))
		if n := len(m.late); n > maxRemembered {
			t.Fatalf("%d recorders are remembered; want at most %d", n, maxRemembered)
		}
	}
	latest := netip.AddrPortFrom(first.Addr(), 3*maxRemembered)
	if got := m.order([]netip.AddrPort{latest}); len(got) > 0 {
		t.Error("the latest timeout is forgotten")
	}
}
