// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"strings"
	"testing"

	"tailscale.com/tstest/deptest"
)

func TestDependencies_NoTestPackages(t *testing.T) {
	seen := false
	deptest.DepChecker{
		OnDep: func(dep string) {
			switch {
			case strings.HasSuffix(dep, "/internal/authn"):
				seen = true
			case strings.HasSuffix(dep, "/internal/proxytest"), strings.HasSuffix(dep, "/internal/recordertest"):
				t.Errorf("the module depends on %s; only tests may import it", dep)
			}
		},
	}.Check(t)
	if !seen {
		t.Error("got no dependency on internal/authn; the check saw nothing")
	}
}
