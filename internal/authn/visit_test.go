// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"testing"
	"time"

	"tailscale.com/client/tailscale/apitype"
	tskey "tailscale.com/types/key"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// otherAddr is the address of a second node.
const otherAddr = "100.64.0.9"

// onDevice returns what a node says about alice's laptop, which has that key.
func onDevice(key tskey.NodePublic, rules ...string) *apitype.WhoIsResponse {
	who := proxytest.WhoIs(rules...)
	who.Node.Key = key
	return who
}

// otherNode returns a second node, which answers every question with who and err.
func otherNode(who *apitype.WhoIsResponse, err error) *tailnet.Node {
	node := proxytest.NewNode(who, err)
	node.Name = "other"
	node.Addrs = func() (ip4, ip6 netip.Addr) { return netip.MustParseAddr(otherAddr), netip.Addr{} }
	node.DNSName = func(context.Context) (string, error) { return "other.example.ts.net", nil }
	node.Ask = func(context.Context, netip.Addr, netip.Addr) (*apitype.WhoIsResponse, error) { return who, err }
	return node
}

// visitorFrom returns the visitor that a site sees in a request of alice's laptop.
func visitorFrom(t *testing.T, key tskey.NodePublic) Visitor {
	t.Helper()
	_, visitor, err := newServer(t, Options{}, proxytest.NewNode(onDevice(key), nil)).Explain(proxytest.NewRequest("GET", "https://k8s/whoami"))
	if err != nil {
		t.Fatal(err)
	}
	return visitor
}

// hosted is a service of a node.
type hosted struct {
	name  string
	addrs []netip.AddrPort
}

func (h hosted) Service() (string, []netip.AddrPort) { return h.name, h.addrs }

func (h hosted) Had(addr netip.Addr) bool {
	return slices.ContainsFunc(h.addrs, func(a netip.AddrPort) bool { return a.Addr() == addr })
}

func (hosted) Drain(context.Context) error { return nil }

// At a service, a visitor is who the node says that it is there, under the service's name.
func TestVisit_AtService(t *testing.T) {
	const at = "100.100.7.7:8443"
	key := tskey.NewNode().Public()
	api := hosted{name: "k8s-api", addrs: []netip.AddrPort{netip.MustParseAddrPort("[fd7a:115c:a1e0::7]:8443"), netip.MustParseAddrPort(at)}}
	node := func(services ...tailnet.Service) *tailnet.Node {
		node := otherNode(nil, nil)
		node.Services = services
		node.Ask = func(_ context.Context, _, local netip.Addr) (*apitype.WhoIsResponse, error) {
			if local == netip.MustParseAddrPort(at).Addr() {
				return onDevice(key, proxytest.Readers), nil
			}
			return onDevice(key), nil
		}
		return node
	}
	nameless := node(api)
	nameless.DNSName = func(context.Context) (string, error) { return "", errors.New("gone") }
	for _, tt := range []struct {
		name    string
		nodes   tailnet.Nodes
		door    Door
		want    string // the host
		unknown bool
	}{
		{name: "named after the service", nodes: tailnet.Nodes{node(api)}, want: "k8s-api.example.ts.net"},
		{name: "the service's name", nodes: tailnet.Nodes{node(api)}, door: Door{Host: "k8s-api.example.ts.net"}, want: "k8s-api.example.ts.net"},
		{name: "a name of another DNS", nodes: tailnet.Nodes{node(api)}, door: Door{Host: "k8s.example.com", TLS: true}, want: "k8s.example.com"},
		{name: "the node's name", nodes: tailnet.Nodes{node(api)}, door: Door{Host: "other.example.ts.net", TLS: true}},
		{name: "another service's name", nodes: tailnet.Nodes{node(api, hosted{name: "web"})}, door: Door{Host: "web.example.ts.net", TLS: true}},
		{name: "another node's service", nodes: tailnet.Nodes{node(hosted{name: "web"})}},
		{name: "one of two nodes", nodes: tailnet.Nodes{proxytest.NewNode(nil, nil), node(api)}, want: "k8s-api.example.ts.net"},
		{name: "two hosts", nodes: tailnet.Nodes{node(api), node(api)}},
		{name: "not hosted", nodes: tailnet.Nodes{node(hosted{name: "k8s-api"})}, unknown: true},
		{name: "hosted on another port", nodes: tailnet.Nodes{node(hosted{name: "k8s-api", addrs: []netip.AddrPort{netip.MustParseAddrPort("100.100.7.7:443")}})}, unknown: true},
		{name: "hosted on IPv6 only", nodes: tailnet.Nodes{node(hosted{name: "k8s-api", addrs: api.addrs[:1]})}, unknown: true},
		{name: "a node without a name", nodes: tailnet.Nodes{nameless}, unknown: true},
		{name: "a node without a name, and a site with one", nodes: tailnet.Nodes{nameless}, door: Door{Host: "k8s.example.com", TLS: true}, unknown: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.door.Port, tt.door.Service = 8443, "k8s-api"
			// Only the service has grants.
			welcome, err := newServer(t, Options{Limits: impersonate.Limits{RequireGroups: true}}, tt.nodes...).Visit(t.Context(), visitorFrom(t, key), tt.door)
			got := ""
			if welcome != nil {
				got = welcome.Host
				if welcome.Facts.Service != "k8s-api" || welcome.Local.String() != at {
					t.Errorf("got %+v", welcome)
				}
			}
			if got != tt.want || (err != nil) != tt.unknown {
				t.Errorf("got host %q and error %v; want %q, and an error: %t", got, err, tt.want, tt.unknown)
			}
		})
	}
	// The node's own address is another door, to which the service's name does not lead.
	for host, want := range map[string]bool{"": true, "other.example.ts.net": true, "k8s-api.example.ts.net": false} {
		welcome, err := newServer(t, Options{}, node(api)).Visit(t.Context(), visitorFrom(t, key), Door{Host: host, Port: 8443, TLS: true})
		if err != nil || (welcome != nil) != want || welcome != nil && welcome.Facts.Service != "" {
			t.Errorf("at the node, as %q: got %+v, %v; want the visitor to be known: %t", host, welcome, err, want)
		}
	}
}

func TestVisit_OnlyWhoHasAnIdentityThere(t *testing.T) {
	key, another := tskey.NewNode().Public(), tskey.NewNode().Public()
	alice := onDevice(key, proxytest.Readers)
	notAdmitted := otherNode(alice, nil)
	var asked netip.AddrPort
	notAdmitted.Admits = func(_ netip.Addr, dialled netip.AddrPort) (bool, error) { asked = dialled; return false, nil }
	disconnected := otherNode(alice, nil)
	disconnected.Addrs = func() (ip4, ip6 netip.Addr) { return }
	itself := otherNode(alice, nil)
	itself.Addrs = func() (ip4, ip6 netip.Addr) { return netip.MustParseAddr(proxytest.AliceAddr), netip.Addr{} }
	groups := impersonate.Limits{RequireGroups: true}
	for _, tt := range []struct {
		name    string
		options Options
		nodes   tailnet.Nodes
		door    Door
		key     tskey.NodePublic
		want    string // the host
		unknown bool
	}{
		{name: "known", nodes: tailnet.Nodes{otherNode(alice, nil)}, want: "other.example.ts.net"},
		{name: "known, under the site's own name", nodes: tailnet.Nodes{otherNode(alice, nil)}, door: Door{Host: "k8s.example.com", TLS: true}, want: "k8s.example.com"},
		{name: "another name over plain HTTP", nodes: tailnet.Nodes{otherNode(alice, nil)}, door: Door{Host: "k8s.example.com"}},
		{name: "one of allow_hosts", options: Options{AllowHosts: []string{"k8s.example.com"}}, nodes: tailnet.Nodes{otherNode(alice, nil)}, door: Door{Host: "k8s.example.com"}, want: "k8s.example.com"},
		{name: "no group where one is required", options: Options{Limits: groups}, nodes: tailnet.Nodes{otherNode(onDevice(key), nil)}},
		{name: "a group where one is required", options: Options{Limits: groups}, nodes: tailnet.Nodes{otherNode(alice, nil)}, want: "other.example.ts.net"},
		{name: "denied", options: Options{Limits: impersonate.Limits{RequireGroups: true, DenyGroups: []string{"tailnet-*"}}}, nodes: tailnet.Nodes{otherNode(alice, nil)}},
		{name: "unknown to the node", nodes: tailnet.Nodes{otherNode(nil, tailnet.ErrPeerNotFound)}},
		{name: "another device with the address", nodes: tailnet.Nodes{otherNode(onDevice(another, proxytest.Readers), nil)}},
		{name: "a node that tells no key", nodes: tailnet.Nodes{otherNode(onDevice(tskey.NodePublic{}, proxytest.Readers), nil)}},
		{name: "the node itself", nodes: tailnet.Nodes{itself}},
		{name: "not let in", nodes: tailnet.Nodes{notAdmitted}},
		{name: "no answer", nodes: tailnet.Nodes{otherNode(nil, errors.New("gone"))}, unknown: true},
		{name: "not connected", nodes: tailnet.Nodes{disconnected}, unknown: true},
		{name: "no answer of one of two nodes", nodes: tailnet.Nodes{disconnected, otherNode(alice, nil)}, want: "other.example.ts.net"},
		{name: "two nodes with the address", nodes: tailnet.Nodes{otherNode(alice, nil), otherNode(alice, nil)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.door.Port == 0 {
				tt.door.Port = 8443
			}
			welcome, err := newServer(t, tt.options, tt.nodes...).Visit(t.Context(), visitorFrom(t, key), tt.door)
			got := ""
			if welcome != nil {
				got = welcome.Host
				if welcome.Facts.User != "alice@example.com" || welcome.Local.String() != otherAddr+":8443" {
					t.Errorf("got %+v", welcome)
				}
			}
			if got != tt.want || (err != nil) != tt.unknown {
				t.Errorf("got host %q and error %v; want %q, and an error: %t", got, err, tt.want, tt.unknown)
			}
		})
	}
	if want := netip.MustParseAddrPort(otherAddr + ":8443"); asked != want {
		t.Errorf("the node was asked whether it lets the visitor in to %v; want %v", asked, want)
	}
	if welcome, err := newServer(t, Options{}, otherNode(onDevice(tskey.NodePublic{}, proxytest.Readers), nil)).Visit(t.Context(), Visitor{Address: netip.MustParseAddr(proxytest.AliceAddr)}, Door{Port: 80}); welcome != nil || err != nil {
		t.Errorf("without keys: got %v, %v; want nothing, as devices cannot be told apart", welcome, err)
	}
}

// A site with several nodes is asked at the one that the name leads to.
func TestVisit_AsksTheNodeOfTheName(t *testing.T) {
	key := tskey.NewNode().Public()
	nodes := tailnet.Nodes{proxytest.NewNode(onDevice(key, proxytest.Readers), nil), otherNode(nil, tailnet.ErrPeerNotFound)}
	for host, want := range map[string]bool{"k8s.example.ts.net": true, "other.example.ts.net": false, "k8s.example.com": true} {
		welcome, err := newServer(t, Options{}, nodes...).Visit(t.Context(), visitorFrom(t, key), Door{Host: host, Port: 443, TLS: true})
		if err != nil || (welcome != nil) != want {
			t.Errorf("%s: got %v, %v; want the visitor to be known: %t", host, welcome, err, want)
		}
	}
}

// A site does not listen on the own addresses of a node that it has for a service alone.
func TestVisit_NotAtNodeOfServices(t *testing.T) {
	key := tskey.NewNode().Public()
	node := otherNode(onDevice(key, proxytest.Readers), nil)
	visit := func() *Welcome {
		welcome, err := newServer(t, Options{}, node).Visit(t.Context(), visitorFrom(t, key), Door{Port: 443, TLS: true})
		if err != nil {
			t.Fatal(err)
		}
		return welcome
	}
	if visit() == nil {
		t.Error("a site on the node's own addresses is not found")
	}
	node.ServicesOnly = true
	if welcome := visit(); welcome != nil {
		t.Errorf("got %+v; want no site", welcome)
	}
}

// A visitor costs other sites no more than its own requests would.
func TestVisit_IsCached(t *testing.T) {
	key := tskey.NewNode().Public()
	node := proxytest.NewChangingNode()
	node.Says(onDevice(key, proxytest.Readers), nil)
	a := newServer(t, Options{CacheTTL: time.Hour}, node.Node)
	visitor := visitorFrom(t, key)
	for range 10 {
		if welcome, err := a.Visit(t.Context(), visitor, Door{Port: 443, TLS: true}); welcome == nil || err != nil {
			t.Fatalf("got %v, %v", welcome, err)
		}
	}
	if got := node.Asked(); got != 1 {
		t.Errorf("the node was asked %d times; want once", got)
	}
	// The address may be another device's since.
	later := visitorFrom(t, key)
	if welcome, err := a.Visit(t.Context(), later, Door{Port: 443, TLS: true}); welcome == nil || err != nil || node.Asked() != 2 {
		t.Errorf("a later connection: got %v, %v, after %d questions; want a second question", welcome, err, node.Asked())
	}
}

// A site that does not start holds up no other for ever.
func TestVisit_EndsWithContext(t *testing.T) {
	a, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := a.Visit(ctx, visitorFrom(t, tskey.NewNode().Public()), Door{Port: 443}); !errors.Is(err, context.Canceled) {
		t.Errorf("got error %v; want the context's", err)
	}
}

// A refused caller is a visitor as well: other sites may know it.
func TestExplain_RefusedCallerIsVisitor(t *testing.T) {
	key := tskey.NewNode().Public()
	r := proxytest.NewRequest(http.MethodGet, "https://k8s/whoami")
	facts, visitor, err := newServer(t, Options{Limits: impersonate.Limits{RequireGroups: true}}, proxytest.NewNode(onDevice(key), nil)).Explain(r)
	if err != nil || facts.Refused == "" {
		t.Fatalf("got %+v, %v; want a refusal", facts, err)
	}
	if welcome, err := newServer(t, Options{}, otherNode(onDevice(key), nil)).Visit(t.Context(), visitor, Door{Port: 443, TLS: true}); welcome == nil || err != nil {
		t.Errorf("got %v, %v; want it known on the other site", welcome, err)
	}
}
