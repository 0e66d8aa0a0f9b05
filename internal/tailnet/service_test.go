// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/tsnet"
)

var (
	service4 = netip.MustParseAddr("100.100.7.7")
	service6 = netip.MustParseAddr("fd7a:115c:a1e0::7")
)

// hosted is a service on addrs.
type hosted struct {
	name    string
	addrs   []netip.Addr
	lost    []netip.Addr
	drained *[]string
	err     error
}

func (s *hosted) Service() (name string, addrs []netip.AddrPort) {
	for _, addr := range s.addrs {
		addrs = append(addrs, netip.AddrPortFrom(addr, 443))
	}
	return s.name, addrs
}

func (s *hosted) Had(addr netip.Addr) bool {
	return slices.Contains(s.addrs, addr) || slices.Contains(s.lost, addr)
}

func (s *hosted) Drain(context.Context) error {
	*s.drained = append(*s.drained, s.name)
	return s.err
}

// hosting returns a node that hosts services.
func hosting(name string, ip4 netip.Addr, services ...Service) *Node {
	n := owning(name, ip4, netip.Addr{})
	n.Services = services
	n.DNSName = func(context.Context) (string, error) { return name + ".example.ts.net", nil }
	return n
}

// A service's address is that of the node that hosts it, as long as it does.
func TestAccepting_Services(t *testing.T) {
	api := &hosted{name: "k8s-api", addrs: []netip.Addr{service4, service6}}
	one, two := hosting("one", node4, api), owning("two", peer4, netip.Addr{})
	nodes := Nodes{two, one}
	for _, addr := range []netip.Addr{node4, service4, service6} {
		if got, err := nodes.Accepting(addr); got != one {
			t.Errorf("%v is an address of node %v (%v); want one", addr, got, err)
		}
		if !nodes.Own(addr) {
			t.Errorf("the nodes do not own %v", addr)
		}
	}
	if got := nodes.ServiceAddrs(); len(got) != 2 || got[0] != netip.AddrPortFrom(service4, 443) {
		t.Errorf("got addresses of services %v", got)
	}

	// Two replicas on one server, or a node of another tailnet with that very address.
	for name, twin := range map[string]*Node{
		"another host": hosting("twin", peer4, &hosted{name: "k8s-api", addrs: []netip.Addr{service4}}),
		"another node": owning("twin", service4, netip.Addr{}),
		// A request that it accepted may still be unread.
		"a node that was a host": hosting("twin", peer4, &hosted{name: "k8s-api", lost: []netip.Addr{service4}}),
	} {
		if got, err := (Nodes{one, twin}).Accepting(service4); err == nil {
			t.Errorf("%s: node %q is picked", name, got.Name)
		}
	}

	// The control server takes the right to host it away.
	api.addrs, api.lost = nil, api.addrs
	if got, err := nodes.Accepting(service4); err == nil {
		t.Errorf("an address that the service had is one of node %q", got.Name)
	}
	if (&Node{Addrs: one.Addrs, Services: []Service{&hosted{addrs: []netip.Addr{{}}}}}).Is(netip.Addr{}) {
		t.Error("no address is the node's")
	}
}

// A node is no caller at its services either, and does not dial them.
func TestWhoIs_ServiceIsSelf(t *testing.T) {
	n := hosting("one", node4, &hosted{name: "k8s-api", addrs: []netip.Addr{service4}})
	n.Ask = func(context.Context, netip.Addr, netip.Addr) (*apitype.WhoIsResponse, error) {
		t.Error("the node is asked")
		return new(apitype.WhoIsResponse), nil
	}
	for _, pair := range [][2]netip.Addr{{node4, service4}, {service4, node4}, {service4, service4}} {
		if _, err := n.WhoIs(t.Context(), pair[0], pair[1]); !errors.Is(err, ErrSelf) {
			t.Errorf("from %v to %v: got error %v; want %v", pair[0], pair[1], err, ErrSelf)
		}
	}
	if _, err := n.Dial(t.Context(), "tcp", service4.String()+":443"); !errors.Is(err, ErrSelf) {
		t.Errorf("the node dials its own service (%v)", err)
	}
}

func TestOwns_Services(t *testing.T) {
	n := hosting("k8s", node4, &hosted{name: "k8s-api", addrs: []netip.Addr{service4}})
	for host, want := range map[string]bool{
		"k8s": true, "k8s.example.ts.net": true, "100.64.0.1": true,
		"k8s-api": true, "k8s-api:80": true, "K8S-API.example.ts.net": true, "k8s-api.example.ts.net.:80": true, "100.100.7.7": true, "100.100.7.7:80": true,
		"": false, ".": false, "k8s-api.other.ts.net": false, "k8s-api.k8s.example.ts.net": false, "web": false, "web.example.ts.net": false, "100.100.7.8": false,
	} {
		if got, err := n.Owns(t.Context(), host); got != want || err != nil {
			t.Errorf("%q is the node's: got %v (%v); want %v", host, got, err, want)
		}
	}
	n.lastName.Store(nil)
	n.DNSName = func(context.Context) (string, error) { return "", nil }
	if got, _ := n.Owns(t.Context(), "k8s-api"); got {
		t.Error("a node without a name has services with names")
	}
}

func TestHosts_ServiceOnPort(t *testing.T) {
	n := hosting("k8s", node4, &hosted{name: "web", addrs: []netip.Addr{peer4}}, &hosted{name: "k8s-api", addrs: []netip.Addr{service4, service6}}, &hosted{name: "lost", lost: []netip.Addr{service4}})
	for _, tt := range []struct {
		service string
		port    uint16
		want    []netip.Addr
		ok      bool
	}{
		{"k8s-api", 443, []netip.Addr{service4, service6}, true},
		{"k8s-api", 80, nil, true}, // another listener may be for that
		{"lost", 443, nil, true},
		{"other", 443, nil, false},
		{"", 443, nil, false},
	} {
		if got, ok := n.Hosts(tt.service, tt.port); !slices.Equal(got, tt.want) || ok != tt.ok {
			t.Errorf("%q, port %d: got %v, %t; want %v, %t", tt.service, tt.port, got, ok, tt.want, tt.ok)
		}
	}
}

// A name of the tailnet leads to what has it, and any other may lead to either.
func TestLeadsTo_ServiceOrNode(t *testing.T) {
	n := hosting("k8s", node4, &hosted{name: "web", addrs: []netip.Addr{peer4}}, &hosted{name: "k8s-api", addrs: []netip.Addr{service4}})
	for host, want := range map[string]string{ // to where
		"k8s": "node", "k8s.example.ts.net": "node", "100.64.0.1": "node",
		"k8s-api": "k8s-api", "K8S-API.example.ts.net": "k8s-api", "100.100.7.7": "k8s-api",
		"web.example.ts.net": "web",
		"k8s.example.com":    "node k8s-api web", "k8s-api.other.ts.net": "node k8s-api web",
	} {
		for service, to := range map[string]string{"": "node", "k8s-api": "k8s-api", "web": "web"} {
			if got, err := n.LeadsTo(t.Context(), host, service); got != strings.Contains(want, to) || err != nil {
				t.Errorf("%s leads to %s: got %t (%v); want %t", host, to, got, err, !got)
			}
		}
	}
	n.lastName.Store(nil)
	n.DNSName = func(context.Context) (string, error) { return "", errors.New("gone") }
	if _, err := n.LeadsTo(t.Context(), "k8s", ""); err == nil {
		t.Error("no error from a node that does not know its name")
	}
	// A node without services need not be asked.
	n.Services = nil
	if got, err := n.LeadsTo(t.Context(), "web", ""); !got || err != nil {
		t.Errorf("without services, a name leads to the node: got %t (%v)", got, err)
	}
	if got, err := n.LeadsTo(t.Context(), "web", "web"); got || err != nil {
		t.Errorf("without services, a name leads to one: got %t (%v)", got, err)
	}
}

func TestServiceFQDN(t *testing.T) {
	n := hosting("k8s", node4)
	if got, err := n.ServiceFQDN(t.Context(), "k8s-api"); got != "k8s-api.example.ts.net" || err != nil {
		t.Errorf("got %q (%v)", got, err)
	}
	for name, failure := range map[string]error{"": nil, "k8s": nil, "k8s.example.ts.net": errors.New("gone")} {
		n.lastName.Store(nil)
		n.DNSName = func(context.Context) (string, error) { return name, failure }
		if got, err := n.ServiceFQDN(t.Context(), "k8s-api"); got != "" || (err != nil) != (failure != nil) {
			t.Errorf("of node %q: got %q (%v); want no name, and an error: %t", name, got, err, failure != nil)
		}
	}
}

// serviceListener listens for a service on a node.
type serviceListener struct {
	nodeListener
	*hosted
}

func TestFromListeners_Services(t *testing.T) {
	node, other := &tsnet.Server{Hostname: "node"}, &tsnet.Server{Hostname: "other"}
	var drained []string
	on := func(node *tsnet.Server, name string, addr netip.Addr) net.Listener {
		return serviceListener{nodeListener{node: node}, &hosted{name: name, addrs: []netip.Addr{addr}, drained: &drained}}
	}
	failing := on(node, "failing", service6).(serviceListener)
	failing.err = errors.New("the node has gone")
	nodes := FromListeners([]net.Listener{
		nodeListener{node: node},
		embeddingListener{tls.NewListener(unwrappingListener{on(node, "k8s-api", service4)}, nil)},
		on(other, "web", peer4), failing,
	})
	if len(nodes) != 2 {
		t.Fatalf("got %d nodes; want 2", len(nodes))
	}
	if nodes[0].ServicesOnly || !nodes[1].ServicesOnly {
		t.Error("it is not the second node alone that has services only")
	}
	for _, addr := range []netip.Addr{service4, service6} {
		if !nodes[0].Is(addr) || nodes[1].Is(addr) {
			t.Errorf("%v is not the address of the node that hosts its service, and of no other", addr)
		}
	}
	if nodes[0].Is(peer4) || !nodes[1].Is(peer4) {
		t.Error("the other node's service is not the other node's")
	}
	if err := nodes.Drain(t.Context()); !errors.Is(err, failing.err) {
		t.Errorf("got error %v; want that of the service that cannot be drained", err)
	}
	if len(drained) != 3 {
		t.Errorf("drained %q; want all", drained)
	}
}
