// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"crypto/tls"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pires/go-proxyproto"
	"tailscale.com/tsnet"
)

// owning returns a node that owns two addresses.
func owning(name string, ip4, ip6 netip.Addr) *Node {
	return &Node{Name: name, Addrs: func() (netip.Addr, netip.Addr) { return ip4, ip6 }}
}

func TestAccepting(t *testing.T) {
	production := owning("production", node4, node6)
	staging := owning("staging", peer4, netip.Addr{})
	twin := owning("twin", node4, peer6)
	joining := owning("joining", netip.Addr{}, netip.Addr{})

	for _, tt := range []struct {
		name  string
		nodes Nodes
		local netip.Addr
		want  *Node
		err   []string // what an error mentions
	}{
		{"one node", Nodes{production}, node4, production, nil},
		{"one node, IPv6", Nodes{production}, node6, production, nil},
		{"the first of two", Nodes{production, staging}, node4, production, nil},
		{"the second of two", Nodes{production, staging}, peer4, staging, nil},
		{"an address that only one of two twins owns", Nodes{production, twin}, node6, production, nil},

		{"no node", nil, node4, nil, []string{"no tailnet node", "100.64.0.1"}},
		{"another address", Nodes{production}, peer4, nil, []string{"no tailnet node", "100.64.0.2"}},
		{"no address", Nodes{production, staging}, netip.Addr{}, nil, []string{"no tailnet node"}},
		{"two nodes own the address", Nodes{production, twin}, node4, nil, []string{`"production"`, `"twin"`, "100.64.0.1"}},
		{"two nodes own the address, one does not", Nodes{twin, staging, production}, node4, nil, []string{`"production"`, `"twin"`, "100.64.0.1"}},
		{"another address, and a node that has none yet", Nodes{production, joining}, peer4, nil, []string{`"joining"`, ErrNotConnected.Error()}},
		{"one of two, while the other has none yet", Nodes{joining, production}, node4, production, nil},
		{"three nodes own the address", Nodes{production, twin, twin}, node4, nil, []string{"100.64.0.1"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.nodes.Accepting(tt.local)
			if got != tt.want {
				t.Errorf("got node %v; want %v", got, tt.want)
			}
			if (err != nil) != (tt.err != nil) {
				t.Fatalf("got error %v; want one: %v", err, tt.err != nil)
			}
			for _, mention := range tt.err {
				if !strings.Contains(err.Error(), mention) {
					t.Errorf("got error %q; want one that mentions %s", err, mention)
				}
			}
		})
	}
}

// nodeListener is a listener on a tailnet node, as tsnet's own.
type nodeListener struct {
	net.Listener
	node *tsnet.Server
}

func (l nodeListener) Server() *tsnet.Server { return l.node }

// The ways in which a layer shows what is below it.
type (
	unwrappingListener struct{ inner net.Listener }
	embeddingListener  struct{ net.Listener }
	// bothListener would lead elsewhere by its embedded listener.
	bothListener struct {
		net.Listener
		inner net.Listener
	}
	opaqueListener struct{ inner net.Listener }
)

func (l unwrappingListener) Unwrap() net.Listener      { return l.inner }
func (l unwrappingListener) Accept() (net.Conn, error) { return l.inner.Accept() }
func (l unwrappingListener) Close() error              { return l.inner.Close() }
func (l unwrappingListener) Addr() net.Addr            { return l.inner.Addr() }

func (l bothListener) Unwrap() net.Listener { return l.inner }

func (l opaqueListener) Accept() (net.Conn, error) { return l.inner.Accept() }
func (l opaqueListener) Close() error              { return l.inner.Close() }
func (l opaqueListener) Addr() net.Addr            { return l.inner.Addr() }

func TestFromListeners(t *testing.T) {
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	a := nodeListener{node: &tsnet.Server{Hostname: "a"}}
	b := nodeListener{node: &tsnet.Server{Hostname: "b"}}

	for _, tt := range []struct {
		name      string
		listeners []net.Listener
		want      []string
	}{
		{"none", nil, nil},
		{"bare", []net.Listener{a}, []string{"a"}},
		{"by pointer", []net.Listener{&a}, []string{"a"}},
		{"unwrapped", []net.Listener{unwrappingListener{a}}, []string{"a"}},
		{"embedded", []net.Listener{embeddingListener{a}}, []string{"a"}},
		{"embedded by pointer", []net.Listener{&embeddingListener{&a}}, []string{"a"}},
		{"in crypto/tls's layer", []net.Listener{tls.NewListener(a, nil)}, []string{"a"}},
		{"many layers, as Caddy and a plugin add them", []net.Listener{embeddingListener{tls.NewListener(unwrappingListener{&embeddingListener{a}}, nil)}}, []string{"a"}},
		{"Unwrap goes before what is embedded", []net.Listener{bothListener{plain, a}}, []string{"a"}},
		{"Unwrap goes before what is embedded, and finds nothing", []net.Listener{bothListener{a, plain}}, nil},

		{"two nodes", []net.Listener{a, embeddingListener{b}}, []string{"a", "b"}},
		{"two ports of one node", []net.Listener{a, unwrappingListener{a}, embeddingListener{a}}, []string{"a"}},
		{"two nodes of the same name", []net.Listener{a, nodeListener{node: &tsnet.Server{Hostname: "a"}}}, []string{"a", "a"}},

		{"plain socket", []net.Listener{plain}, nil},
		{"plain socket in layers", []net.Listener{embeddingListener{tls.NewListener(plain, nil)}}, nil},
		{"plain socket beside a node", []net.Listener{plain, a, embeddingListener{plain}}, []string{"a"}},
		{"node in a layer that shows nothing", []net.Listener{opaqueListener{a}}, nil},
		{"in a field that is not embedded, as of the PROXY protocol", []net.Listener{&proxyproto.Listener{Listener: a}}, []string{"a"}},
		{"listener without a node", []net.Listener{nodeListener{}}, nil},
		{"nothing below a layer", []net.Listener{unwrappingListener{}, embeddingListener{}, nil}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			for _, n := range FromListeners(tt.listeners) {
				got = append(got, n.Name)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("nodes (-want +got):\n%s", diff)
			}
		})
	}
}
