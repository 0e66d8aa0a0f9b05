// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
)

// Without its rights, the proxy says so: to callers, and in its log when a config starts.
func TestPermission_MissingOneIsNamed(t *testing.T) {
	for _, byConstraints := range []bool{false, true} {
		t.Run(fmt.Sprintf("constrained %v", byConstraints), func(t *testing.T) {
			limit(t, withoutGrant(t, "tailnet-readers"), byConstraints)
			eventually(t, "bob's group is refused", func() error {
				resp := send(t, "bob", "80", get("/api/v1/namespaces/default/pods"))
				if resp.StatusCode != http.StatusForbidden || !strings.Contains(resp.body, "the proxy's account") {
					return fmt.Errorf("got %s: %s", resp.Status, resp.body)
				}
				return nil
			})
			log := tail(t, theLab.Log("caddy"))
			want := `"tailnet-readers" is forbidden: the proxy's account cannot impersonate`
			for _, args := range []string{"get pods", "get --raw /version", "api-resources", "exec web -- date", "auth whoami", "delete pod none"} {
				// What the account lacked a second ago may still be named.
				eventually(t, "kubectl "+args+" names the permission, and the command that helps", func() error {
					_, stderr, err := tryKubectl(t, "bob", strings.Fields(args)...)
					if err == nil || !strings.Contains(strings.ReplaceAll(stderr, `\"`, `"`), want) || !strings.Contains(stderr, "caddy tailscale-impersonate rbac") {
						return fmt.Errorf("got %v: %s; want %q", err, stderr, want) //nolint:errorlint // nil if kubectl succeeds
					}
					return nil
				})
			}
			if lines := strings.Join(log.lines(t), "\n"); !strings.Contains(lines, `"code":"no_permission"`) {
				t.Errorf("nothing in Caddy's log says so:\n%s", lines)
			}
			// A caller who lacks a permission of its own.
			if _, stderr, err := tryKubectl(t, "dave", "get", "pods"); err == nil || !strings.Contains(stderr, `User "dave@example.com" cannot list`) || strings.Contains(stderr, "the proxy's account") {
				t.Errorf("dave: %v: %s; want the API server's refusal, which names him", err, stderr)
			}
			if _, stderr, err := tryKubectl(t, "dave", "get", "--raw", "/api/v1/namespaces/default/pods/x%20cannot%20impersonate%20resource"); err == nil || !strings.Contains(stderr, `User "dave@example.com" cannot get`) || strings.Contains(stderr, "the proxy's account") {
				t.Errorf("dave, with a name that reads like it: %v: %s", err, stderr)
			}
		})
	}
}

func TestPermission_IsCheckedWhenConfigStarts(t *testing.T) {
	defer firstConfig(t)
	const message = "the proxy's account may not impersonate all users"
	admin := func(args ...string) {
		t.Helper()
		if _, stderr, err := runKubectl(t, theLab.AdminKubeconfig(), nil, args...); err != nil {
			t.Fatalf("kubectl %v: %v: %s", args, err, stderr)
		}
	}
	logged := func(version string) string {
		t.Helper()
		log, lines := tail(t, theLab.Log("caddy")), ""
		if err := theLab.Caddy.Load(withVersion(version)); err != nil {
			t.Fatal(err)
		}
		eventually(t, "Caddy has started", func() error {
			lines += strings.Join(log.lines(t), "\n")
			if !strings.Contains(lines, message) {
				return errors.New(lines)
			}
			return nil
		})
		return lines
	}
	limit(t, theLab.Policy, *constrained)
	for _, name := range []string{"tailscale-impersonate", "tailscale-impersonate-tailnet"} {
		admin("delete", "clusterrolebinding", name)
	}
	eventually(t, "bob is refused", func() error { return cannotImpersonate(t, "bob") })
	lines := logged("without-rights")
	for _, want := range []string{"caddy tailscale-impersonate rbac", "http.reverse_proxy.transport.kubernetes", `cannot impersonate resource`, `cannot impersonate:user-info resource`} {
		if !strings.Contains(lines, want) {
			t.Errorf("the log does not say %q:\n%s", want, lines)
		}
	}
}
