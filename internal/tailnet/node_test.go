// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/tailcfg"
	"tailscale.com/tsnet"
)

var (
	node4 = netip.MustParseAddr("100.64.0.1")
	node6 = netip.MustParseAddr("fd7a:115c:a1e0::1")
	peer4 = netip.MustParseAddr("100.64.0.2")
	peer6 = netip.MustParseAddr("fd7a:115c:a1e0::2")
)

// asked is a question to a node.
type asked struct {
	remote, local netip.Addr
}

// answering returns a node with the addresses node4 and node6 that gives the same
// answer to every question, and the questions that it was asked.
func answering(who *apitype.WhoIsResponse, err error) (*Node, *[]asked) {
	questions := new([]asked)
	return &Node{
		Name:  "k8s",
		Addrs: func() (ip4, ip6 netip.Addr) { return node4, node6 },
		Ask: func(_ context.Context, remote, local netip.Addr) (*apitype.WhoIsResponse, error) {
			*questions = append(*questions, asked{remote, local})
			return who, err
		},
	}, questions
}

// Messages name a node without a configured hostname as tsnet does.
func TestFromServer_NameIsTheOneAskedFor(t *testing.T) {
	t.Setenv("TS_NO_LOGS_NO_SUPPORT", "true")
	for _, hostname := range []string{"k8s", ""} {
		s := &tsnet.Server{Hostname: hostname, Dir: t.TempDir(), ControlURL: "http://127.0.0.1:1"}
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		client, err := s.LocalClient()
		if err != nil {
			t.Fatal(err)
		}
		prefs, err := client.GetPrefs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got := FromServer(s).Name; got != prefs.Hostname {
			t.Errorf("hostname %q: got name %q; the node asks for %q", hostname, got, prefs.Hostname)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestWhoIs_AsksOnDialledAddress(t *testing.T) {
	alice := &apitype.WhoIsResponse{UserProfile: &tailcfg.UserProfile{LoginName: "alice@example.com"}}
	node, questions := answering(alice, nil)
	got, err := node.WhoIs(t.Context(), peer4, node4)
	if err != nil {
		t.Fatal(err)
	}
	if got != alice {
		t.Errorf("got %v; want the node's answer", got)
	}
	if got, want := *questions, (asked{peer4, node4}); len(got) != 1 || got[0] != want {
		t.Errorf("got questions %v; want only %v", got, want)
	}
}

func TestWhoIs_SelfIsNotAsked(t *testing.T) {
	for _, self := range []netip.Addr{node4, node6} {
		node, questions := answering(&apitype.WhoIsResponse{}, nil)
		got, err := node.WhoIs(t.Context(), self, node4)
		if !errors.Is(err, ErrSelf) {
			t.Errorf("from %v: got error %v; want %v", self, err, ErrSelf)
		}
		if got != nil {
			t.Errorf("from %v: got answer %v; want none", self, got)
		}
		if len(*questions) != 0 {
			t.Errorf("from %v: got questions %v; want none", self, *questions)
		}
	}
}

func TestWhoIs_ReturnsErrors(t *testing.T) {
	gone := errors.New("LocalAPI is gone")
	for _, want := range []error{ErrPeerNotFound, gone} {
		node, _ := answering(nil, want)
		got, err := node.WhoIs(t.Context(), peer4, node4)
		if !errors.Is(err, want) {
			t.Errorf("got error %v; want %v", err, want)
		}
		if got != nil {
			t.Errorf("got answer %v; want none", got)
		}
	}
}

// within fails t unless f returns long before a stuck node would have answered.
func within(t *testing.T, f func()) {
	t.Helper()
	start := time.Now()
	f()
	if got, want := time.Since(start), 20*WhoIsTimeout; got > want {
		t.Errorf("took %v; want at most about %v", got, WhoIsTimeout)
	}
}

// bounded fails t unless ctx has a deadline of at most WhoIsTimeout.
func bounded(ctx context.Context, t *testing.T) {
	t.Helper()
	deadline, ok := ctx.Deadline()
	if !ok {
		t.Error("the question has no deadline")
	} else if got := time.Until(deadline); got > WhoIsTimeout {
		t.Errorf("the question may take %v; want at most %v", got, WhoIsTimeout)
	}
}

func TestNode_StuckIsBounded(t *testing.T) {
	const hangs = 20 * time.Second // if the bound is lost
	node := &Node{
		Name:  "k8s",
		Addrs: func() (ip4, ip6 netip.Addr) { return node4, netip.Addr{} },
		Ask: func(ctx context.Context, _, _ netip.Addr) (*apitype.WhoIsResponse, error) {
			bounded(ctx, t)
			select {
			case <-ctx.Done():
			case <-time.After(hangs):
			}
			return nil, ctx.Err()
		},
		DNSName: func(ctx context.Context) (string, error) {
			bounded(ctx, t)
			select {
			case <-ctx.Done():
			case <-time.After(hangs):
			}
			return "", ctx.Err()
		},
	}
	within(t, func() {
		if _, err := node.WhoIs(t.Context(), peer4, node4); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("WhoIs: got error %v; want %v", err, context.DeadlineExceeded)
		}
	})
	within(t, func() {
		if owns, err := node.Owns(t.Context(), "k8s.example.ts.net"); owns || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Owns: got %v, %v; want false, %v", owns, err, context.DeadlineExceeded)
		}
	})
}

// client-go tries eleven times, a second apart, before it prints the reason. Its user
// should read that within 15 seconds.
func TestWhoIsTimeout_ElevenTriesTakeUnder15Seconds(t *testing.T) {
	if got, want := 11*WhoIsTimeout+10*time.Second, 15*time.Second; got > want {
		t.Errorf("got %v with a timeout of %v; want at most %v", got, WhoIsTimeout, want)
	}
}

func TestNode_CancelledRequestCancelsQuestion(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	node := &Node{
		Addrs: func() (ip4, ip6 netip.Addr) { return node4, netip.Addr{} },
		Ask: func(ctx context.Context, _, _ netip.Addr) (*apitype.WhoIsResponse, error) {
			return nil, ctx.Err()
		},
		DNSName: func(ctx context.Context) (string, error) { return "k8s.example.ts.net", ctx.Err() },
	}
	if _, err := node.WhoIs(ctx, peer4, node4); !errors.Is(err, context.Canceled) {
		t.Errorf("WhoIs: got error %v; want %v", err, context.Canceled)
	}
	if owns, err := node.Owns(ctx, "k8s.example.ts.net"); owns || !errors.Is(err, context.Canceled) {
		t.Errorf("Owns: got %v, %v; want false, %v", owns, err, context.Canceled)
	}
}

func TestIs(t *testing.T) {
	node := &Node{Addrs: func() (ip4, ip6 netip.Addr) { return node4, netip.Addr{} }}
	for _, tt := range []struct {
		addr netip.Addr
		want bool
	}{
		{node4, true},
		{peer4, false},
		{node6, false},
		{netip.MustParseAddr("::ffff:100.64.0.1"), false},
		// A node without an IPv6 address has the zero Addr instead.
		{netip.Addr{}, false},
	} {
		if got := node.Is(tt.addr); got != tt.want {
			t.Errorf("Is(%v): got %v; want %v", tt.addr, got, tt.want)
		}
	}
}

// named returns a node with the addresses node4 and node6 and the tailnet name that name
// points to, and how often it was asked for the name.
func named(name *string) (*Node, *int) {
	asked := new(int)
	return &Node{
		Name:  "configured-name",
		Addrs: func() (ip4, ip6 netip.Addr) { return node4, node6 },
		DNSName: func(context.Context) (string, error) {
			*asked++
			return *name, nil
		},
	}, asked
}

func TestOwns(t *testing.T) {
	for _, tt := range []struct {
		host string
		want bool
	}{
		{"k8s.example.ts.net", true},
		{"k8s.example.ts.net:443", true},
		{"k8s.example.ts.net.", true},
		{"k8s.example.ts.net.:443", true},
		{"K8S.Example.TS.net", true},
		{"k8s", true},
		{"K8s:8080", true},
		{"k8s.", true},
		{"100.64.0.1", true},
		{"100.64.0.1:80", true},
		{"fd7a:115c:a1e0::1", true},
		{"[fd7a:115c:a1e0::1]", true},
		{"[fd7a:115c:a1e0::1]:80", true},
		{"[FD7A:115C:A1E0:0::1]:80", true},
		{"[::ffff:100.64.0.1]:80", true},

		{"", false},
		{":80", false},
		{".", false},
		{"[]", false},
		{"evil.example", false},
		{"evil.example:443", false},
		{"k8s.evil.example", false},
		{"k8s.example.ts.net.evil.example", false},
		{"evil-k8s.example.ts.net", false},
		{"evil.k8s.example.ts.net", false},
		{"example.ts.net", false},
		{"k8s.example", false},
		{"k8", false},
		{"k8ss", false},
		{"configured-name", false},
		{"localhost", false},
		{"127.0.0.1", false},
		{"[::1]:80", false},
		{"100.64.0.2", false},
		{"[fd7a:115c:a1e0::2]:80", false},
		{"[fd7a:115c:a1e0::1%eth0]:80", false},
		{"1681915905", false}, // 100.64.0.1 as browsers also read it
		{"k8s.example.ts.net@evil.example", false},
		{"evil.example/k8s.example.ts.net", false},
		{"k8s.example.ts.net:443.evil.example", false},
	} {
		name := "k8s.example.ts.net"
		node, _ := named(&name)
		// The node is asked for its name the first time only.
		for range 2 {
			got, err := node.Owns(t.Context(), tt.host)
			if err != nil || got != tt.want {
				t.Errorf("host %q: got %v, %v; want %v", tt.host, got, err, tt.want)
			}
		}
	}
}

func TestOwns_WithoutNameAddressesOnly(t *testing.T) {
	for _, host := range []string{"", ".", ":80", "k8s", "configured-name", "evil.example"} {
		name := ""
		node, _ := named(&name)
		if got, err := node.Owns(t.Context(), host); got || err != nil {
			t.Errorf("host %q: got %v, %v; want false", host, got, err)
		}
	}
	name := ""
	node, _ := named(&name)
	if got, err := node.Owns(t.Context(), "100.64.0.1"); !got || err != nil {
		t.Errorf("own address: got %v, %v; want true", got, err)
	}
}

func TestOwns_IgnoresCase(t *testing.T) {
	name := "K8s.Example.TS.net"
	node, _ := named(&name)
	for _, host := range []string{"k8s.example.ts.net", "K8S"} {
		if got, err := node.Owns(t.Context(), host); !got || err != nil {
			t.Errorf("host %q: got %v, %v; want true", host, got, err)
		}
	}
}

func TestOwns_UnknownNameIsAnError(t *testing.T) {
	gone := errors.New("LocalAPI is gone")
	node := &Node{
		Name:    "k8s",
		Addrs:   func() (ip4, ip6 netip.Addr) { return node4, netip.Addr{} },
		DNSName: func(context.Context) (string, error) { return "k8s.example.ts.net", gone },
	}
	got, err := node.Owns(t.Context(), "k8s.example.ts.net")
	if got {
		t.Error("got true; want false")
	}
	if !errors.Is(err, gone) || !strings.Contains(err.Error(), `"k8s"`) {
		t.Errorf("got error %v; want one that names the node and wraps %v", err, gone)
	}
	if got, err := node.Owns(t.Context(), "100.64.0.1"); !got || err != nil {
		t.Errorf("own address: got %v, %v; want true", got, err)
	}
}

// A host that does not match may be the node's new name. Clients choose how many they
// ask for.
func TestOwns_AsksAgainOnMismatchOnceASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		name := "k8s.example.ts.net"
		node, asked := named(&name)
		owns := func(host string, want bool) {
			t.Helper()
			if got, err := node.Owns(t.Context(), host); err != nil || got != want {
				t.Errorf("host %q: got %v, %v; want %v", host, got, err, want)
			}
		}

		for range 3 {
			owns("k8s.example.ts.net", true)
			owns("k8s-1.example.ts.net", false)
		}
		time.Sleep(namePeriod - time.Nanosecond)
		owns("evil.example", false)
		if *asked != 1 {
			t.Errorf("asked %d times within a second; want once", *asked)
		}

		name = "k8s-1.example.ts.net"
		time.Sleep(time.Nanosecond)
		owns("k8s-1.example.ts.net", true)
		owns("k8s.example.ts.net", false)
		owns("k8s-1", true)
		if *asked != 2 {
			t.Errorf("asked %d times; want twice", *asked)
		}
	})
}

func TestOwns_ConcurrentQuestionsAreMerged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int32
		node := &Node{
			Addrs: func() (ip4, ip6 netip.Addr) { return node4, netip.Addr{} },
			DNSName: func(context.Context) (string, error) {
				asked.Add(1)
				time.Sleep(time.Millisecond)
				return "k8s.example.ts.net", nil
			},
		}
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if owns, err := node.Owns(t.Context(), "evil.example"); owns || err != nil {
					t.Errorf("got %v, %v; want false", owns, err)
				}
			})
		}
		wg.Wait()
		if got := asked.Load(); got != 1 {
			t.Errorf("100 requests asked %d times; want once", got)
		}
	})
}

func TestHostname(t *testing.T) {
	for host, want := range map[string]string{
		"":                         "",
		"k8s.example.ts.net":       "k8s.example.ts.net",
		"K8S.Example.TS.net.:8443": "k8s.example.ts.net",
		"k8s:80":                   "k8s",
		"100.64.0.1:80":            "100.64.0.1",
		"fd7a:115c:a1e0::1":        "fd7a:115c:a1e0::1",
		"[fd7a:115c:a1e0::1]":      "fd7a:115c:a1e0::1",
		"[FD7A:115C:a1e0::1]:80":   "fd7a:115c:a1e0::1",
		":80":                      "",
		"k8s:80.evil.example":      "k8s:80.evil.example", // not a port
	} {
		if got := Hostname(host); got != want {
			t.Errorf("Hostname(%q): got %q; want %q", host, got, want)
		}
	}
}

// Only the tailnet encrypts what a node sends to a recorder.
func TestDial_PeersOnly(t *testing.T) {
	dialled := ""
	n := &Node{
		Addrs: func() (ip4, ip6 netip.Addr) { return node4, node6 },
		DialPeer: func(_ context.Context, network, address string) (net.Conn, error) {
			dialled = network + " " + address
			return nil, nil
		},
	}
	for _, address := range []string{
		"192.0.2.1:80", "127.0.0.1:80", "[2001:db8::1]:80", "[::ffff:192.0.2.1]:80", "recorder:80", "100.64.0.9", "", ":80",
		netip.AddrPortFrom(node4, 80).String(), netip.AddrPortFrom(node6, 80).String(), "[::ffff:100.64.0.1]:80",
	} {
		if _, err := n.Dial(t.Context(), "tcp", address); err == nil {
			t.Errorf("%q: got no error; want one", address)
		}
		if dialled != "" {
			t.Fatalf("dialled %q", dialled)
		}
	}
	for _, address := range []string{"100.100.0.9:80", "[fd7a:115c:a1e0::9]:80"} {
		if _, err := n.Dial(t.Context(), "tcp", address); err != nil {
			t.Errorf("%q: %v", address, err)
		}
		if want := "tcp " + address; dialled != want {
			t.Errorf("dialled %q; want %q", dialled, want)
		}
	}
}

// Where the node knows no peer with an address, tsnet dials it over the network of the host.
func TestTailnetOnly_ClosesConnectionsOfTheHost(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var overHost net.Conn
	_, err = tailnetOnly(func(ctx context.Context, network, _ string) (net.Conn, error) {
		overHost, err = new(net.Dialer).DialContext(ctx, network, ln.Addr().String())
		return overHost, err
	})(t.Context(), "tcp", "100.100.0.9:80")
	if err == nil || !strings.Contains(err.Error(), "100.100.0.9:80 is no peer of the node") {
		t.Errorf("got error %v; want that the address is no peer", err)
	}
	if _, err := overHost.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the connection over the host's network: got error %v; want it closed", err)
	}
	onTailnet := new(gonet.TCPConn)
	c, err := tailnetOnly(func(context.Context, string, string) (net.Conn, error) { return onTailnet, nil })(t.Context(), "tcp", "100.100.0.9:80")
	if c != onTailnet || err != nil {
		t.Errorf("a connection over the tailnet: got %v, %v; want it", c, err)
	}
}

// A daemon that does not tell its addresses may still answer WhoIs.
func TestWhoIs_SelfWithoutAddresses(t *testing.T) {
	node := &Node{
		Addrs: func() (ip4, ip6 netip.Addr) { return },
		Ask: func(context.Context, netip.Addr, netip.Addr) (*apitype.WhoIsResponse, error) {
			return &apitype.WhoIsResponse{}, nil
		},
	}
	if _, err := node.WhoIs(t.Context(), hostAddr, hostAddr); !errors.Is(err, ErrSelf) {
		t.Errorf("got error %v; want %v", err, ErrSelf)
	}
}
