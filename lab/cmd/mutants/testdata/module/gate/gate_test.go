// SPDX-License-Identifier: Apache-2.0

package gate

import "testing"

func TestCheck(t *testing.T) {
	for name, ok := range map[string]bool{"": false, "alice": true, "root": false, "system:x": false} {
		if err := Check(Visitor{Name: name}); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestEnter(t *testing.T) {
	before := make(map[string]int)
	for i := range 3 {
		v, times := Enter("alice", before)
		if v.Name != "alice" || times != i || (len(v.Groups) == 1) != (i > 0) {
			t.Errorf("%d: got %+v, %d", i, v, times)
		}
	}
}

func TestKind(t *testing.T) {
	for day, want := range map[string]string{"saturday": "weekend", "sunday": "weekend", "monday": "open"} {
		if got := Kind(day, true); got != want {
			t.Errorf("%s: got %s", day, got)
		}
	}
	if got := Kind("monday", false); got != "" {
		t.Errorf("got %s", got)
	}
}

func TestWait(t *testing.T) { Visitor{}.Wait(0, 3) }

func TestFirst(t *testing.T) {
	even := func(n int) bool { return n%2 == 0 }
	if got, ok := First(even, 1, 2, 3); got != 2 || !ok {
		t.Errorf("got %d, %t", got, ok)
	}
	if got, ok := First(even, 1); got != 0 || ok {
		t.Errorf("got %d, %t", got, ok)
	}
}

func TestCached(t *testing.T) {
	if got := Cached(2, map[int]int{2: 4}); got != 4 {
		t.Errorf("got %d", got)
	}
}

// It fails now and then, and so it must not count.
func TestBroken(t *testing.T) { t.Error("broken") }

func TestOpen(t *testing.T) {
	if Open != 1 {
		t.Errorf("got %d; want 1", Open)
	}
}
