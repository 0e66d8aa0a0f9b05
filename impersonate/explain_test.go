// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"tailscale.com/tailcfg"
)

// granted returns a peer with these values of the capability name.
func granted(name tailcfg.PeerCapability, values ...string) Peer {
	p := Peer{Node: "laptop.example.ts.net", Login: "alice@example.com", Capabilities: tailcfg.PeerCapMap{}}
	for _, value := range values {
		p.Capabilities[name] = append(p.Capabilities[name], tailcfg.RawMessage(value))
	}
	return p
}

func TestExplanation_NamesTheGrantsOfEachGroup(t *testing.T) {
	const both, one, none = `{"impersonate":{"groups":["a","b","a"]}}`, `{"impersonate":{"groups":["b"]}}`, `{"recorder":["tag:r"]}`
	for _, name := range Capabilities {
		id, why, err := granted(name, both, none, one).Identity(Capabilities)
		if err != nil {
			t.Fatal(err)
		}
		want := Explanation{Capability: name, Grants: []Grant{
			{Value: both, Groups: []string{"a", "b"}},
			{Value: none},
			{Value: one, Groups: []string{"b"}},
		}}
		if diff := cmp.Diff(want, why); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		if !slices.Equal(id.Groups, []string{"a", "b"}) {
			t.Errorf("%s: groups %v; want those of the explanation", name, id.Groups)
		}
	}
}

func TestExplanation_RecordedUpToAnError(t *testing.T) {
	name := Capabilities[0]
	for _, values := range [][]string{
		{`{"impersonate":{"groups":["a",""]}}`},
		{`{"impersonate":{"groups":["a"]}}`, `{"impersonate":"everybody"}`},
		{`{"enforceRecorder":true}`}, // so its groups are its tags
	} {
		peer := granted(name, values...)
		peer.Tags = groups("prod")
		id, why, err := peer.Identity(Capabilities)
		if err == nil || !cmp.Equal(id, Identity{}) {
			t.Errorf("%q: got %+v, %v; want an error", values, id, err)
		}
		if why.Capability != name || len(why.Grants) != len(values) || string(why.Grants[0].Value) != values[0] {
			t.Errorf("%q: got %+v; want the grants as they are", values, why)
		}
	}
}

func TestExplanation_EmptyWithoutGrants(t *testing.T) {
	_, why, err := Peer{Node: "ci.example.ts.net", Tags: []string{"tag:ci"}}.Identity(Capabilities)
	if err != nil {
		t.Fatal(err)
	}
	if why.Capability != "" || len(why.Grants) > 0 {
		t.Errorf("got %+v; want nothing", why)
	}
}

func TestDistance(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{{"", "abc", 3}, {"abc", "", 3}, {"abc", "abc", 0}, {"group", "groups", 1}, {"gruops", "groups", 2}, {"xgroups", "groups", 1}, {"kitten", "sitting", 3}} {
		if got := distance(tt.a, tt.b); got != tt.want {
			t.Errorf("from %q to %q: got %d; want %d", tt.a, tt.b, got, tt.want)
		}
	}
}
