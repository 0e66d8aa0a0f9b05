// SPDX-License-Identifier: Apache-2.0

package impersonate_test

import (
	"strings"
	"testing"

	"tailscale.com/tstest/deptest"
)

func TestDoesNotDependOnCaddy(t *testing.T) {
	const why = "what decides who a caller is has to be readable and testable without a web server, " +
		"and must not be reachable by Caddy's config, replacer or module state; " +
		"whatever needs Caddy belongs into the root package, caddyfile or transport"
	seen := 0
	deptest.DepChecker{
		OnDep: func(dep string) {
			seen++
			if strings.HasPrefix(dep, "github.com/caddyserver/") {
				t.Errorf("package impersonate depends on %s; reason against it: %s", dep, why)
			}
			if strings.HasPrefix(dep, "github.com/tailscale-impersonate/") {
				t.Errorf("package impersonate depends on %s; it comes first in the flow of data and depends on no other part of this module", dep)
			}
		},
	}.Check(t)
	if seen == 0 {
		t.Error("got no dependencies at all; the check saw nothing")
	}
}
