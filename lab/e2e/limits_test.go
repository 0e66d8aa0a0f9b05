// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"strings"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// The policy file has the grants. The API server says what the site's limits leave
// of them.
func TestLimits_ApplyToGrants(t *testing.T) {
	for _, tt := range []struct {
		why, caller, port string
		want              string // user and groups
		refused           string // kubectl's error, if refused
	}{
		{"other groups are removed, and names get prefixes", "erin", portGroupLimits, `tailnet:erin@example.com ["tailnet:a","system:authenticated"]`, ""},
		{"system:masters is denied", "alice", portGroupLimits, `tailnet:alice@example.com ["system:authenticated"]`, ""},
		{"tags are removed as groups", "ci", portGroupLimits, `tailnet:ci.` + lab.Domain + ` ["system:authenticated"]`, ""},
		{"a required group is granted", "bob", portDeviceLimits, `bob@example.com ["tailnet-readers","system:authenticated"]`, ""},
		{"a required group is missing", "carol", portDeviceLimits, "", "carol@example.com on carol.tailnet.example may not use this server: require_groups is on, and no group is granted"},
		{"an allowed tag", "ci", portDeviceLimits, `ci.` + lab.Domain + ` ["tag:k8s-readers","system:authenticated"]`, ""},
		{"a denied tag", "ops", portDeviceLimits, "", "may not use this server: the device has the tag tag:k8s-ops, which deny_tags names"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			caller := theLab.Callers[tt.caller]
			kubeconfig := caller.Kubeconfig + "." + tt.port
			if err := caller.WriteKubeconfig(kubeconfig, "http://"+lab.ProxyName+":"+tt.port); err != nil {
				t.Fatal(err)
			}
			stdout, stderr, err := runKubectl(t, kubeconfig, nil, "auth", "whoami", "-o", "jsonpath={.status.userInfo.username} {.status.userInfo.groups}")
			if tt.refused != "" {
				if err == nil || !strings.Contains(stderr, tt.refused) {
					t.Errorf("kubectl printed %q %q (%v); want %q", stdout, stderr, err, tt.refused)
				}
				return
			}
			if err != nil || stdout != tt.want {
				t.Errorf("the API server says %q (%v: %s); want %q", stdout, err, stderr, tt.want)
			}
		})
	}
}
