// SPDX-License-Identifier: Apache-2.0

package impersonate_test

import (
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"tailscale.com/client/tailscale/apitype"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

var remote = netip.MustParseAddr("100.64.0.2")

// audited returns the identity of the peer that who describes, with the fields of audit.
func audited(who *apitype.WhoIsResponse) (impersonate.Identity, error) {
	peer, err := impersonate.PeerFrom(who)
	if err != nil {
		return impersonate.Identity{}, err
	}
	id, _, err := peer.Identity(impersonate.Capabilities)
	if err != nil {
		return impersonate.Identity{}, err
	}
	return peer.Audited(id, remote)
}

// withIDs sets the IDs of the device and the user in who.
func withIDs(who *apitype.WhoIsResponse) *apitype.WhoIsResponse {
	who.Node.StableID = "nDEVICE"
	if who.UserProfile != nil {
		who.UserProfile.ID = 42
	}
	return who
}

func TestAudited_DescribesTheDevice(t *testing.T) {
	const readers = `{"impersonate":{"groups":["tailnet-readers"]}}`
	extra := func(node, source string, tags ...string) map[string][]string {
		e := map[string][]string{
			impersonate.ExtraNode: {node}, impersonate.ExtraNodeID: {"nDEVICE"}, impersonate.ExtraAddress: {"100.64.0.2"}, impersonate.ExtraGroupsSource: {source},
		}
		if len(tags) > 0 {
			e[impersonate.ExtraTags] = tags
		}
		return e
	}
	withoutUserID := withIDs(aUser("alice@example.com"))
	withoutUserID.UserProfile.ID = 0
	for _, tt := range []struct {
		name  string
		who   *apitype.WhoIsResponse
		uid   string
		extra map[string][]string
	}{
		{"a user's device has the user's ID", withIDs(aUser("alice@example.com", readers)), "42", extra("laptop.example.ts.net", "grants")},
		{"a tagged device has its own ID", withIDs(aDevice("ci.example.ts.net.", []string{"tag:ci", "tag:b"})), "nDEVICE", extra("ci.example.ts.net", "tags", "tag:ci", "tag:b")},
		{"a tagged device with a grant keeps its tags", withIDs(aDevice("ci.example.ts.net.", []string{"tag:ci"}, readers)), "nDEVICE", extra("ci.example.ts.net", "grants", "tag:ci")},
		{"tags of another tailnet do not count", withIDs(sharedIn(aDevice("ci.example.ts.net.", []string{"tag:admin"}))), "nDEVICE", extra("ci.example.ts.net", "none")},
		{"a user without an ID has the device's", withoutUserID, "nDEVICE", extra("laptop.example.ts.net", "none")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			plain, err := identityOf(tt.who)
			if err != nil {
				t.Fatal(err)
			}
			got, err := audited(tt.who)
			if err != nil {
				t.Fatal(err)
			}
			want := plain
			want.UID, want.Extra = tt.uid, tt.extra
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("identity (-want +got):\n%s", diff)
			}
		})
	}
}

func TestAudited_RejectsMissingOrUnprintableValues(t *testing.T) {
	for name, change := range map[string]struct {
		who   *apitype.WhoIsResponse
		words []string
	}{
		"no ID":                   {aUser("alice@example.com"), []string{"no ID"}},
		"no name":                 {withIDs(&apitype.WhoIsResponse{Node: aUser("a").Node, UserProfile: aUser("alice@example.com").UserProfile}), []string{"node"}},
		"an unprintable name":     {withIDs(aUser("alice@example.com")), []string{"node", "printable"}},
		"an unprintable ID":       {withIDs(aUser("alice@example.com")), []string{"node-id", "printable"}},
		"a tag beside the groups": {withIDs(aDevice("ci.example.ts.net.", []string{"tag:\n"}, `{"impersonate":{"groups":["a"]}}`)), []string{"tags", "printable"}},
	} {
		t.Run(name, func(t *testing.T) {
			switch name {
			case "no ID":
				change.who.Node.StableID = ""
			case "no name":
				change.who.Node.Name = ""
			case "an unprintable name":
				change.who.Node.Name = "läptop."
			case "an unprintable ID":
				change.who.Node.StableID = "a\nb"
			}
			id, err := audited(change.who)
			refused(t, id, err, append(change.words, "audit")...)
			if strings.Contains(err.Error(), "github.io") {
				t.Errorf("got error %q; want it without the domain of the key", err)
			}
		})
	}
}

// Constrained impersonation accepts only these keys, and the API server converts all
// keys to lower case.
func TestExtraKeys_ValidForTheAPIServer(t *testing.T) {
	for _, key := range slices.Concat(impersonate.AuditExtras, impersonate.OriginalExtras) {
		if err := validation.IsDomainPrefixedPath(field.NewPath("key"), key).ToAggregate(); err != nil {
			t.Errorf("key %s: %v", key, err)
		}
		if key != strings.ToLower(key) {
			t.Errorf("key %s is not in lower case", key)
		}
	}
}

// decodeExtra returns the key for the name of a header as the API server does: it
// converts the name to lower case and then decodes it.
func decodeExtra(t *testing.T, name string) string {
	t.Helper()
	encoded, ok := strings.CutPrefix(name, "Impersonate-Extra-")
	if !ok {
		t.Fatalf("header %s is not an extra field", name)
	}
	key, err := url.PathUnescape(strings.ToLower(encoded))
	if err != nil {
		t.Fatalf("header %s: %v", name, err)
	}
	return key
}

func TestSetHeaders_ExtraDecodesAsTheAPIServerDoes(t *testing.T) {
	id := impersonate.Identity{User: "alice@example.com", UID: "42", Extra: map[string][]string{}, RequestID: "f00"}
	for _, key := range append([]string{"scopes", "Scopes", "example.com/a_b", "a%2fb", "ä b:c"}, impersonate.AuditExtras[:5]...) {
		id.Extra[key] = []string{"1", "2"}
	}
	h := http.Header{"Accept": {"*/*"}}
	id.SetHeaders(h)
	got := make(map[string][]string)
	for name, values := range h {
		if name != http.CanonicalHeaderKey(name) {
			t.Errorf("header %s is not canonical", name)
		}
		if strings.HasPrefix(name, "Impersonate-Extra-") {
			got[decodeExtra(t, name)] = values
		}
	}
	want := map[string][]string{impersonate.ExtraRequestID: {"f00"}}
	for key, values := range id.Extra {
		want[key] = values
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("extra fields (-want +got):\n%s", diff)
	}
	for name, want := range map[string]string{"Impersonate-Uid": "42", "Audit-Id": "f00"} {
		if got := h.Get(name); got != want {
			t.Errorf("got %s %q; want %q", name, got, want)
		}
	}
	h[http.CanonicalHeaderKey("Impersonate-Extra-Scopes")][0] = "changed"
	if id.Extra["scopes"][0] != "1" {
		t.Error("the headers share the identity's values")
	}
	id.RemoveHeaders(h)
	if diff := cmp.Diff(http.Header{"Accept": {"*/*"}}, h); diff != "" {
		t.Errorf("headers left (-want +got):\n%s", diff)
	}
}

func TestSetHeaders_NoExtraWithoutAudit(t *testing.T) {
	id, err := identityOf(withIDs(aUser("alice@example.com")))
	if err != nil {
		t.Fatal(err)
	}
	h := make(http.Header)
	id.SetHeaders(h)
	if diff := cmp.Diff(http.Header{"Impersonate-User": {"alice@example.com"}}, h); diff != "" {
		t.Errorf("headers (-want +got):\n%s", diff)
	}
}

func TestExtraKeys_AreThoseThatAreSet(t *testing.T) {
	peer := impersonate.Peer{Node: "ci", NodeID: "n1", Tags: []string{"tag:ci"}}
	id, err := peer.Audited(impersonate.Identity{User: "ci", Groups: []string{"a"}, HeldBack: []string{"b"}, Chosen: true, Source: impersonate.SourceGrants, RequestID: "r"}, remote)
	if err != nil {
		t.Fatal(err)
	}
	audit := maps.Clone(id.Extra)
	audit[impersonate.ExtraRequestID] = []string{id.RequestID} // which SetHeaders adds
	if diff := cmp.Diff(slices.Sorted(maps.Keys(audit)), slices.Sorted(slices.Values(impersonate.AuditExtras))); diff != "" {
		t.Errorf("AuditExtras (-set +listed):\n%s", diff)
	}
	as := (&impersonate.Identity{User: "alice", Groups: []string{"a"}, UID: "1", Node: "laptop"}).As(&impersonate.Target{User: "bob"}, nil)
	if diff := cmp.Diff(slices.Sorted(maps.Keys(as.Extra)), slices.Sorted(slices.Values(impersonate.OriginalExtras))); diff != "" {
		t.Errorf("OriginalExtras (-set +listed):\n%s", diff)
	}
}

func TestSetHeaders_ExtraIsEncodedOnlyWhereNeeded(t *testing.T) {
	h := make(http.Header)
	(&impersonate.Identity{User: "alice", Extra: map[string][]string{"a-z.09/AZ{:_é": {"x"}}}).SetHeaders(h)
	delete(h, "Impersonate-User")
	if diff := cmp.Diff(http.Header{"Impersonate-Extra-A-Z.09%2f%41%5a%7b%3a%5f%c3%a9": {"x"}}, h); diff != "" {
		t.Errorf("headers (-want +got):\n%s", diff)
	}
}
