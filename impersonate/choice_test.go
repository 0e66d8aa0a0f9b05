// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/zap/zapcore"
	"tailscale.com/kube/kubetypes"
	"tailscale.com/tailcfg"
)

func TestApply_HoldsBackOptionalGroups(t *testing.T) {
	l := Limits{OptionalGroups: groups("admins", "sre-*"), DenyGroups: groups("sre-root"), GroupPrefix: "tailnet:"}
	got, cut, err := l.Apply(Peer{}, Identity{User: "alice", Groups: groups("devs", "admins", "sre-db", "sre-root"), HeldBack: groups("ops", "sre-root"), Source: SourceGrants})
	if err != nil {
		t.Fatal(err)
	}
	want := Identity{User: "alice", Groups: groups("tailnet:devs"), HeldBack: groups("tailnet:admins", "tailnet:sre-db", "tailnet:ops"), Source: SourceGrants}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("identity (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(groups("sre-root", "sre-root"), cut); diff != "" {
		t.Errorf("removed (-want +got):\n%s", diff)
	}
}

// A caller whose groups are all optional still has groups to ask for.
func TestApply_RequireGroupsCountsOptionalGroups(t *testing.T) {
	l := Limits{OptionalGroups: groups("*"), RequireGroups: true}
	id, _, err := l.Apply(Peer{}, Identity{User: "alice", Groups: groups("admins")})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.CheckUse(&id); err == nil || !strings.Contains(err.Error(), "kubectl --as=alice --as-group=admins") {
		t.Errorf("got %v; want an error that says what to ask for", err)
	}
	chosen, ok := l.Choose(&id, &Target{User: "alice", Groups: groups("admins")})
	if !ok {
		t.Fatal("alice may not ask for her own group")
	}
	if err := l.CheckUse(chosen); err != nil {
		t.Errorf("with a group: %v", err)
	}
	none, _ := l.Choose(chosen, &Target{User: "alice"})
	if err := l.CheckUse(none); err == nil {
		t.Error("a request without any group is let through")
	}
}

func TestApply_PrefixMakesNoOptionalGroupReserved(t *testing.T) {
	l := Limits{OptionalGroups: groups("*"), GroupPrefix: "system"}
	if got, _, err := l.Apply(Peer{}, Identity{User: "alice", Groups: groups(":masters")}); err == nil {
		t.Errorf("got %+v; want an error", got)
	}
}

func TestChoose(t *testing.T) {
	id := &Identity{User: "alice", Groups: groups("devs", "qa"), HeldBack: groups("admins"), Source: SourceGrants, Node: "laptop"}
	for _, tt := range []struct {
		name           string
		target         Target
		ok             bool
		groups, unused []string
	}{
		{"one of several", Target{User: "alice", Groups: groups("qa")}, true, groups("qa"), groups("devs", "admins")},
		{"an optional group alone", Target{User: "alice", Groups: groups("admins")}, true, groups("admins"), groups("devs", "qa")},
		{"all", Target{User: "alice", Groups: groups("admins", "qa", "devs")}, true, groups("devs", "qa", "admins"), nil},
		{"a group twice", Target{User: "alice", Groups: groups("qa", "qa")}, true, groups("qa"), groups("devs", "admins")},
		{"none", Target{User: "alice"}, true, nil, groups("devs", "qa", "admins")},
		{"a group that was not granted", Target{User: "alice", Groups: groups("qa", "root")}, false, nil, nil},
		{"a group in another case", Target{User: "alice", Groups: groups("QA")}, false, nil, nil},
		{"another user", Target{User: "bob", Groups: groups("qa")}, false, nil, nil},
		{"a UID", Target{User: "alice", UID: "7"}, false, nil, nil},
		{"extra fields", Target{User: "alice", Extra: map[string][]string{"a": {"b"}}}, false, nil, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, ok := new(Limits).Choose(id, &tt.target)
			if ok != tt.ok {
				t.Fatalf("got %t; want %t", ok, tt.ok)
			}
			if !ok {
				return
			}
			want := &Identity{User: "alice", Groups: tt.groups, HeldBack: tt.unused, Chosen: true, Source: SourceGrants, Node: "laptop"}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("identity (-want +got):\n%s", diff)
			}
		})
	}
	if diff := cmp.Diff(groups("devs", "qa"), id.Groups); diff != "" || id.Chosen {
		t.Errorf("the caller's own identity has changed (-want +got):\n%s", diff)
	}
}

// Requests of one caller share the maps of its identity.
func TestChoose_ExtraFieldsSayWhatIsUsed(t *testing.T) {
	id := &Identity{User: "alice", Groups: groups("devs"), HeldBack: groups("admins"), Extra: map[string][]string{ExtraNode: {"laptop"}, ExtraHeldBackGroups: {"admins"}}}
	got, _ := new(Limits).Choose(id, &Target{User: "alice", Groups: groups("admins")})
	want := map[string][]string{ExtraNode: {"laptop"}, ExtraChosenGroups: {"admins"}, ExtraHeldBackGroups: {"devs"}}
	if diff := cmp.Diff(want, got.Extra); diff != "" {
		t.Errorf("extra fields (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string][]string{ExtraNode: {"laptop"}, ExtraHeldBackGroups: {"admins"}}, id.Extra); diff != "" {
		t.Errorf("the extra fields of the caller have changed (-want +got):\n%s", diff)
	}
	if got, _ := new(Limits).Choose(&Identity{User: "alice", Groups: groups("devs")}, &Target{User: "alice"}); got.Extra != nil {
		t.Errorf("without audit, got extra fields %v", got.Extra)
	}
}

func TestRecordGroups_FollowGroupsInUse(t *testing.T) {
	l := Limits{OptionalGroups: groups("admins"), RecordGroups: groups("admins"), GroupPrefix: "tailnet:"}
	id, _, err := l.Apply(Peer{}, Identity{User: "alice", Groups: groups("devs", "admins")})
	if err != nil {
		t.Fatal(err)
	}
	admin, _ := l.Choose(&id, &Target{User: "alice", Groups: groups("tailnet:admins")})
	dev, _ := l.Choose(admin, &Target{User: "alice", Groups: groups("tailnet:devs")})
	for name, tt := range map[string]struct {
		id   *Identity
		want bool
	}{"by default": {&id, false}, "as an admin": {admin, true}, "as a developer again": {dev, false}} {
		if tt.id.Recording.Enforce != tt.want {
			t.Errorf("%s: recording is enforced: %t; want %t", name, tt.id.Recording.Enforce, tt.want)
		}
	}
	// Nobody escapes what a grant says by leaving out a group.
	granted, _, _ := l.Apply(Peer{}, Identity{User: "alice", Groups: groups("devs", "admins"), Recording: Recording{Enforce: true}})
	if none, _ := l.Choose(&granted, &Target{User: "alice"}); !none.Recording.Enforce {
		t.Error("a request without groups is not recorded, although a grant enforces it")
	}
	// Nor by leaving the group that is recorded as well.
	both, _, _ := l.Apply(Peer{}, Identity{User: "alice", HeldBack: groups("admins"), Recording: Recording{Enforce: true}})
	recorded, _ := l.Choose(&both, &Target{User: "alice", Groups: groups("tailnet:admins")})
	if none, _ := l.Choose(recorded, &Target{User: "alice"}); !none.Recording.Enforce {
		t.Error("what a grant enforces ends with the group")
	}
	always := Limits{RecordGroups: groups("dev*")}
	if id, _, _ := always.Apply(Peer{}, Identity{User: "alice", Groups: groups("devs")}); !id.Recording.Enforce {
		t.Error("a group in use by default is not recorded")
	}
}

// FuzzChoose checks that whatever a request asks for, it gets no group that was not
// granted, and no other user.
func FuzzChoose(f *testing.F) {
	f.Add("devs,qa", "admins", "alice", "qa", "", "")
	f.Add("devs", "admins", "alice", "admins,root", "admins", "tailnet:")
	f.Add("", "", "bob", "", "*", "")
	f.Fuzz(func(t *testing.T, granted, heldBack, user, asked, optional, prefix string) {
		split := func(s string) []string {
			return slices.DeleteFunc(strings.Split(s, ","), func(s string) bool { return s == "" })
		}
		l := Limits{GroupPrefix: prefix, OptionalGroups: split(optional), RecordGroups: split(optional)}
		if l.Validate() != nil {
			return
		}
		id, _, err := l.Apply(Peer{}, Identity{User: "alice", Groups: split(granted), HeldBack: split(heldBack)})
		if err != nil {
			return
		}
		h := http.Header{"Impersonate-User": {user}}
		if groups := split(asked); len(groups) > 0 {
			h["Impersonate-Group"] = groups
		}
		target, err := ParseTarget(h)
		if err != nil {
			return
		}
		got, ok := l.Choose(&id, target)
		if !ok {
			return
		}
		if got.User != "alice" || target.User != "alice" {
			t.Errorf("got user %q, asked for %q", got.User, target.User)
		}
		all := slices.Concat(id.Groups, id.HeldBack)
		for _, group := range got.Groups {
			if !slices.Contains(all, group) || !slices.Contains(target.Groups, group) {
				t.Errorf("got group %q; granted are %q, asked for %q", group, all, target.Groups)
			}
		}
		if len(got.Groups)+len(got.HeldBack) != len(all) {
			t.Errorf("got groups %q, held back %q; granted are %q", got.Groups, got.HeldBack, all)
		}
		if l.RecordsAny(got.Groups) != got.Recording.Enforce {
			t.Errorf("recording of groups %q is enforced: %t", got.Groups, got.Recording.Enforce)
		}
	})
}

// Tailscale's own proxy ignores the key.
func TestIdentity_OptionalGrants(t *testing.T) {
	const optional, always = `{"impersonate":{"groups":["admins","ops"],"optional":true}}`, `{"impersonate":{"groups":["ops"],"optional":false}}`
	tagged := Peer{Node: "ci", Tags: []string{"tag:ci"}}
	for _, tt := range []struct {
		name           string
		peer           Peer
		grants         []string
		groups, unused []string
	}{
		{"an optional grant", Peer{Login: "alice"}, []string{optional}, nil, groups("admins", "ops")},
		{"another grant gives one of its groups", Peer{Login: "alice"}, []string{optional, always}, groups("ops"), groups("admins")},
		{"in the other order", Peer{Login: "alice"}, []string{always, optional}, groups("ops"), groups("admins")},
		{"tags make up for nothing", tagged, []string{optional}, nil, groups("admins", "ops")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.peer.Capabilities = tailcfg.PeerCapMap{Capabilities[0]: nil}
			for _, grant := range tt.grants {
				tt.peer.Capabilities[Capabilities[0]] = append(tt.peer.Capabilities[Capabilities[0]], tailcfg.RawMessage(grant))
			}
			got, why, err := tt.peer.Identity(Capabilities)
			if err != nil || len(why.Problems()) > 0 {
				t.Fatalf("got error %v and problems %q", err, why.Problems())
			}
			want := Identity{User: tt.peer.user(), Groups: tt.groups, HeldBack: tt.unused, Source: SourceGrants, Node: tt.peer.Node}
			if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("identity (-want +got):\n%s", diff)
			}
		})
	}
	for _, grant := range []string{optional, always} {
		var theirs kubetypes.KubernetesCapRule
		if err := json.Unmarshal([]byte(grant), &theirs); err != nil || len(theirs.Impersonate.Groups) == 0 {
			t.Errorf("Tailscale's proxy reads %s as %+v, %v", grant, theirs, err)
		}
	}
}

func TestChoose_ExtraFieldsOfAnotherChoiceAreGone(t *testing.T) {
	id := &Identity{User: "alice", Groups: groups("devs"), HeldBack: groups("admins"), Extra: map[string][]string{
		ExtraChosenGroups: {"devs"}, ExtraHeldBackGroups: {"admins"},
	}}
	for _, tt := range []struct {
		asked []string
		want  map[string][]string
	}{
		{nil, map[string][]string{ExtraHeldBackGroups: {"devs", "admins"}}},
		{groups("devs", "admins"), map[string][]string{ExtraChosenGroups: {"devs", "admins"}}},
	} {
		got, _ := new(Limits).Choose(id, &Target{User: "alice", Groups: tt.asked})
		if diff := cmp.Diff(tt.want, got.Extra); diff != "" {
			t.Errorf("asked for %q: extra fields (-want +got):\n%s", tt.asked, diff)
		}
	}
}

func TestMissing_IsTheFirstGroupThatIsNotGranted(t *testing.T) {
	id := &Identity{User: "alice", Groups: groups("devs"), HeldBack: groups("admins")}
	for want, asked := range map[string][]string{"": groups("admins", "devs"), "ops": groups("devs", "admins", "ops", "sre")} {
		if got := id.Missing(&Target{Groups: asked}); got != want {
			t.Errorf("asked for %q: got %q; want %q", asked, got, want)
		}
	}
}

func TestCheckUse_NeedsRequireGroups(t *testing.T) {
	id := &Identity{User: "alice", HeldBack: groups("admins")}
	if err := new(Limits).CheckUse(id); err != nil {
		t.Errorf("without require_groups: %v", err)
	}
	if err := (&Limits{RequireGroups: true}).CheckUse(id); err == nil {
		t.Error("got no error with require_groups")
	}
}

func TestRecordGroups_MatchWithAndWithoutPrefix(t *testing.T) {
	l := &Limits{RecordGroups: groups("*-admins", "ops"), GroupPrefix: "ts-"}
	for group, want := range map[string]bool{"ts-admins": true, "ts-ops": true, "ops": true, "admins": false} {
		if got := l.RecordsAny(groups(group)); got != want {
			t.Errorf("%s: got %t; want %t", group, got, want)
		}
	}
}

func TestFields_NameTheCaller(t *testing.T) {
	encode := func(id *Identity) map[string]any {
		encoder := zapcore.NewMapObjectEncoder()
		for _, field := range id.Fields() {
			field.AddTo(encoder)
		}
		return encoder.Fields
	}
	id := &Identity{Node: "laptop", User: "alice", Groups: groups("devs"), Source: SourceGrants}
	want := map[string]any{"node": "laptop", "user": "alice", "groups": []any{"devs"}, "source": "grants"}
	if diff := cmp.Diff(want, encode(id)); diff != "" {
		t.Errorf("fields (-want +got):\n%s", diff)
	}
	id.HeldBack, want["held_back"] = groups("admins"), []any{"admins"}
	if diff := cmp.Diff(want, encode(id)); diff != "" {
		t.Errorf("with an optional group, fields (-want +got):\n%s", diff)
	}
}
