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
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// The addresses of the daemon's host and of its peer. The host owns all of 127.0.0.0/8.
var (
	hostAddr  = netip.MustParseAddr("127.0.0.2")
	guestAddr = netip.MustParseAddr("127.0.0.3")
)

// daemon is a fake of a Tailscale daemon's LocalAPI.
type daemon struct {
	socket string
	// silent makes it answer only errors.
	silent atomic.Bool
	asked  atomic.Pointer[string] // the last whois question
	dialed atomic.Pointer[string] // the last address that it was to dial
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
	srv := &httptest.Server{Listener: ln, Config: &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}}
	srv.Start()
	t.Cleanup(srv.Close)
	return d
}

func TestFromDaemon_KnowsPeers(t *testing.T) {
	d := newDaemon(t)
	node := FromDaemon(d.socket)
	if owner, err := (Nodes{node}).Accepting(hostAddr); err != nil || owner != node {
		t.Fatalf("who owns %v: got %v, %v", hostAddr, owner, err)
	}
	if _, err := (Nodes{node}).Accepting(netip.MustParseAddr("127.0.0.1")); err == nil || errors.Is(err, ErrNotConnected) {
		t.Errorf("an address of the host that is not the daemon's: got error %v; want that no node owns it", err)
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

func TestLookup_ByNameAndID(t *testing.T) {
	node := FromDaemon(newDaemon(t).socket)
	for name, want := range map[string][]netip.Addr{
		"laptop.example.ts.net": {guestAddr},
		"Laptop":                {guestAddr},
		"nodeid1":               {guestAddr},
		"unknown":               nil,
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

// A daemon that does not answer has no addresses.
func TestFromDaemon_UnreachableOwnsNothing(t *testing.T) {
	d := newDaemon(t)
	for name, node := range map[string]*Node{"silent": FromDaemon(d.socket), "gone": FromDaemon(d.socket + ".gone")} {
		d.silent.Store(true)
		if _, err := (Nodes{node}).Accepting(hostAddr); !errors.Is(err, ErrNotConnected) {
			t.Errorf("%s: got error %v; want %v", name, err, ErrNotConnected)
		}
	}
}

// fromAddrs returns a node with the addresses that ask returns.
func fromAddrs(ask func(context.Context) ([]netip.Addr, error)) Nodes {
	return Nodes{{Name: "tailscaled", Addrs: (&daemonAddrs{ask: ask}).get}}
}

// hang is a daemon that does not answer.
func hang(ctx context.Context) ([]netip.Addr, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// A busy daemon takes longer, also for what it is asked in the same second about peers.
func TestFromDaemon_SlowAnswerDelaysNoRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		questions := 0
		delay := time.Duration(0)
		nodes := fromAddrs(func(context.Context) ([]netip.Addr, error) {
			questions++
			time.Sleep(delay)
			return []netip.Addr{hostAddr}, nil
		})
		if _, err := nodes.Accepting(hostAddr); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * addrsPeriod)
		delay = addrsTimeout - time.Millisecond
		began := time.Now()
		for range 300 {
			if _, err := nodes.Accepting(hostAddr); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("300 requests waited for %v", took)
		}
		synctest.Wait()
		if questions != 2 {
			t.Errorf("the daemon was asked %d times; want twice", questions)
		}
		time.Sleep(addrsTimeout)
	})
}

// While it does not answer, it may have joined another tailnet, where its addresses are
// another host's.
func TestFromDaemon_LostOwnsNothing(t *testing.T) {
	for name, lost := range map[string]func(context.Context) ([]netip.Addr, error){
		"failing": func(context.Context) ([]netip.Addr, error) { return nil, errors.New("not now") },
		"hanging": hang,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ask := func(context.Context) ([]netip.Addr, error) { return []netip.Addr{hostAddr}, nil }
				nodes := fromAddrs(func(ctx context.Context) ([]netip.Addr, error) { return ask(ctx) })
				if _, err := nodes.Accepting(hostAddr); err != nil {
					t.Fatal(err)
				}
				answers := ask
				ask = lost
				time.Sleep(addrsMaxAge)
				if _, err := nodes.Accepting(hostAddr); err != nil {
					t.Errorf("after %v: %v", addrsMaxAge, err)
				}
				time.Sleep(time.Nanosecond)
				if _, err := nodes.Accepting(hostAddr); !errors.Is(err, ErrNotConnected) {
					t.Errorf("later: got error %v; want %v", err, ErrNotConnected)
				}
				ask = answers
				time.Sleep(addrsPeriod + addrsTimeout)
				if _, err := nodes.Accepting(hostAddr); err != nil {
					t.Errorf("when it answers again: %v", err)
				}
			})
		})
	}
}

// A daemon that says that it has no addresses is not lost: it has logged out.
func TestFromDaemon_LoggedOutOwnsNothingAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		addrs := []netip.Addr{hostAddr}
		nodes := fromAddrs(func(context.Context) ([]netip.Addr, error) { return addrs, nil })
		if _, err := nodes.Accepting(hostAddr); err != nil {
			t.Fatal(err)
		}
		addrs = nil
		time.Sleep(addrsPeriod)
		_, _ = nodes.Accepting(hostAddr)
		synctest.Wait()
		if _, err := nodes.Accepting(hostAddr); !errors.Is(err, ErrNotConnected) {
			t.Errorf("got error %v; want %v", err, ErrNotConnected)
		}
	})
}

// Every request of the server needs the daemon's addresses.
func TestFromDaemon_HangingIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := fromAddrs(hang)
		began := time.Now()
		for range 300 {
			if _, err := nodes.Accepting(hostAddr); !errors.Is(err, ErrNotConnected) {
				t.Fatalf("got error %v; want %v", err, ErrNotConnected)
			}
		}
		if took := time.Since(began); took != addrsTimeout {
			t.Errorf("300 requests waited for %v; want %v together", took, addrsTimeout)
		}
	})
}

// The host's network would route anything else elsewhere, unencrypted.
func TestFromDaemon_DialsPeers(t *testing.T) {
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
	if _, err := FromDaemon(d.socket).DialPeer(t.Context(), "tcp", "127.0.0.9:80"); !errors.Is(err, ErrPeerNotFound) {
		t.Errorf("no peer: got error %v; want %v", err, ErrPeerNotFound)
	}
}
