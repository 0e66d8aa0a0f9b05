// SPDX-License-Identifier: Apache-2.0

package proxytest

import (
	"runtime"
	"testing"
	"time"
)

// WaitForGoroutines waits until there are no more than n goroutines and a few that come
// and go. It calls settle, if that is not nil, before each look.
func WaitForGoroutines(t testing.TB, n int, settle func()) {
	t.Helper()
	const slack = 3
	for deadline := time.Now().Add(20 * time.Second); ; {
		if settle != nil {
			settle()
		}
		if runtime.NumGoroutine() <= n+slack {
			return
		}
		if time.Now().After(deadline) {
			stacks := make([]byte, 1<<20)
			t.Fatalf("%d goroutines are left of %d:\n%s", runtime.NumGoroutine(), n, stacks[:runtime.Stack(stacks, true)])
		}
		time.Sleep(20 * time.Millisecond) // between two looks
	}
}
