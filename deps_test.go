// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
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

// What other modules can import is promised to stay. So it is little, and all else is below
// internal.
func TestLayout_FewPackagesCanBeImported(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-f", "{{.ImportPath}}", "./...").Output()
	if err != nil {
		t.Fatal(err)
	}
	const module = "github.com/tailscale-impersonate/caddy-tailscale-impersonate"
	var got []string
	for line := range strings.Lines(string(out)) {
		path := strings.TrimSpace(line)
		if !strings.HasPrefix(path, module+"/internal/") {
			got = append(got, strings.TrimPrefix(path, module))
		}
	}
	slices.Sort(got)
	if diff := cmp.Diff([]string{"", "/caddyfile", "/impersonate", "/recordings"}, got); diff != "" {
		t.Errorf("packages that others can import (-want +got):\n%s", diff)
	}
}
