// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"strings"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// What is granted is in the policy file; what is left of it says the API server.
func TestLimitsHoldWhateverThePolicyFileGrants(t *testing.T) {
	for _, tt := range []struct {
		why, caller, port string
		want              string // user and groups
		refused           string // what kubectl prints otherwise
	}{
		{"groups that are not allowed are cut, and names get prefixes", "erin", portGroupRails, `tailnet:erin@example.com ["tailnet:a","system:authenticated"]`, ""},
		{"who may do anything is denied that", "alice", portGroupRails, `tailnet:alice@example.com ["system:authenticated"]`, ""},
		{"tags that are not allowed as groups are cut", "ci", portGroupRails, `tailnet:ci.` + lab.Domain + ` ["system:authenticated"]`, ""},
		{"a group that is there, as required", "bob", portDeviceRails, `bob@example.com ["tailnet-readers","system:authenticated"]`, ""},
		{"a group that is not", "carol", portDeviceRails, "", "carol@example.com on carol.tailnet.example may not use this server: require_groups is on, and no group is granted"},
		{"a tag that is allowed", "ci", portDeviceRails, `ci.` + lab.Domain + ` ["tag:k8s-readers","system:authenticated"]`, ""},
		{"a tag that is denied", "ops", portDeviceRails, "", "may not use this server: the device has the tag tag:k8s-ops, which deny_tags names"},
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
					t.Errorf("kubectl says %q %q (%v); want it to say %q", stdout, stderr, err, tt.refused)
				}
				return
			}
			if err != nil || stdout != tt.want {
				t.Errorf("the API server says %q (%v: %s); want %q", stdout, err, stderr, tt.want)
			}
		})
	}
}
