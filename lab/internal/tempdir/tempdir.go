// SPDX-License-Identifier: Apache-2.0

// Package tempdir provides folders for the state of tailnet nodes.
package tempdir

import (
	"os"
	"testing"
	"time"
)

// patience is how long a node may keep writing after it was closed.
const patience = 10 * time.Second

// New returns a folder that is removed when the test has ended. Unlike
// [testing.T.TempDir], it tolerates writes for a short time after that: a node's
// Close does not wait for all of its goroutines.
func New(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "node-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		began := time.Now()
		for {
			err := os.RemoveAll(dir)
			if err == nil {
				return
			}
			if time.Since(began) > patience {
				t.Errorf("removing a node's folder: %v", err)
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
	return dir
}
