// SPDX-License-Identifier: Apache-2.0

package service

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"tailscale.com/tailcfg"
)

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		host, node, service string
		err                 []string // what an error mentions
	}{
		{host: "k8s/k8s-api", node: "k8s", service: "svc:k8s-api"},
		{host: "k8s/svc:k8s-api", node: "k8s", service: "svc:k8s-api"},
		{host: "/k8s-api", node: "", service: "svc:k8s-api"}, // as bind tailscale/
		{host: "k8s", err: []string{"tailscale-service/k8s", "no service", "tailscale-service/k8s/k8s-api"}},
		{host: "k8s/", err: []string{"tailscale-service/k8s/", "<service>"}},
		{host: "k8s/a b", err: []string{`"a b"`}},
		{host: "k8s/a/b", err: []string{`"a/b"`}},
		{host: "k8s/k8s-api.example.ts.net", err: []string{`"k8s-api.example.ts.net"`}},
		// What Caddy makes of "tailscale-service/k8s/svc:k8s-api".
		{host: "k8s/svc", err: []string{`"svc:"`, "leave the prefix out", "tailscale-service/k8s/k8s-api"}},
	} {
		node, service, err := parse(tt.host)
		if (err != nil) != (tt.err != nil) {
			t.Errorf("%s: got error %v; want one: %v", tt.host, err, tt.err != nil)
			continue
		}
		if err == nil && (node != tt.node || service != tailcfg.ServiceName(tt.service)) {
			t.Errorf("%s: got node %q and service %q; want %q and %q", tt.host, node, service, tt.node, tt.service)
		}
		for _, mention := range tt.err {
			if !strings.Contains(err.Error(), mention) {
				t.Errorf("%s: got error %q; want one that mentions %s", tt.host, err, mention)
			}
		}
	}
}

func TestName(t *testing.T) {
	for address, want := range map[string]string{
		"tailscale-service/k8s/k8s-api:443": "k8s-api",
		"tailscale-service/k8s:443":         "",
		"tailscale/k8s:443":                 "",
		"k8s/k8s-api:443":                   "",
	} {
		parsed, err := caddy.ParseNetworkAddress(address)
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := Name(parsed); got != want || ok != (want != "") {
			t.Errorf("%s: got %q, %t; want %q", address, got, ok, want)
		}
	}
}

// What Caddy calls the network with, if a Caddyfile has the prefix.
func TestParse_PrefixInCaddyfile(t *testing.T) {
	_, host, _, err := caddy.SplitNetworkAddress("tailscale-service/k8s/svc:k8s-api")
	if err != nil || host != "k8s/svc" {
		t.Errorf("Caddy makes %q of it (%v); the message about that is for \"k8s/svc\"", host, err)
	}
}

// Without caddy-tailscale, and on ports that are none, nothing opens.
func TestListen_Errors(t *testing.T) {
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	defer cancel()
	for _, tt := range []struct{ host, port, err string }{
		{"k8s/k8s-api", "443", "is caddy-tailscale part of this Caddy?"},
		{"k8s/k8s-api", "0", `port "0"`},
		{"k8s/k8s-api", "65536", `port "65536"`},
		{"k8s/k8s-api", "https", `port "https"`},
		{"k8s", "443", "names no service"},
	} {
		ln, err := listen(ctx, network, tt.host, tt.port, 0, net.ListenConfig{})
		if err == nil || !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s, port %s: got %v, error %v; want one that says %s", tt.host, tt.port, ln, err, tt.err)
		}
	}
}

func TestMayHost(t *testing.T) {
	const service = tailcfg.ServiceName("svc:k8s-api")
	ip4, ip6 := netip.MustParseAddr("100.100.7.7"), netip.MustParseAddr("fd7a:115c:a1e0::7")
	for _, tt := range []struct {
		name   string
		values []tailcfg.RawMessage
		want   []netip.Addr
		fails  bool
	}{
		{name: "nothing"},
		{name: "both addresses", values: []tailcfg.RawMessage{`{"svc:k8s-api":["fd7a:115c:a1e0::7","100.100.7.7"]}`}, want: []netip.Addr{ip4, ip6}},
		{name: "another service", values: []tailcfg.RawMessage{`{"svc:web":["100.100.7.7"]}`}},
		{name: "the service without an address", values: []tailcfg.RawMessage{`{"svc:k8s-api":[]}`}},
		{name: "no address", values: []tailcfg.RawMessage{`{"svc:k8s-api":[""]}`}},
		{name: "an address twice", values: []tailcfg.RawMessage{`{"svc:k8s-api":["100.100.7.7","100.100.7.7"]}`}, want: []netip.Addr{ip4}},
		{name: "several values, of which the node takes no notice", values: []tailcfg.RawMessage{`{"svc:k8s-api":["100.100.7.7"]}`, `{}`}},
		{name: "something else", values: []tailcfg.RawMessage{`["100.100.7.7"]`}, fails: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := mayHost(tailcfg.NodeCapMap{tailcfg.NodeAttrServiceHost: tt.values}, service)
			if (err != nil) != tt.fails {
				t.Fatalf("got error %v; want one: %v", err, tt.fails)
			}
			if len(got) != len(tt.want) || len(got) > 0 && got[0] != tt.want[0] {
				t.Errorf("got %v; want %v", got, tt.want)
			}
		})
	}
}

// A listener that is closed wakes its Accept, and takes no connection from another.
func TestListener_ClosedTakesNoConnection(t *testing.T) {
	h := &hosting{conns: make(chan net.Conn), done: make(chan struct{})}
	old, current := &listener{hosting: h, closed: make(chan struct{})}, &listener{hosting: h, closed: make(chan struct{})}
	accepted := make(chan error)
	go func() { _, err := old.Accept(); accepted <- err }()
	close(old.closed)
	if err := <-accepted; !errors.Is(err, net.ErrClosed) {
		t.Errorf("got error %v from a closed listener; want %v", err, net.ErrClosed)
	}
	for range 100 {
		client, server := net.Pipe()
		go h.deliver(server)
		if _, err := old.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Fatal("a closed listener took a connection")
		}
		if c, err := current.Accept(); c != server || err != nil {
			t.Fatalf("got %v, %v; want the connection", c, err)
		}
		_ = client.Close()
	}
	// Nobody is left.
	client, server := net.Pipe()
	close(h.done)
	h.deliver(server)
	if _, err := client.Read(make([]byte, 1)); err == nil {
		t.Error("a connection that nobody takes stays open")
	}
}
