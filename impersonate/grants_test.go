// SPDX-License-Identifier: Apache-2.0

package impersonate_test

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"tailscale.com/kube/kubetypes"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

// grantsOf returns the identity of a device with tags and these grants, and how it came
// about.
func grantsOf(t *testing.T, grants ...string) (impersonate.Identity, impersonate.Explanation) {
	t.Helper()
	peer, err := impersonate.PeerFrom(aDevice("ci.example.ts.net.", []string{"tag:ci"}, grants...))
	if err != nil {
		t.Fatal(err)
	}
	id, why, err := peer.Identity(impersonate.Capabilities)
	if err != nil {
		t.Fatalf("%q: %v", grants, err)
	}
	return id, why
}

func TestGrant_ProblemsAreNamed(t *testing.T) {
	for _, tt := range []struct {
		grant string
		want  []string
	}{
		// What Tailscale's own proxy understands is no problem.
		{`{}`, nil},
		{`null`, nil},
		{` { "impersonate" : { "groups" : [ "a" ] } } `, nil},
		{`{"impersonate":null,"recorder":null,"recorderAddrs":null}`, nil},
		{`{"impersonate":{"groups":["a","a"]},"recorder":["tag:r"],"recorderAddrs":["100.64.0.9:80"],"enforceRecorder":true,"enableEvents":false}`, nil},
		{`{"IMPERSONATE":{"Groups":["a"]},"enforcerecorder":true}`, nil},
		{`{"impersonate":{"group\u017f":["a"]}}`, nil}, // a long s, which encoding/json folds as well

		{`{"impersonate":{"group":["a"]}}`, []string{`unknown key "impersonate.group"; the nearest known key is "impersonate.groups"`}},
		{`{"Impersonate":{"Group":["a"]}}`, []string{`unknown key "impersonate.Group"; the nearest known key is "impersonate.groups"`}},
		{`{"groups":["a"]}`, []string{`unknown key "groups"; the nearest known key is "impersonate.groups"`}},
		{`{"impersonate":{"groups":["a"]},"enforceRecorders":true}`, []string{`unknown key "enforceRecorders"; the nearest known key is "enforceRecorder"`}},
		{`{"recorders":["tag:r"],"enable_events":true}`, []string{`unknown key "recorders"; the nearest known key is "recorder"`, `unknown key "enable_events"; the nearest known key is "enableEvents"`}},
		{`{"impersonate":{"enforceRecorder":true}}`, []string{`unknown key "impersonate.enforceRecorder"; the nearest known key is "enforceRecorder"`}},
		{`{"x":{"groups":{"groups":1}}}`, []string{`unknown key "x"; the nearest known key is "impersonate.groups"`}},
		{`{"":1}`, []string{`unknown key ""; the nearest known key is "impersonate.groups"`}},
		{`{"\ud800":1}`, []string{"unknown key \"\ufffd\"; the nearest known key is \"impersonate.groups\""}},
		{`{"impersonate":{"groups":["a"],"groups":["b"]}}`, []string{`key "impersonate.groups" repeats "impersonate.groups"`}},
		{`{"impersonate":{"groups":["a"],"Groups":["b"]}}`, []string{`key "impersonate.Groups" repeats "impersonate.groups"`}},
		{`{"impersonate":{"groups":["a"]},"impersonate":{"group":["b"]}}`, []string{`key "impersonate" repeats "impersonate"`, `unknown key "impersonate.group"; the nearest known key is "impersonate.groups"`}},
		{`{"enforceRecorder":true,"enforcerecorder":false}`, []string{`key "enforcerecorder" repeats "enforceRecorder"`}},
	} {
		_, why := grantsOf(t, tt.grant)
		if diff := cmp.Diff(tt.want, why.Grants[0].Problems); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.grant, diff)
		}
	}
	_, why := grantsOf(t, `{}`, `{"x":1}`)
	if got := strings.Join(why.Problems(), ""); !strings.HasPrefix(got, `grant 2: unknown key "x"`) {
		t.Errorf("got problems %q; want them to name grant 2", got)
	}
}

// All fields of the type that the tailnet's grants decode to are known keys.
func TestGrant_KeysOfTailscaleAreKnown(t *testing.T) {
	text, err := json.Marshal(kubetypes.KubernetesCapRule{
		Impersonate:     &kubetypes.ImpersonateRule{Groups: []string{"a"}},
		Recorders:       []string{"tag:r"},
		RecorderAddrs:   []netip.AddrPort{netip.MustParseAddrPort("100.64.0.9:80")},
		EnforceRecorder: true,
		EnableEvents:    true,
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, why := grantsOf(t, string(text)); len(why.Problems()) > 0 {
		t.Errorf("%s: got problems %q", text, why.Problems())
	}
}

// A well-formed grant without groups leaves a tagged device its tags, as in Tailscale's
// own proxy: a grant that only names a recorder is one. A grant that is misspelt may have
// been meant to take them away.
func TestGrant_MisspeltLeavesOutTags(t *testing.T) {
	const recorder = `{"recorder":["tag:r"],"enforceRecorder":true}`
	for _, tt := range []struct {
		grants []string
		groups []string
		source impersonate.Source
		out    bool
	}{
		{[]string{recorder}, []string{"tag:ci"}, impersonate.SourceTags, false},
		{[]string{`{"impersonate":{"groups":[]}}`}, []string{"tag:ci"}, impersonate.SourceTags, false},
		{[]string{`{"enforcerecorder":true}`}, []string{"tag:ci"}, impersonate.SourceTags, false},
		{[]string{`{"impersonate":{"group":["readers"]}}`}, nil, impersonate.SourceNone, true},
		{[]string{`{"impersonates":{"groups":["readers"]}}`}, nil, impersonate.SourceNone, true},
		{[]string{`{"impersonate":{"groups":["readers"],"groups":[]}}`}, nil, impersonate.SourceNone, true},
		{[]string{recorder, `{"recorders":[]}`}, nil, impersonate.SourceNone, true},
		{[]string{`{"recorders":[]}`, recorder}, nil, impersonate.SourceNone, true},
		{[]string{`{"impersonate":{"group":["a"]}}`, `{"impersonate":{"groups":["readers"]}}`}, []string{"readers"}, impersonate.SourceGrants, false},
	} {
		id, why := grantsOf(t, tt.grants...)
		if diff := cmp.Diff(tt.groups, id.Groups); diff != "" || id.Source != tt.source || why.TagsLeftOut != tt.out {
			t.Errorf("%q: source %q, tags left out %t, groups (-want +got):\n%s", tt.grants, id.Source, why.TagsLeftOut, diff)
		}
	}
}

// Of a key that is given twice, encoding/json keeps the last value. That must not undo an
// earlier one that has sessions recorded.
func TestGrant_RepeatedKeyUndoesNoRecording(t *testing.T) {
	addr := netip.MustParseAddrPort("100.64.0.9:80")
	for _, grant := range []string{
		`{"recorderAddrs":["100.64.0.9:80"],"recorderAddrs":[],"enforceRecorder":true,"enforceRecorder":false,"enableEvents":true,"enableEvents":false}`,
		`{"recorderAddrs":[],"recorderAddrs":["100.64.0.9:80"],"enforceRecorder":false,"enforceRecorder":true,"enableEvents":false,"enableEvents":true}`,
		`{"recorderAddrs":["100.64.0.9:80"],"RecorderAddrs":[],"enforceRecorder":true,"enforcerecorder":false,"enableEvents":true,"ENABLEEVENTS":false}`,
		`{"RecorderAddrs":["100.64.0.9:80"],"recorderAddrs":null,"EnforceRecorder":true,"enforceRecorder":null,"enableevents":true,"enableEvents":null}`,
		`{"recorderAddrs":["100.64.0.9:80"],"recorderAddrs":[],"recorderAddrs":[],"enforceRecorder":false,"EnforceRecorder":true,"enforceRecorder":false,"enableEvents":true,"enableEvents":false,"enableEvents":false}`,
	} {
		id, _ := grantsOf(t, grant)
		want := impersonate.Recording{Recorders: []netip.AddrPort{addr}, Enforce: true, Events: true}
		if diff := cmp.Diff(want, id.Recording, equateAddrs); diff != "" {
			t.Errorf("%s (-want +got):\n%s", grant, diff)
		}
	}
	id, _ := grantsOf(t, `{"recorder":["tag:r"],"recorder":[]}`)
	if !id.Recording.Wanted() {
		t.Error("a recorder whose key is repeated is not wanted")
	}
}

func TestGrant_WrongTypesAreExplained(t *testing.T) {
	for grant, want := range map[string]string{
		`{"impersonate":{"groups":"readers"}}`:         `grant 2: "impersonate.groups" has a string where a list belongs`,
		`{"impersonate":{"groups":[1]}}`:               `grant 2: "impersonate.groups" has a number where a string belongs`,
		`{"impersonate":["readers"]}`:                  `grant 2: "impersonate" has a list where an object belongs`,
		`{"enforceRecorder":"true"}`:                   `grant 2: "enforceRecorder" has a string where true or false belongs`,
		`{"recorderAddrs":[true]}`:                     `grant 2: "recorderAddrs" has true or false where a string belongs`,
		`{"impersonate":{"groups":{}}}`:                `grant 2: "impersonate.groups" has an object where a list belongs`,
		`"readers"`:                                    `grant 2: it is a string and not an object`,
		`{"enforceRecorder":1,"enforceRecorder":true}`: `grant 2: "enforceRecorder" has a number where true or false belongs`,
		`{"recorderAddrs":[""],"recorderAddrs":[]}`:    `grant 2: recorderAddrs holds`,
	} {
		id, err := identityOf(aUser("alice@example.com", `{}`, grant))
		refused(t, id, err, "alice@example.com", "tailscale.com/cap/kubernetes cannot be read", want)
	}
}

func TestGrantProblems(t *testing.T) {
	got, err := impersonate.GrantProblems([]byte(`{"impersonate":{"group":[]},"recorder":{"a":1}}`))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{`unknown key "impersonate.group"; the nearest known key is "impersonate.groups"`}, got); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
	for _, cut := range []string{`{]`, `{"impersonate"`, `{"impersonate":`} {
		if got, err := impersonate.GrantProblems([]byte(cut)); err == nil {
			t.Errorf("%s: got problems %q; want an error", cut, got)
		}
	}
}
