// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

// A known peer that is refused is told why, and which groups the limits removed.
func TestExplain_RefusedPeer(t *testing.T) {
	a := newServer(t, Options{Limits: impersonate.Limits{RequireGroups: true, DenyGroups: []string{"tailnet-*"}}}, proxytest.AliceNode())
	facts, _, err := a.Explain(proxytest.NewRequest("GET", "https://k8s/whoami"))
	if err != nil {
		t.Fatal(err)
	}
	if facts.User != "" || len(facts.Groups) > 0 || facts.Login != "alice@example.com" || facts.Reason != "guard" || facts.Refused == "" {
		t.Errorf("got %+v; want alice's login, a reason and no identity", facts)
	}
	if diff := cmp.Diff([]whoami.Cut{{Name: "tailnet-readers", Option: "deny_groups", Grants: []int{1}}}, facts.Cut); diff != "" {
		t.Errorf("removed groups (-want +got):\n%s", diff)
	}
}

// A grant that looks right and is not is explained, and so is that the tags are no groups
// because of it.
func TestExplain_ProblemsOfGrants(t *testing.T) {
	const misspelt = `{"impersonate":{"group":["tailnet-readers"]}}`
	const problem = `unknown key "impersonate.group"; the nearest known key is "impersonate.groups"`
	who := proxytest.WhoIsTagged("ci.example.ts.net.", "tag:ci")
	who.CapMap = proxytest.WhoIs(proxytest.Readers, misspelt).CapMap
	who.CapMap[impersonate.Capabilities[0]][0] = `{}`
	node := proxytest.NewNode(who, nil)
	facts, _, err := newServer(t, Options{}, node).Explain(proxytest.NewRequest("GET", "https://k8s/whoami"))
	if err != nil {
		t.Fatal(err)
	}
	want := []whoami.Grant{{Value: []byte(`{}`)}, {Value: []byte(misspelt), Problems: []string{problem}}}
	if diff := cmp.Diff(want, facts.Grants); diff != "" || !facts.TagsLeftOut || len(facts.Groups) > 0 || facts.Source != "none" {
		t.Errorf("got %+v; want no groups and the problem (-want +got):\n%s", facts, diff)
	}
	// A caller that needs a group reads the problem in the refusal.
	facts, _, err = newServer(t, Options{Limits: impersonate.Limits{RequireGroups: true}}, node).Explain(proxytest.NewRequest("GET", "https://k8s/whoami"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(facts.Refused, `under "tailscale.com/cap/kubernetes"; grant 2: `+problem) {
		t.Errorf("got refusal %q; want it to end with the problem", facts.Refused)
	}
}

// A request is explained only to a peer that the node knows.
func TestExplain_UnknownPeerIsAnError(t *testing.T) {
	for _, tt := range []struct {
		node  *tailnet.Node
		final bool
	}{
		{proxytest.NewNode(nil, tailnet.ErrPeerNotFound), true},
		{proxytest.NewNode(nil, errors.New("no LocalAPI")), false},
	} {
		facts, _, err := newServer(t, Options{}, tt.node).Explain(proxytest.NewRequest("GET", "https://k8s/whoami"))
		if facts != nil || err == nil || apierrors.IsForbidden(err) != tt.final {
			t.Errorf("got %+v and error %v; want an error, forbidden: %v", facts, err, tt.final)
		}
	}
}

// Each node is asked, and a node that cannot look up the peer does not hide the answers
// of others.
func TestExplainPeer_AsksEachNode(t *testing.T) {
	named := func(name string, lookup func(context.Context, string) ([]netip.Addr, error)) *tailnet.Node {
		n := proxytest.AliceNode()
		n.Name, n.Lookup = name, lookup
		return n
	}
	a := newServer(t, Options{Listen: []string{":80"}},
		named("broken", func(context.Context, string) ([]netip.Addr, error) { return nil, errors.New("no LocalAPI") }),
		named("other", func(context.Context, string) ([]netip.Addr, error) { return nil, nil }),
		named("k8s", func(context.Context, string) ([]netip.Addr, error) { return []netip.Addr{aliceAddr}, nil }),
	)
	facts, err := a.ExplainPeer(t.Context(), "laptop")
	if len(facts) != 1 || facts[0].Proxy != "k8s" || facts[0].User != "alice@example.com" || !cmp.Equal(facts[0].Listen, []string{":80"}) {
		t.Errorf("got %+v; want the answer of the node k8s", facts)
	}
	if err == nil || !strings.Contains(err.Error(), `"broken"`) || strings.Contains(err.Error(), `"other"`) {
		t.Errorf("got error %v; want that of the node broken only", err)
	}
}
