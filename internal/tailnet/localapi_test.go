// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"tailscale.com/client/local"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/tsd"
	"tailscale.com/wgengine"
	"tailscale.com/wgengine/filter"
)

// saying returns a node whose daemon says that this is its status.
func saying(t *testing.T, status *ipnstate.Status) *Node {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &httptest.Server{Listener: ln, Config: &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if status == nil {
			http.Error(w, "not now", http.StatusInternalServerError)
			return
		}
		if err := json.NewEncoder(w).Encode(status); err != nil {
			t.Error(err)
		}
	})}}
	srv.Start()
	t.Cleanup(srv.Close)
	return FromDaemon(socket)
}

func TestStatus_IsWhatNodeSays(t *testing.T) {
	expiry := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	self := &ipnstate.PeerStatus{DNSName: "k8s.example.ts.net."}
	expiring := &ipnstate.PeerStatus{DNSName: "k8s.example.ts.net.", KeyExpiry: &expiry}
	for _, tt := range []struct {
		name string
		says ipnstate.Status
		want Status
	}{
		{"all", ipnstate.Status{BackendState: "Running", Health: []string{"slow"}, CertDomains: []string{"k8s.example.ts.net"}, Self: expiring},
			Status{State: "Running", Health: []string{"slow"}, CertDomains: []string{"k8s.example.ts.net"}, DNSName: "k8s.example.ts.net", KeyExpiry: expiry}},
		{"a key that does not expire", ipnstate.Status{BackendState: "Running", Self: self}, Status{State: "Running", DNSName: "k8s.example.ts.net"}},
		{"not yet itself", ipnstate.Status{BackendState: "NeedsLogin"}, Status{State: "NeedsLogin"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := saying(t, &tt.says).Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("status (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDNSName_UnknownIsAnError(t *testing.T) {
	if name, err := saying(t, new(ipnstate.Status)).DNSName(t.Context()); name != "" || err == nil {
		t.Errorf("got %q, %v; want an error", name, err)
	}
}

// What a node does not answer is not taken for an answer that is empty.
func TestNode_FailuresAreErrors(t *testing.T) {
	gone := errors.New("LocalAPI is gone")
	withoutClient := fromClient("k8s", nil, func() (*local.Client, error) { return nil, gone })
	for name, node := range map[string]*Node{"failing": saying(t, nil), "without client": withoutClient} {
		_, asking := node.Ask(t.Context(), peer4, node4)
		found, lookup := node.Lookup(t.Context(), "")
		dnsName, naming := node.DNSName(t.Context())
		_, status := node.Status(t.Context())
		for question, err := range map[string]error{"Ask": asking, "Lookup": lookup, "DNSName": naming, "Status": status} {
			if err == nil || node == withoutClient && !errors.Is(err, gone) {
				t.Errorf("%s node: %s: got error %v; want one", name, question, err)
			}
		}
		if found != nil || dnsName != "" {
			t.Errorf("%s node: got peers %v, and the name %q", name, found, dnsName)
		}
	}
}

func TestFromDaemon_HasBothAddresses(t *testing.T) {
	for _, addrs := range [][]netip.Addr{{node4, node6}, {node6, node4}, {node6}, {node4}} {
		a := &daemonAddrs{ask: func(context.Context) ([]netip.Addr, error) { return addrs, nil }}
		nodes := Nodes{{Name: "tailscaled", Addrs: a.get}}
		if !nodes[0].connected() {
			t.Errorf("with the addresses %v, the node is not connected", addrs)
		}
		for _, addr := range addrs {
			if !nodes.Own(addr) {
				t.Errorf("%v is none of %v", addr, addrs)
			}
		}
		if nodes.Own(peer4) {
			t.Errorf("%v is one of %v", peer4, addrs)
		}
	}
}

func TestStatus_Expired(t *testing.T) {
	now := time.Now()
	for _, tt := range []struct {
		status Status
		want   bool
	}{
		{Status{}, false},
		{Status{KeyExpiry: now.Add(time.Second)}, false},
		{Status{KeyExpiry: now}, true},
		{Status{KeyExpiry: now.Add(-time.Second)}, true},
		{Status{Health: []string{"slow", "fetch control key: NodeKeyExpired"}}, true},
		{Status{Health: []string{"slow"}, KeyExpiry: now.Add(time.Second)}, false},
	} {
		if got := tt.status.Expired(now); got != tt.want {
			t.Errorf("%+v is expired: %v; want %v", tt.status, got, tt.want)
		}
	}
}

// From the worst to the best.
func TestStatus_WorseThan(t *testing.T) {
	now := time.Now()
	order := []Status{
		{State: "Stopped", KeyExpiry: now},
		{State: "NeedsLogin"},
		{State: "Running", KeyExpiry: now},
		{State: "Running", KeyExpiry: now.Add(time.Second)},
		{State: "Running"},
	}
	for i, a := range order {
		for j, b := range order {
			if got := a.WorseThan(b); got != (i < j) {
				t.Errorf("%+v is worse than %+v: %v", a, b, got)
			}
		}
	}
}

func TestOwns_OwnNameIsNotAskedForAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		name := "k8s.example.ts.net"
		node, asked := named(&name)
		for range 3 {
			if owns, err := node.Owns(t.Context(), "k8s"); !owns || err != nil {
				t.Errorf("got %v, %v; want true", owns, err)
			}
			time.Sleep(2 * namePeriod)
		}
		if *asked != 1 {
			t.Errorf("asked %d times; want once", *asked)
		}
	})
}

func TestFQDN_IsASecondOldAtMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		name := "k8s.example.ts.net"
		node, asked := named(&name)
		is := func(want string) {
			t.Helper()
			if got, err := node.FQDN(t.Context()); got != want || err != nil {
				t.Errorf("got %q, %v; want %q", got, err, want)
			}
		}
		is("k8s.example.ts.net")
		name = "k8s-1.example.ts.net"
		time.Sleep(namePeriod - time.Nanosecond)
		is("k8s.example.ts.net")
		time.Sleep(time.Nanosecond)
		is("k8s-1.example.ts.net")
		if *asked != 2 {
			t.Errorf("asked %d times; want twice", *asked)
		}
		gone := errors.New("LocalAPI is gone")
		node.DNSName = func(context.Context) (string, error) { return "k8s.example.ts.net", gone }
		time.Sleep(namePeriod)
		if got, err := node.FQDN(t.Context()); got != "" || !errors.Is(err, gone) {
			t.Errorf("got %q, %v; want %v", got, err, gone)
		}
	})
}

// The reason says what is wrong with the address.
func TestDial_NamesAreRefusedAsSuch(t *testing.T) {
	n := &Node{Addrs: func() (ip4, ip6 netip.Addr) { return node4, node6 }}
	if _, err := n.Dial(t.Context(), "tcp", "recorder:80"); err == nil || !strings.Contains(err.Error(), "recorder") {
		t.Errorf("got error %v; want one that mentions the name", err)
	}
}

// engine is one that has no packet filter yet.
type engine struct{ wgengine.Engine }

func (engine) GetFilter() *filter.Filter { return nil }

// A node that starts has its parts one after the other.
func TestFilterOf_NodeThatStarts(t *testing.T) {
	for _, parts := range [][]any{nil, {engine{}}} {
		sys := tsd.NewSystem()
		for _, part := range parts {
			sys.Set(part)
		}
		if got, err := filterOf(sys); got != nil || err == nil {
			t.Errorf("with %v: got %v, %v; want an error", parts, got, err)
		}
	}
}
