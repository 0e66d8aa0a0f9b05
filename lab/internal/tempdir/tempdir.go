// SPDX-License-Identifier: Apache-2.0

// Package tempdir provides folders for the state of tailnet nodes.
package tempdir

import (
	"os"
	"testing"
	"time"
)

// patience is how long a node may go on writing after it was closed.
const patience = 10 * time.Second

// New returns a folder that is removed when the test has ended. Unlike one of
// [testing.T.TempDir], it may still be written to for a moment by then: a node's Close
// does not wait for all that the node is about.
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
