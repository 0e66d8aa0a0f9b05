// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/pires/go-proxyproto"
	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// The addresses of a daemon's host and of its peer in these tests: those of the
// loopback interface, all of which are the host's.
var (
	hostAddr  = netip.MustParseAddr("127.0.0.2")
	guestAddr = netip.MustParseAddr("127.0.0.3")
)

// daemon is a Tailscale daemon's LocalAPI, as far as it is needed.
type daemon struct {
	socket string
	// silent has it answer nothing but errors.
	silent atomic.Bool
	asked  atomic.Pointer[string] // the last question of whois
	dialed atomic.Pointer[string] // whom it was to dial last
}

func newDaemon(t *testing.T) *daemon {
	t.Helper()
	d := &daemon{socket: filepath.Join(t.TempDir(), "tailscaled.sock")}
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, v any) {
		if d.silent.Load() {
			http.Error(w, "not now", http.StatusInternalServerError)
			return
		}
		if err := json.NewEncoder(w).Encode(v); err != nil {
			t.Error(err)
		}
	}
	mux.HandleFunc("/localapi/v0/status", func(w http.ResponseWriter, r *http.Request) {
		status := &ipnstate.Status{
			TailscaleIPs: []netip.Addr{hostAddr, netip.MustParseAddr("fd7a:115c:a1e0::2")},
			Self:         &ipnstate.PeerStatus{DNSName: "server.example.ts.net."},
		}
		if r.FormValue("peers") != "false" {
			status.Peer = map[key.NodePublic]*ipnstate.PeerStatus{
				key.NewNode().Public(): {ID: "nodeid1", DNSName: "laptop.example.ts.net.", TailscaleIPs: []netip.Addr{guestAddr}},
				key.NewNode().Public(): {ID: "nodeid2", DNSName: "other.example.ts.net.", TailscaleIPs: []netip.Addr{netip.MustParseAddr("127.0.0.9")}},
			}
		}
		answer(w, status)
	})
	mux.HandleFunc("/localapi/v0/whois", func(w http.ResponseWriter, r *http.Request) {
		question := r.URL.RawQuery
		d.asked.Store(&question)
		if r.FormValue("addr") != guestAddr.String() {
			http.Error(w, "no match for IP:port", http.StatusNotFound)
			return
		}
		answer(w, &apitype.WhoIsResponse{
			Node:        &tailcfg.Node{Name: "laptop.example.ts.net."},
			UserProfile: &tailcfg.UserProfile{LoginName: "alice@example.com"},
		})
	})
	mux.HandleFunc("/localapi/v0/dial", func(w http.ResponseWriter, r *http.Request) {
		peer := r.Header.Get("Dial-Network") + " " + net.JoinHostPort(r.Header.Get("Dial-Host"), r.Header.Get("Dial-Port"))
		d.dialed.Store(&peer)
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		if _, err := io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: ts-dial\r\n\r\nthe peer"); err != nil {
			t.Error(err)
		}
	})
	ln, err := net.Listen("unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &httptest.Server{Listener: ln, Config: &http.Server{Handler: mux, ReadHeaderTimeout: time.Second}}
	srv.Start()
	t.Cleanup(srv.Close)
	return d
}

func TestADaemonSaysWhoItsPeersAre(t *testing.T) {
	d := newDaemon(t)
	node := FromDaemon(d.socket)
	if owner, err := (Nodes{node}).Accepting(hostAddr); err != nil || owner != node {
		t.Fatalf("who owns %v: got %v, %v", hostAddr, owner, err)
	}
	if _, err := (Nodes{node}).Accepting(netip.MustParseAddr("127.0.0.1")); err == nil || errors.Is(err, ErrNotConnected) {
		t.Errorf("an address of the host that is not the daemon's: got error %v; want that nobody owns it", err)
	}
	who, err := node.WhoIs(t.Context(), guestAddr, hostAddr)
	if err != nil {
		t.Fatal(err)
	}
	if who.UserProfile.LoginName != "alice@example.com" {
		t.Errorf("got %v", who.UserProfile)
	}
	if got, want := *d.asked.Load(), "addr=127.0.0.3&dst_ip=127.0.0.2"; got != want {
		t.Errorf("the daemon was asked %q; want %q, or grants for one address count on another", got, want)
	}
	if _, err := node.WhoIs(t.Context(), hostAddr, hostAddr); !errors.Is(err, ErrSelf) {
		t.Errorf("the host itself: got error %v; want %v", err, ErrSelf)
	}
	if _, err := node.WhoIs(t.Context(), netip.MustParseAddr("127.0.0.9"), hostAddr); !errors.Is(err, ErrPeerNotFound) {
		t.Errorf("an unknown peer: got error %v; want %v", err, ErrPeerNotFound)
	}
	if owns, err := node.Owns(t.Context(), "server.example.ts.net:443"); !owns || err != nil {
		t.Errorf("its own name: got %v, %v", owns, err)
	}
}

// A daemon that does not say what its addresses are may still say who has one.
func TestTheHostIsNoCallerWhileItsDaemonStalls(t *testing.T) {
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

func TestPeersAreFoundByWhatTheyAreCalled(t *testing.T) {
	node := FromDaemon(newDaemon(t).socket)
	for name, want := range map[string][]netip.Addr{
		"laptop.example.ts.net": {guestAddr},
		"Laptop":                {guestAddr},
		"nodeid1":               {guestAddr},
		"nobody":                nil,
		"":                      nil,
	} {
		got, err := node.Lookup(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Errorf("%q (-want +got):\n%s", name, diff)
		}
	}
}

// A daemon that does not answer has no addresses, so that nothing counts as its
// own.
func TestADaemonThatIsAwayOwnsNothing(t *testing.T) {
	d := newDaemon(t)
	for name, node := range map[string]*Node{"silent": FromDaemon(d.socket), "gone": FromDaemon(d.socket + ".gone")} {
		d.silent.Store(true)
		if _, err := (Nodes{node}).Accepting(hostAddr); !errors.Is(err, ErrNotConnected) {
			t.Errorf("%s: got error %v; want %v", name, err, ErrNotConnected)
		}
	}
}

// It may be in another tailnet by now, where another host has its addresses.
func TestADaemonThatGoesAwayOwnsNothingAnyMore(t *testing.T) {
	d := newDaemon(t)
	nodes := Nodes{FromDaemon(d.socket)}
	if _, err := nodes.Accepting(hostAddr); err != nil {
		t.Fatal(err)
	}
	d.silent.Store(true)
	for gone := time.Now(); ; time.Sleep(addrsPeriod / 20) {
		_, err := nodes.Accepting(hostAddr)
		if errors.Is(err, ErrNotConnected) {
			return
		}
		if time.Since(gone) > 10*addrsPeriod {
			t.Fatalf("got error %v; want %v after %v", err, ErrNotConnected, addrsPeriod)
		}
	}
}

// Every request of a server asks whose the address is that it came to.
func TestADaemonThatHangsDoesNotHoldRequestsUp(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "tailscaled.sock")
	ln, err := net.Listen("unix", socket) // which accepts nothing
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	node := FromDaemon(socket)
	answer := make(chan error, 1)
	go func() {
		_, err := Nodes{node}.Accepting(hostAddr)
		answer <- err
	}()
	select {
	case err := <-answer:
		if !errors.Is(err, ErrNotConnected) {
			t.Errorf("got error %v; want %v", err, ErrNotConnected)
		}
	case <-time.After(20 * WhoIsTimeout):
		t.Errorf("no answer after %v; want one after about %v", 20*WhoIsTimeout, WhoIsTimeout)
	}
}

// The network of the host leads elsewhere, unencrypted, while the daemon is down.
func TestPeersAreDialledByTheDaemon(t *testing.T) {
	d := newDaemon(t)
	c, err := FromDaemon(d.socket).DialPeer(t.Context(), "tcp", netip.AddrPortFrom(guestAddr, 80).String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got, err := io.ReadAll(c); err != nil || string(got) != "the peer" {
		t.Errorf("got %q, %v from the other end; want what the daemon connected to", got, err)
	}
	if got, want := *d.dialed.Load(), "tcp 127.0.0.3:80"; got != want {
		t.Errorf("the daemon was to dial %q; want %q", got, want)
	}
	if c, err := FromDaemon(d.socket).DialPeer(t.Context(), "tcp", "laptop:80"); err == nil {
		t.Errorf("by name: got a connection to %v; want an error", c.RemoteAddr())
	}
}

// hostConn returns both ends of a connection from guestAddr to hostAddr.
func hostConn(t *testing.T) (server, client net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", netip.AddrPortFrom(hostAddr, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client, err = (&net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(guestAddr, 0))}).DialContext(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	server, err = ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return server, client
}

func TestSocketsOfTheHostCountOnlyWhereAskedFor(t *testing.T) {
	server, client := hostConn(t)
	ctx := ConnContext(t.Context(), server)
	conn, err := HostConnFrom(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if conn.Remote.String() != client.LocalAddr().String() || conn.Local != hostAddr || conn.Accepted.IsZero() {
		t.Errorf("got %+v; want a connection from %v to %v", conn, client.LocalAddr(), hostAddr)
	}
	if got, err := ConnFrom(ctx); got != nil || err == nil {
		t.Errorf("taken for a tailnet node's connection: %v, %v", got, err)
	}

	conn.End(errors.New("test"))
	<-ctx.Done()
	if _, err := client.Read(make([]byte, 1)); err == nil {
		t.Error("the connection can still be read from after its end")
	}
}

// What the PROXY protocol reports as the remote address is what a client wrote.
func TestWrappedSocketsOfTheHostAreRefused(t *testing.T) {
	server, client := hostConn(t)
	if _, err := client.Write([]byte("PROXY TCP4 127.0.0.9 127.0.0.2 1 443\r\n")); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]net.Conn{"PROXY protocol": proxyproto.NewConn(server), "unknown": struct{ net.Conn }{server}} {
		if conn, err := HostConnFrom(ConnContext(t.Context(), c)); conn != nil || err == nil {
			t.Errorf("%s: got %v, %v; want an error", name, conn, err)
		}
	}
	if conn, err := HostConnFrom(t.Context()); conn != nil || err == nil {
		t.Errorf("a server that records nothing: got %v, %v; want an error", conn, err)
	}
	ctx := WithConn(t.Context(), netip.AddrPortFrom(guestAddr, 1), hostAddr)
	if conn, err := HostConnFrom(ctx); conn != nil || err == nil {
		t.Errorf("a tailnet node's connection: got %v, %v; want an error", conn, err)
	}
}
