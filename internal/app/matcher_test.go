// SPDX-License-Identifier: Apache-2.0

package app

import (
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

func TestMatchUp_TakesNoOptions(t *testing.T) {
	for text, valid := range map[string]bool{"tailnet_up": true, "tailnet_up k8s": false, "tailnet_up {\nnode k8s\n}": false} {
		if err := new(MatchUp).UnmarshalCaddyfile(caddyfile.NewTestDispenser(text)); (err == nil) != valid {
			t.Errorf("%q: got error %v; want one: %v", text, err, !valid)
		}
	}
}
