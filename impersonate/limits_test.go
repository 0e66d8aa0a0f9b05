// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"tailscale.com/tailcfg"
)

func groups(names ...string) []string { return names }

func TestLimits_ApplyRemovesGroupsAndAddsPrefixes(t *testing.T) {
	granted := Identity{User: "alice@example.com", Groups: groups("system:masters", "team:a", "team:b"), Source: SourceGrants, Node: "laptop.example.ts.net"}
	for _, tt := range []struct {
		name   string
		limits Limits
		user   string
		left   []string
		cut    []string
	}{
		{"no limits", Limits{}, "alice@example.com", granted.Groups, nil},
		{"denied", Limits{DenyGroups: groups("system:masters")}, "alice@example.com", groups("team:a", "team:b"), groups("system:masters")},
		{"denied by a pattern", Limits{DenyGroups: groups("system:*", "*:b")}, "alice@example.com", groups("team:a"), groups("system:masters", "team:b")},
		{"allowed by a pattern", Limits{AllowGroups: groups("team:*")}, "alice@example.com", groups("team:a", "team:b"), groups("system:masters")},
		{"deny beats allow", Limits{AllowGroups: groups("*"), DenyGroups: groups("team:a")}, "alice@example.com", groups("system:masters", "team:b"), groups("team:a")},
		{"nothing is left", Limits{AllowGroups: groups("other")}, "alice@example.com", nil, granted.Groups},
		{"required, and a group is left", Limits{AllowGroups: groups("team:a"), RequireGroups: true}, "alice@example.com", groups("team:a"), groups("system:masters", "team:b")},
		{
			"patterns see names without the prefix", Limits{AllowGroups: groups("team:a"), DenyGroups: groups("tailnet:*"), UserPrefix: "tailnet:", GroupPrefix: "tailnet:"},
			"tailnet:alice@example.com", groups("tailnet:team:a"), groups("system:masters", "team:b"),
		},
		{"a prefix makes a reserved group harmless", Limits{GroupPrefix: "x:"}, "alice@example.com", groups("x:system:masters", "x:team:a", "x:team:b"), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, cut, err := tt.limits.Apply(Peer{}, granted)
			if err != nil {
				t.Fatal(err)
			}
			want := granted
			want.User, want.Groups = tt.user, tt.left
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("identity (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.cut, cut); diff != "" {
				t.Errorf("cut (-want +got):\n%s", diff)
			}
		})
	}
}

func TestLimits_ApplyRejects(t *testing.T) {
	for _, tt := range []struct {
		name   string
		limits Limits
		id     Identity
		words  []string
		cut    []string
	}{
		{"no group is granted", Limits{RequireGroups: true}, Identity{User: "alice@example.com"}, []string{"require_groups", "no group is granted"}, nil},
		{
			"all groups are removed", Limits{RequireGroups: true, DenyGroups: groups("system:*")},
			Identity{User: "alice@example.com", Groups: groups("system:masters")}, []string{"require_groups", "system:masters"}, groups("system:masters"),
		},
		{"user_prefix makes a reserved user", Limits{UserPrefix: "sys"}, Identity{User: "tem:admin"}, []string{"user_prefix", "system:admin"}, nil},
		{
			"group_prefix makes a reserved group", Limits{GroupPrefix: "system", DenyGroups: groups("a")},
			Identity{User: "alice", Groups: groups("a", ":masters")}, []string{"group_prefix", "system:masters"}, groups("a"),
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, cut, err := tt.limits.Apply(Peer{}, tt.id)
			if err == nil {
				t.Fatalf("got %+v; want an error", got)
			}
			if diff := cmp.Diff(Identity{}, got); diff != "" {
				t.Errorf("identity (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.cut, cut); diff != "" {
				t.Errorf("removed groups (-want +got):\n%s", diff)
			}
			for _, word := range tt.words {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("got error %q; want it to mention %q", err, word)
				}
			}
		})
	}
}

func TestLimits_CheckPeer(t *testing.T) {
	users := Peer{Node: "laptop", Login: "alice@example.com"}
	tagged := Peer{Node: "ci", Tags: []string{"tag:ci", "tag:k8s"}}
	foreign := Peer{Node: "ci", Tags: []string{"tag:ci", "tag:k8s"}, Shared: true}
	shared := Peer{Node: "guest", Login: "guest@example.org", Shared: true}
	for _, tt := range []struct {
		name   string
		limits Limits
		peer   Peer
		error  string // empty if none is wanted
	}{
		{"no limits, a user's device", Limits{}, users, ""},
		{"no limits, a tagged device", Limits{}, tagged, ""},
		{"no limits, a device shared in", Limits{}, shared, ""},
		{"a device shared in", Limits{DenyShared: true}, shared, "deny_shared"},
		{"a device of this tailnet", Limits{DenyShared: true}, tagged, ""},
		{"a tag is allowed", Limits{AllowTags: groups("tag:k8s")}, tagged, ""},
		{"a tag is allowed by a pattern", Limits{AllowTags: groups("tag:k*")}, tagged, ""},
		{"no tag is allowed", Limits{AllowTags: groups("tag:other")}, tagged, "tag:ci, tag:k8s"},
		{"tags of another tailnet are not allowed", Limits{AllowTags: groups("tag:k8s")}, foreign, "shared in"},
		{"a user's device that was shared in has no tags", Limits{AllowTags: groups("tag:k8s")}, shared, ""},
		{"tags of another tailnet are denied", Limits{DenyTags: groups("tag:k8s")}, foreign, "deny_tags"},
		{"a user's device has no tags", Limits{AllowTags: groups("tag:other"), DenyTags: groups("*")}, users, ""},
		{"a tag is denied", Limits{DenyTags: groups("tag:ci")}, tagged, "tag:ci"},
		{"another tag is denied", Limits{DenyTags: groups("tag:k8s")}, tagged, "tag:k8s"},
		{"deny beats allow", Limits{AllowTags: groups("tag:k8s"), DenyTags: groups("tag:ci")}, tagged, "deny_tags"},
		{"deny of another tag beats allow", Limits{AllowTags: groups("tag:ci"), DenyTags: groups("tag:k8s")}, tagged, "deny_tags"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.limits.CheckPeer(tt.peer)
			if (err != nil) != (tt.error != "") || (err != nil && !strings.Contains(err.Error(), tt.error)) {
				t.Errorf("got error %v; want one that mentions %q", err, tt.error)
			}
		})
	}
}

func TestLimits_CheckTarget(t *testing.T) {
	target := func(user string, groups ...string) *Target {
		return &Target{User: user, Groups: groups}
	}
	const account, node = "system:serviceaccount:ns:sa", "system:node:n1"
	for _, tt := range []struct {
		name   string
		limits Limits
		target *Target
		error  string // empty if none is wanted
	}{
		{"no limits", Limits{}, target("bob", "system:masters"), ""},
		{"a service account whose own groups are denied, with another group", Limits{DenyGroups: groups("system:serviceaccounts:ns")}, target(account, "a"), "deny_groups"},
		{"a service account with an allowed group", Limits{AllowGroups: groups("a")}, target(account, "a"), "allow_groups"},
		{"a node with an allowed group", Limits{AllowGroups: groups("a")}, target(node, "a"), "allow_groups"},
		{"no groups", Limits{AllowGroups: groups("a"), DenyGroups: groups("*"), RequireGroups: true}, target("bob"), ""},
		{"a denied group", Limits{DenyGroups: groups("system:masters")}, target("bob", "a", "system:masters"), "system:masters here, which deny_groups"},
		{"a group that a pattern denies", Limits{DenyGroups: groups("system:*")}, target("bob", "system:nodes"), "system:nodes"},
		{"a group that is allowed", Limits{AllowGroups: groups("a*")}, target("bob", "ab"), ""},
		{"a group that is not", Limits{AllowGroups: groups("a*")}, target("bob", "a", "b"), "group b here, which allow_groups"},
		{"deny beats allow", Limits{AllowGroups: groups("*"), DenyGroups: groups("b")}, target("bob", "b"), "deny_groups"},
		{"a denied group with the prefix", Limits{DenyGroups: groups("b"), GroupPrefix: "t:"}, target("bob", "t:b"), "deny_groups"},
		{"a denied group without the prefix", Limits{DenyGroups: groups("system:masters"), GroupPrefix: "t:"}, target("bob", "system:masters"), "deny_groups"},
		{"a denied group that only a pattern with the prefix matches", Limits{DenyGroups: groups("*:b"), GroupPrefix: "t:"}, target("bob", "t:b"), "deny_groups"},
		{"an allowed group with the prefix", Limits{AllowGroups: groups("a"), GroupPrefix: "t:"}, target("bob", "t:a"), ""},
		{"an allowed name without the prefix", Limits{AllowGroups: groups("a"), GroupPrefix: "t:"}, target("bob", "a"), "allow_groups"},
		{"a service account's groups are denied", Limits{DenyGroups: groups("system:serviceaccounts:ns")}, target(account), "system:serviceaccounts:ns"},
		{"a service account's groups are not allowed", Limits{AllowGroups: groups("a")}, target(account), "system:serviceaccounts"},
		{"a service account's groups are allowed", Limits{AllowGroups: groups("system:serviceaccounts*")}, target(account), ""},
		{"a node's group is denied", Limits{DenyGroups: groups("system:nodes")}, target(node), "system:nodes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.limits.CheckTarget(tt.target)
			if (err != nil) != (tt.error != "") || (err != nil && !strings.Contains(err.Error(), tt.error)) {
				t.Errorf("got error %v; want one that mentions %q", err, tt.error)
			}
		})
	}
}

func TestLimits_Validate(t *testing.T) {
	for _, ok := range []Limits{
		{}, {AllowGroups: groups("*", "system:masters", "a b", "{a", "a}b", "}{")}, {DenyTags: groups("tag:ci", "tag:*", "*", "t*", "ta*i")},
		{UserPrefix: "tailnet:", GroupPrefix: "tailnet "}, {UserPrefix: "system"},
		{TaggedUser: "name"}, {TaggedUser: "id", UserPrefix: "tailnet:", DeviceUserPrefix: "device:"}, {DeviceUserPrefix: "system"},
	} {
		if err := ok.Validate(); err != nil {
			t.Errorf("%+v: %v", ok, err)
		}
	}
	for _, tt := range []struct {
		limits Limits
		want   string
	}{
		{Limits{AllowGroups: groups("")}, "allow_groups"},
		{Limits{DenyGroups: groups(" a")}, "deny_groups"},
		{Limits{DenyGroups: groups("a\tb")}, "deny_groups"},
		{Limits{AllowGroups: groups("ä")}, "allow_groups"},
		{Limits{AllowTags: groups("ci")}, "allow_tags"},
		{Limits{AllowTags: groups("tag:")}, "allow_tags"},
		{Limits{DenyTags: groups("tax*")}, "deny_tags"},
		{Limits{DenyTags: groups("Tag:ci")}, "deny_tags"},
		{Limits{OptionalGroups: groups("")}, "optional_groups"},
		{Limits{RecordGroups: groups("")}, "record_groups"},
		{Limits{OptionalGroups: groups("tailnet:a"), GroupPrefix: "tailnet:"}, `optional_groups "tailnet:a": patterns see groups without group_prefix`},
		{Limits{RecordGroups: groups("tailnet:a"), GroupPrefix: "tailnet:"}, `record_groups "tailnet:a": patterns see groups without group_prefix`},
		{Limits{DenyGroups: groups("a", "tailnet:a"), GroupPrefix: "tailnet:"}, `deny_groups "tailnet:a": patterns see groups without group_prefix, so write "a"`},
		{Limits{AllowGroups: groups("tailnet:*"), GroupPrefix: "tailnet:"}, `write "*"`},
		{Limits{DenyGroups: groups("{env.DENIED}")}, "placeholders"},
		{Limits{DenyTags: groups("tag:{env.DENIED}")}, "placeholders"},
		{Limits{GroupPrefix: "{env.PREFIX}"}, "placeholders"},
		{Limits{UserPrefix: "system:"}, "user_prefix"},
		{Limits{GroupPrefix: "system:x"}, "group_prefix"},
		{Limits{GroupPrefix: " x"}, "group_prefix"},
		{Limits{UserPrefix: "x\n"}, "user_prefix"},
		{Limits{DeviceUserPrefix: "system:"}, "device_user_prefix"},
		{Limits{DeviceUserPrefix: " x"}, "device_user_prefix"},
		{Limits{DeviceUserPrefix: "{env.PREFIX}"}, "placeholders"},
		{Limits{UserPrefix: "sys", DeviceUserPrefix: "tem:node:"}, `user_prefix and device_user_prefix together start with "system:node:"`},
		{Limits{TaggedUser: "hostname"}, `tagged_user "hostname": must be name or id`},
	} {
		if err := tt.limits.Validate(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: got error %v; want one that names %s", tt.limits, err, tt.want)
		}
	}
}

func TestLimits_ApplyNamesDevices(t *testing.T) {
	const name = "ci.example.ts.net"
	device := Peer{Node: name, NodeID: "nPKaVnLfBZ11CNTRL", Tags: groups("tag:ci")}
	foreign := device
	foreign.Shared = true
	user := Peer{Node: "laptop.example.ts.net", NodeID: "nQ3sXkDVGX21CNTRL", Login: "alice@example.com"}
	for _, tt := range []struct {
		name   string
		limits Limits
		peer   Peer
		want   string
	}{
		{"by default", Limits{}, device, name},
		{"name", Limits{TaggedUser: TaggedUserName}, device, name},
		{"id", Limits{TaggedUser: TaggedUserID}, device, "nPKaVnLfBZ11CNTRL"},
		{"id, shared in", Limits{TaggedUser: TaggedUserID}, foreign, "nPKaVnLfBZ11CNTRL"},
		{"id, of a user's device", Limits{TaggedUser: TaggedUserID}, user, "alice@example.com"},
		{"prefix", Limits{DeviceUserPrefix: "device:"}, device, "device:" + name},
		{"prefix, shared in", Limits{DeviceUserPrefix: "device:"}, foreign, "device:" + name},
		{"prefix, of a user's device", Limits{DeviceUserPrefix: "device:"}, user, "alice@example.com"},
		{"both prefixes", Limits{UserPrefix: "tailnet:", DeviceUserPrefix: "device:"}, device, "tailnet:device:" + name},
		{"both prefixes, of a user's device", Limits{UserPrefix: "tailnet:", DeviceUserPrefix: "device:"}, user, "tailnet:alice@example.com"},
		{"all options", Limits{UserPrefix: "tailnet:", DeviceUserPrefix: "device:", TaggedUser: TaggedUserID}, device, "tailnet:device:nPKaVnLfBZ11CNTRL"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			id, _, err := tt.peer.Identity(Capabilities)
			if err != nil {
				t.Fatal(err)
			}
			got, _, err := tt.limits.Apply(tt.peer, id)
			if err != nil || got.User != tt.want {
				t.Errorf("got user %q, %v; want %q", got.User, err, tt.want)
			}
		})
	}
}

// A user must not look like a tagged device, and no device like a component of the
// cluster.
func TestLimits_ApplyRejectsNames(t *testing.T) {
	device := func(id string) Peer {
		return Peer{Node: "ci", NodeID: tailcfg.StableNodeID(id), Tags: groups("tag:ci")}
	}
	for _, tt := range []struct {
		name   string
		limits Limits
		peer   Peer
		words  []string
	}{
		{"a login name that starts with the prefix of devices", Limits{DeviceUserPrefix: "device:"}, Peer{Login: "device:ci"}, []string{"device_user_prefix", `"device:ci"`}},
		{"a login name that is the prefix of devices", Limits{UserPrefix: "tailnet:", DeviceUserPrefix: "device:"}, Peer{Login: "device:"}, []string{"device_user_prefix"}},
		{"a device without an ID", Limits{TaggedUser: TaggedUserID}, device(""), []string{"tagged_user is id", "empty"}},
		{"an ID that a header does not carry", Limits{TaggedUser: TaggedUserID}, device("n1\n"), []string{"tagged_user is id", "printable"}},
		{"an ID of the cluster's", Limits{TaggedUser: TaggedUserID}, device("system:admin"), []string{"tagged_user is id", "system:"}},
		{"a prefix that makes an ID one of the cluster's", Limits{TaggedUser: TaggedUserID, DeviceUserPrefix: "sys"}, device("tem:admin"), []string{"device_user_prefix", "system:admin"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			id, _, err := tt.peer.Identity(Capabilities)
			if err != nil {
				t.Fatal(err)
			}
			got, _, err := tt.limits.Apply(tt.peer, id)
			if diff := cmp.Diff(Identity{}, got); diff != "" || err == nil {
				t.Fatalf("got %+v, %v; want an error alone", got, err)
			}
			for _, word := range tt.words {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("got error %q; want it to mention %q", err, word)
				}
			}
		})
	}
}

// FuzzDeviceUser checks that with device_user_prefix, no login name makes the user of a
// tagged device.
func FuzzDeviceUser(f *testing.F) {
	f.Add("device:ci", "ci", "", "device:")
	f.Add("vice:ci", "ci", "de", "vice:")
	f.Add("nPKaVnLfBZ11CNTRL", "nPKaVnLfBZ11CNTRL", "t:", "d")
	f.Fuzz(func(t *testing.T, login, id, userPrefix, devicePrefix string) {
		l := Limits{TaggedUser: TaggedUserID, UserPrefix: userPrefix, DeviceUserPrefix: devicePrefix}
		if devicePrefix == "" || l.Validate() != nil {
			return
		}
		device, _, deviceErr := l.Apply(Peer{NodeID: tailcfg.StableNodeID(id), Tags: groups("tag:ci")}, Identity{User: "ci"})
		user, _, userErr := l.Apply(Peer{Login: login}, Identity{User: login})
		if deviceErr == nil && userErr == nil && device.User == user.User {
			t.Errorf("login name %q is device %q: %q", login, id, user.User)
		}
		if deviceErr == nil && (strings.HasPrefix(device.User, "system:") || !strings.HasPrefix(device.User, userPrefix+devicePrefix)) {
			t.Errorf("device %q is %q", id, device.User)
		}
	})
}

// FuzzLimit checks that for all limits and identities, nobody gets a group that is
// denied or not allowed, or a reserved name by a prefix.
func FuzzLimit(f *testing.F) {
	f.Add("alice@example.com", "system:masters", "system:*", "", "", "")
	f.Add("alice@example.com", "team:a", "*", "team:*", "tailnet:", "tailnet:")
	f.Add("tem:admin", "tem:masters", "", "", "sys", "sys")
	f.Fuzz(func(t *testing.T, user, group, deny, allow, userPrefix, groupPrefix string) {
		r := Limits{UserPrefix: userPrefix, GroupPrefix: groupPrefix}
		if deny != "" {
			r.DenyGroups = groups(deny)
		}
		if allow != "" {
			r.AllowGroups = groups(allow)
		}
		if r.Validate() != nil {
			return
		}
		got, cut, err := r.Apply(Peer{}, Identity{User: user, Groups: groups(group)})
		if err != nil {
			if got.User != "" || len(got.Groups) > 0 {
				t.Errorf("got %+v along with error %v", got, err)
			}
			return
		}
		if got.User != userPrefix+user || (userPrefix != "" && strings.HasPrefix(got.User, "system:")) {
			t.Errorf("got user %q from %q", got.User, user)
		}
		if len(got.Groups)+len(cut) != 1 {
			t.Fatalf("got groups %q, cut %q; want one of them to be %q", got.Groups, cut, group)
		}
		if len(cut) > 0 {
			return
		}
		if got.Groups[0] != groupPrefix+group || (groupPrefix != "" && strings.HasPrefix(got.Groups[0], "system:")) {
			t.Errorf("got group %q from %q", got.Groups[0], group)
		}
		if (deny != "" && (deny == group || deny == "*")) || (allow != "" && allow != group && !strings.Contains(allow, "*")) {
			t.Errorf("group %q passed; denied: %q, allowed: %q", group, deny, allow)
		}
	})
}
