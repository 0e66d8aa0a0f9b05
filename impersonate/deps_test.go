// SPDX-License-Identifier: Apache-2.0

package impersonate_test

import (
	"slices"
	"strings"
	"testing"

	"tailscale.com/tstest/deptest"
)

// allowed are the packages of this module that impersonate may depend on. They are
// pure functions of strings and headers, so they bring in neither Caddy nor a network.
var allowed = []string{
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip",    // what clients write, in errors
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/glob",    // the patterns of Limits
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade", // what a request for an upgrade is
}

func TestDependencies_NeitherCaddyNorOtherPackages(t *testing.T) {
	const why = "what decides who a caller is has to be readable and testable without a web server, " +
		"and must not be reachable by Caddy's config, replacer or module state; " +
		"code that needs Caddy belongs in the root package, caddyfile or a package below internal"
	seen := 0
	deptest.DepChecker{
		OnDep: func(dep string) {
			seen++
			if strings.HasPrefix(dep, "github.com/caddyserver/") {
				t.Errorf("package impersonate depends on %s; reason against it: %s", dep, why)
			}
			if strings.HasPrefix(dep, "github.com/tailscale-impersonate/") && !slices.Contains(allowed, dep) {
				t.Errorf("package impersonate depends on %s; it comes first in the flow of data and depends on no part of this module but %q", dep, allowed)
			}
		},
	}.Check(t)
	if seen == 0 {
		t.Error("got no dependencies at all; the check saw nothing")
	}
}
