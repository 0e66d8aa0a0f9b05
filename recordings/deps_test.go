// SPDX-License-Identifier: Apache-2.0

package recordings_test

import (
	"strings"
	"testing"

	"tailscale.com/tstest/deptest"
)

// Whoever adds a storage gets nothing else with what it has to do.
func TestDependencies_StandardLibraryOnly(t *testing.T) {
	seen := 0
	deptest.DepChecker{
		OnDep: func(dep string) {
			seen++
			if first, _, _ := strings.Cut(dep, "/"); strings.Contains(first, ".") {
				t.Errorf("package recordings depends on %s", dep)
			}
		},
	}.Check(t)
	if seen == 0 {
		t.Error("got no dependencies at all; the check saw nothing")
	}
}
