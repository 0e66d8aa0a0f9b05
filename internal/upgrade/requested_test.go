// SPDX-License-Identifier: Apache-2.0

package upgrade_test

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	"tailscale.com/tstest/deptest"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade"
)

func TestRequested(t *testing.T) {
	for _, tt := range []struct {
		name      string
		header    http.Header
		requested bool     // by Requested
		any       bool     // by Protocols, in any spelling
		protocols []string // that Protocols returns
	}{
		{"nothing", http.Header{}, false, false, nil},
		{"both", http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}}, true, true, []string{"websocket"}},
		{"token in lower case", http.Header{"Connection": {"upgrade"}, "Upgrade": {"websocket"}}, true, true, []string{"websocket"}},
		{"token among others", http.Header{"Connection": {"keep-alive", "close, UPGRADE"}, "Upgrade": {"websocket"}}, true, true, []string{"websocket"}},
		{"several protocols", http.Header{"Connection": {"Upgrade"}, "Upgrade": {"a", "b"}}, true, true, []string{"a", "b"}},
		{"Upgrade alone", http.Header{"Upgrade": {"websocket"}}, false, false, nil},
		{"Connection alone", http.Header{"Connection": {"Upgrade"}}, false, true, nil},
		{"another token", http.Header{"Connection": {"Upgrades, keep-alive"}, "Upgrade": {"websocket"}}, false, false, nil},
		{"first protocol empty", http.Header{"Connection": {"Upgrade"}, "Upgrade": {"", "websocket"}}, false, true, []string{"", "websocket"}},
		{"odd Connection", http.Header{"connection": {"Upgrade"}, "Upgrade": {"websocket"}}, false, true, []string{"websocket"}},
		{"odd Upgrade", http.Header{"Connection": {"Upgrade"}, "UPGRADE": {"websocket"}}, false, true, []string{"websocket"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := upgrade.Requested(tt.header); got != tt.requested {
				t.Errorf("Requested: got %t; want %t", got, tt.requested)
			}
			protocols, requested := upgrade.Protocols(tt.header)
			if requested != tt.any || !slices.Equal(protocols, tt.protocols) {
				t.Errorf("Protocols: got %q, %t; want %q, %t", protocols, requested, tt.protocols, tt.any)
			}
		})
	}
}

func TestDependsOnLittle(t *testing.T) {
	deptest.DepChecker{
		OnDep: func(dep string) {
			for _, prefix := range []string{"github.com/", "k8s.io/", "tailscale.com/"} {
				if strings.HasPrefix(dep, prefix) {
					t.Errorf("package upgrade depends on %s; package impersonate imports it and must stay free of that", dep)
				}
			}
		},
	}.Check(t)
}
