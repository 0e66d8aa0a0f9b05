// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// Who changes a line of the table changes the table as well.
func TestTable_LinesStandOnce(t *testing.T) {
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range table {
		for _, m := range f.mutants {
			if err := (attempt{f.path, m}).check(root); err != nil {
				t.Errorf("%s: %s: %v", f.path, m.name, err)
			}
		}
	}
}
