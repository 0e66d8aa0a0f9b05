// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"slices"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"tailscale.com/client/tailscale/apitype"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

// The log has what is odd about a caller's grants once, however often the caller is looked
// up, until it changes.
func TestNotices_LoggedOncePerChange(t *testing.T) {
	const misspelt, twice = `{"impersonate":{"group":["a"]}}`, `{"impersonate":{"groups":["a"],"groups":["b"]}}`
	masters := `{"impersonate":{"groups":["system:masters"]}}`
	other := proxytest.WhoIs(misspelt) // another device at the same address
	other.Node.StableID = "nPHONE"
	core, logs := observer.New(zap.WarnLevel)
	node := proxytest.NewChangingNode()
	a := newServer(t, Options{Limits: impersonate.Limits{DenyGroups: []string{"system:masters"}}}, node.Node)
	a.Logger = zap.New(core)
	for i, step := range []struct {
		who  *apitype.WhoIsResponse
		want []string // the words of the entries
	}{
		{proxytest.WhoIs(proxytest.Readers), nil},
		{proxytest.WhoIs(misspelt), []string{`grant 1: unknown key "impersonate.group"; the nearest known key is "impersonate.groups"`}},
		{proxytest.WhoIs(misspelt), nil},
		{proxytest.WhoIs(twice), []string{`grant 1: key "impersonate.groups" repeats "impersonate.groups"`}},
		{proxytest.WhoIs(twice, masters), []string{"system:masters"}},
		{proxytest.WhoIs(twice, masters), nil},
		{proxytest.WhoIs(proxytest.Readers), nil},
		{proxytest.WhoIs(twice), []string{`grant 1: key "impersonate.groups" repeats "impersonate.groups"`}},
		{proxytest.WhoIs(misspelt), []string{`grant 1: unknown key "impersonate.group"; the nearest known key is "impersonate.groups"`}},
		{other, []string{`grant 1: unknown key "impersonate.group"; the nearest known key is "impersonate.groups"`}},
	} {
		node.Says(step.who, nil)
		for range 3 { // each over a new connection, which looks the caller up
			proxytest.Serve(t, a, proxytest.NewRequest("GET", "https://k8s/api"))
		}
		if _, _, err := a.Explain(proxytest.NewRequest("GET", "https://k8s/whoami")); err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, entry := range logs.TakeAll() {
			fields := entry.ContextMap()
			for _, name := range []string{"problems", "groups"} {
				words, _ := fields[name].([]any)
				for _, word := range words {
					got = append(got, word.(string))
				}
			}
		}
		if !slices.Equal(got, step.want) {
			t.Errorf("step %d: logged %q; want %q", i, got, step.want)
		}
	}
}

func TestNotices_SayThatTagsAreLeftOut(t *testing.T) {
	who := proxytest.WhoIsTagged("ci.example.ts.net.", "tag:ci")
	who.CapMap = proxytest.WhoIs(`{"impersonate":{"group":["a"]}}`).CapMap
	core, logs := observer.New(zap.WarnLevel)
	a := newServer(t, Options{}, proxytest.NewNode(who, nil))
	a.Logger = zap.New(core)
	if _, got := proxytest.Serve(t, a, proxytest.NewRequest("GET", "https://k8s/api")); got == nil || len(got.Header["Impersonate-Group"]) > 0 {
		t.Errorf("got %v; want the request without groups", got)
	}
	entries := logs.FilterMessage("grants have unknown or repeated keys").All()
	if len(entries) != 1 || entries[0].ContextMap()["tags_left_out"] != true || entries[0].ContextMap()["peer"] != "ci.example.ts.net" || entries[0].ContextMap()["capability"] != string(impersonate.Capabilities[0]) {
		t.Errorf("logged %v", logs.All())
	}
}

// A device that is known by its ID keeps its user when it is renamed, and does not take
// over that of a deleted device whose name it takes.
func TestAuthenticate_TaggedUserIsTheDevices(t *testing.T) {
	node := proxytest.NewChangingNode()
	a := newServer(t, Options{Limits: impersonate.Limits{TaggedUser: impersonate.TaggedUserID, DeviceUserPrefix: "device:"}}, node.Node)
	for _, name := range []string{"web.example.ts.net.", "prod-deployer.example.ts.net."} {
		who := proxytest.WhoIsTagged(name, "tag:web")
		who.Node.StableID = "nWEB"
		node.Says(who, nil)
		proxytest.CheckUser(t, a, proxytest.NewRequest("GET", "https://k8s/api"), "device:nWEB")
	}
}
