// SPDX-License-Identifier: Apache-2.0

package impersonate_test

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

func TestRecording_AddsUpGrants(t *testing.T) {
	const (
		readers  = `{"impersonate":{"groups":["tailnet-readers"]}}`
		open     = `{"recorder":["tag:recorder"],"recorderAddrs":["100.64.0.9:80"]}`
		closed   = `{"recorderAddrs":["100.64.0.9:80","[fd7a:115c:a1e0::9]:80"],"enforceRecorder":true}`
		mapped   = `{"recorderAddrs":["[::ffff:100.64.0.9]:80","100.64.0.8:80"],"enforceRecorder":false}`
		enforce  = `{"enforceRecorder":true}`
		byTag    = `{"recorder":["tag:recorder"]}`
		nobody   = `{"recorder":[],"recorderAddrs":[]}`
		events   = `{"enableEvents":true}`
		noEvents = `{"enableEvents":false}`
	)
	four, eight, six := netip.MustParseAddrPort("100.64.0.9:80"), netip.MustParseAddrPort("100.64.0.8:80"), netip.MustParseAddrPort("[fd7a:115c:a1e0::9]:80")

	for _, tt := range []struct {
		name   string
		grants []string
		want   impersonate.Recording
		wanted bool
	}{
		{"no grant", nil, impersonate.Recording{}, false},
		{"grants without recorders", []string{readers, nobody}, impersonate.Recording{}, false},
		{"one", []string{open}, impersonate.Recording{Recorders: []netip.AddrPort{four}}, true},
		{"all recorders, each once", []string{open, mapped, readers, open}, impersonate.Recording{Recorders: []netip.AddrPort{four, eight}}, true},
		{"enforced by the last grant", []string{open, readers, closed}, impersonate.Recording{Recorders: []netip.AddrPort{four, six}, Enforce: true}, true},
		{"enforced by the first grant", []string{closed, mapped}, impersonate.Recording{Recorders: []netip.AddrPort{four, six, eight}, Enforce: true}, true},
		{"enforced by a grant without a recorder", []string{enforce, open}, impersonate.Recording{Recorders: []netip.AddrPort{four}, Enforce: true}, true},
		{"enforced without any recorder", []string{readers, enforce}, impersonate.Recording{Enforce: true}, true},
		{"a recorder by its tag only", []string{byTag}, impersonate.Recording{Unresolved: true}, true},
		{"a recorder by its tag only, and another", []string{byTag, open}, impersonate.Recording{Recorders: []netip.AddrPort{four}, Unresolved: true}, true},
		{"events", []string{noEvents, events, noEvents}, impersonate.Recording{Events: true}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for name, who := range map[string]func(...string) (impersonate.Identity, error){
				"user": func(grants ...string) (impersonate.Identity, error) {
					return identityOf(aUser("alice@example.com", grants...))
				},
				"device": func(grants ...string) (impersonate.Identity, error) {
					return identityOf(aDevice("ci.example.ts.net.", []string{"tag:ci"}, grants...))
				},
			} {
				id, err := who(tt.grants...)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(tt.want, id.Recording, equateAddrs); diff != "" {
					t.Errorf("%s: recording (-want +got):\n%s", name, diff)
				}
				if got := id.Recording.Wanted(); got != tt.wanted {
					t.Errorf("%s: wanted is %t; want %t", name, got, tt.wanted)
				}
			}
		})
	}
}
