// SPDX-License-Identifier: Apache-2.0

package impersonate_test

import (
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

// aUser returns the WhoIs answer for a user's device. Each grant is the JSON of
// one rule for tailscale.com/cap/kubernetes.
func aUser(login string, grants ...string) *apitype.WhoIsResponse {
	return &apitype.WhoIsResponse{
		Node:        &tailcfg.Node{Name: "laptop.example.ts.net.", StableID: "nLaptop"},
		UserProfile: &tailcfg.UserProfile{ID: 7, LoginName: login},
		CapMap:      capMap(grants...),
	}
}

// aDevice returns the WhoIs answer for a tagged device. The control server reports
// "tagged-devices" as its user.
func aDevice(name string, tags []string, grants ...string) *apitype.WhoIsResponse {
	return &apitype.WhoIsResponse{
		Node:        &tailcfg.Node{Name: name, StableID: "nDevice", Tags: tags},
		UserProfile: &tailcfg.UserProfile{ID: 8, LoginName: "tagged-devices"},
		CapMap:      capMap(grants...),
	}
}

// sharedIn marks the device in who as shared in from another tailnet.
func sharedIn(who *apitype.WhoIsResponse) *apitype.WhoIsResponse {
	who.Node.Hostinfo = (&tailcfg.Hostinfo{ShareeNode: true}).View()
	return who
}

func capMap(grants ...string) tailcfg.PeerCapMap {
	if len(grants) == 0 {
		return nil
	}
	return tailcfg.PeerCapMap{tailcfg.PeerCapabilityKubernetes: raw(grants...)}
}

func raw(grants ...string) []tailcfg.RawMessage {
	var messages []tailcfg.RawMessage
	for _, grant := range grants {
		messages = append(messages, tailcfg.RawMessage(grant))
	}
	return messages
}

func TestPeerFrom_UsersAndTaggedDevices(t *testing.T) {
	own := aDevice("ci.example.ts.net.", []string{"tag:ci"})
	own.Node.Hostinfo = (&tailcfg.Hostinfo{}).View()
	grants := capMap(`{}`)
	sharedByBob := aUser("bob@example.org")
	sharedByBob.Node.Sharer = 7

	for _, tt := range []struct {
		name string
		who  *apitype.WhoIsResponse
		want impersonate.Peer
	}{
		{
			"user's device", aUser("alice@example.com", `{}`),
			impersonate.Peer{Node: "laptop.example.ts.net", NodeID: "nLaptop", Login: "alice@example.com", UserID: 7, Capabilities: grants},
		},
		{
			"tagged device has no login", own,
			impersonate.Peer{Node: "ci.example.ts.net", NodeID: "nDevice", Tags: []string{"tag:ci"}},
		},
		{
			"tagged device without a user profile", &apitype.WhoIsResponse{Node: &tailcfg.Node{Name: "ci.example.ts.net.", Tags: []string{"tag:ci"}}},
			impersonate.Peer{Node: "ci.example.ts.net", Tags: []string{"tag:ci"}},
		},
		{
			"device that its owner shares", sharedByBob,
			impersonate.Peer{Node: "laptop.example.ts.net", NodeID: "nLaptop", Login: "bob@example.org", UserID: 7, Shared: true},
		},
		{
			"device of another tailnet's user", sharedIn(aUser("bob@example.org")),
			impersonate.Peer{Node: "laptop.example.ts.net", NodeID: "nLaptop", Login: "bob@example.org", UserID: 7, Shared: true},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := impersonate.PeerFrom(tt.who)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("peer (-want +got):\n%s", diff)
			}
		})
	}
}

func TestPeerFrom_RejectsIncompleteAnswers(t *testing.T) {
	for name, who := range map[string]*apitype.WhoIsResponse{
		"no answer":                         nil,
		"no node":                           {UserProfile: &tailcfg.UserProfile{LoginName: "alice@example.com"}},
		"untagged device without a user":    {Node: &tailcfg.Node{Name: "laptop.example.ts.net."}},
		"empty":                             {},
		"no node, but grants (Funnel-like)": {CapMap: capMap(`{"impersonate":{"groups":["system:masters"]}}`)},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := impersonate.PeerFrom(who)
			if err == nil {
				t.Error("got no error; want one")
			}
			if diff := cmp.Diff(impersonate.Peer{}, got); diff != "" {
				t.Errorf("got a peer along with the error (-want +got):\n%s", diff)
			}
		})
	}
}

func TestPeerFrom_RejectsExpiredKeys(t *testing.T) {
	for _, who := range []*apitype.WhoIsResponse{aUser("alice@example.com", `{}`), aDevice("ci.example.ts.net.", []string{"tag:ci"})} {
		who.Node.Expired = true
		got, err := impersonate.PeerFrom(who)
		if want := strings.TrimSuffix(who.Node.Name, ".") + " has expired"; err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got error %v; want one that says %q", who.Node.Name, err, want)
		}
		if diff := cmp.Diff(impersonate.Peer{}, got); diff != "" {
			t.Errorf("%s: peer (-want +got):\n%s", who.Node.Name, diff)
		}
	}
}

func TestPeerFrom_CopiesTags(t *testing.T) {
	who := aDevice("ci.example.ts.net.", []string{"tag:ci"})
	peer, err := impersonate.PeerFrom(who)
	if err != nil {
		t.Fatal(err)
	}
	who.Node.Tags[0] = "tag:admin"
	if got, want := peer.Tags[0], "tag:ci"; got != want {
		t.Errorf("got tag %q after the answer was changed; want %q", got, want)
	}
}

func TestPeer_String(t *testing.T) {
	for _, tt := range []struct {
		peer impersonate.Peer
		want string
	}{
		{impersonate.Peer{Node: "laptop.example.ts.net", Login: "alice@example.com"}, "alice@example.com"},
		{impersonate.Peer{Node: "ci.example.ts.net", Tags: []string{"tag:ci"}}, "ci.example.ts.net"},
		{impersonate.Peer{Node: "laptop.example.ts.net"}, "device laptop.example.ts.net"},
	} {
		if got := tt.peer.String(); got != tt.want {
			t.Errorf("String of %+v: got %q; want %q", tt.peer, got, tt.want)
		}
	}
}

// Whatever a peer is, each of its fields counts, also one that is added later.
func TestPeer_EqualComparesEachField(t *testing.T) {
	peer := func() impersonate.Peer {
		return impersonate.Peer{
			Node: "a", NodeID: "b", Tags: []string{"tag:a", "tag:b"}, Login: "c", UserID: 1, Shared: true,
			Capabilities: tailcfg.PeerCapMap{"x": {"1", "2"}, "y": nil},
		}
	}
	if !peer().Equal(peer()) {
		t.Fatal("a peer is not equal to itself")
	}
	for i := range reflect.TypeFor[impersonate.Peer]().NumField() {
		other := peer()
		reflect.ValueOf(&other).Elem().Field(i).SetZero()
		if other.Equal(peer()) || peer().Equal(other) {
			t.Errorf("peers that differ in %s are equal", reflect.TypeFor[impersonate.Peer]().Field(i).Name)
		}
	}
	for name, change := range map[string]func(*impersonate.Peer){
		"a tag":                 func(p *impersonate.Peer) { p.Tags[1] = "tag:c" },
		"fewer tags":            func(p *impersonate.Peer) { p.Tags = p.Tags[:1] },
		"a rule":                func(p *impersonate.Peer) { p.Capabilities["x"][1] = "3" },
		"the order of rules":    func(p *impersonate.Peer) { p.Capabilities["x"] = []tailcfg.RawMessage{"2", "1"} },
		"another rule":          func(p *impersonate.Peer) { p.Capabilities["y"] = []tailcfg.RawMessage{"1"} },
		"fewer rules":           func(p *impersonate.Peer) { p.Capabilities["x"] = p.Capabilities["x"][:1] },
		"a capability less":     func(p *impersonate.Peer) { delete(p.Capabilities, "y") },
		"another capability":    func(p *impersonate.Peer) { p.Capabilities["z"] = nil },
		"a capability's name":   func(p *impersonate.Peer) { delete(p.Capabilities, "y"); p.Capabilities["z"] = nil },
		"where the rules stand": func(p *impersonate.Peer) { p.Capabilities["x"], p.Capabilities["y"] = nil, p.Capabilities["x"] },
	} {
		other := peer()
		change(&other)
		if other.Equal(peer()) || peer().Equal(other) {
			t.Errorf("peers that differ in %s are equal", name)
		}
	}
}

func TestPeer_Describe(t *testing.T) {
	for _, tt := range []struct {
		peer impersonate.Peer
		want string
	}{
		{impersonate.Peer{Node: "laptop.example.ts.net", Login: "alice@example.com"}, "alice@example.com on laptop.example.ts.net"},
		{impersonate.Peer{Node: "ci.example.ts.net", Tags: []string{"tag:ci", "tag:prod"}}, "device ci.example.ts.net (tag:ci, tag:prod)"},
		{impersonate.Peer{Node: "laptop.example.ts.net"}, "device laptop.example.ts.net"},
		{impersonate.Peer{Login: "alice@example.com"}, "alice@example.com"},
	} {
		if got := tt.peer.Describe(); got != tt.want {
			t.Errorf("%+v: got %q; want %q", tt.peer, got, tt.want)
		}
	}
}
