// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tailscale.com/client/tailscale/apitype"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// questionsTo returns a node that answers after a while, and counts the questions.
func questionsTo(who *apitype.WhoIsResponse, err error) (node *tailnet.Node, asked, atOnce *atomic.Int32) {
	node = proxytest.NewNode(who, err)
	asked, atOnce = new(atomic.Int32), new(atomic.Int32)
	var asking atomic.Int32
	node.Ask = func(context.Context, netip.Addr, netip.Addr) (*apitype.WhoIsResponse, error) {
		asked.Add(1)
		atOnce.Store(max(atOnce.Load(), asking.Add(1)))
		defer asking.Add(-1)
		time.Sleep(10 * time.Millisecond)
		return who, err
	}
	return node, asked, atOnce
}

// A caller who is refused, or asks who it is, makes the proxy ask as often as any other.
func TestCache_ManyRequestsAskOnce(t *testing.T) {
	const requests = 1000
	refuses := Options{CacheTTL: time.Second, Limits: impersonate.Limits{RequireGroups: true}}
	authenticate := func(a server, r *http.Request) error {
		_, err := a.Authenticate(r, a.Strip(r))
		return err
	}
	explain := func(a server, r *http.Request) error {
		_, _, err := a.Explain(r)
		return err
	}
	for _, tt := range []struct {
		name    string
		options Options
		who     *apitype.WhoIsResponse
		err     error
		do      func(server, *http.Request) error
	}{
		{"allowed", Options{CacheTTL: time.Second}, proxytest.WhoIs(proxytest.Readers), nil, authenticate},
		{"refused", refuses, proxytest.WhoIsMallory(), nil, authenticate},
		{"unknown", refuses, nil, tailnet.ErrPeerNotFound, authenticate},
		{"whoami", refuses, proxytest.WhoIs(proxytest.Readers), nil, explain},
		{"whoami of a refused caller", refuses, proxytest.WhoIsMallory(), nil, explain},
		{"whoami of an unknown caller", refuses, nil, tailnet.ErrPeerNotFound, explain},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				node, asked, atOnce := questionsTo(tt.who, tt.err)
				a := newServer(t, tt.options, node)
				request := proxytest.NewConn()
				all := func() {
					var wg sync.WaitGroup
					for range requests {
						wg.Go(func() { _ = tt.do(a, request()) })
					}
					wg.Wait()
				}
				all()
				all()
				if got := asked.Load(); got != 1 {
					t.Errorf("%d requests asked the node %d times; want once", 2*requests, got)
				}
				// Connections of one caller, each of which needs an answer of its own.
				for range requests {
					go func() { _ = tt.do(a, proxytest.NewConn()()) }()
					time.Sleep(time.Microsecond)
				}
				synctest.Wait()
				time.Sleep(time.Second)
				if got := atOnce.Load(); got != 1 {
					t.Errorf("%d questions were asked at once; want one", got)
				}
				if got := asked.Load(); got > 4 {
					t.Errorf("%d connections asked the node %d times; want at most 3 times", requests, got-1)
				}
			})
		})
	}
}

// Nobody waits longer than the TTL for access that was just given, and not at all on a
// new connection.
func TestCache_RefusalLastsForTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node := proxytest.NewChangingNode()
		node.Says(proxytest.WhoIsMallory(), nil)
		h := newServer(t, Options{CacheTTL: time.Minute, Limits: impersonate.Limits{RequireGroups: true}}, node.Node)
		request := proxytest.NewConn()
		message := func() string {
			t.Helper()
			r := request()
			_, err := h.Authenticate(r, h.Strip(r))
			if err == nil {
				return ""
			}
			return err.Error()
		}
		first := message()
		if !strings.Contains(first, "has no grant") || strings.Contains(first, "ago") {
			t.Errorf("refused with %q; want the reason alone", first)
		}
		time.Sleep(noticeable - time.Nanosecond)
		if got := message(); got != first {
			t.Errorf("a little later, refused with %q; want the same", got)
		}

		node.Says(proxytest.WhoIs(proxytest.Readers), nil)
		time.Sleep(30 * time.Second)
		got := message()
		if want := first + "; that was the answer 35s ago, and it counts for 1m0s (cache_ttl), or until there is a new connection"; got != want {
			t.Errorf("later, refused with\n%q; want\n%q", got, want)
		}
		r := request()
		facts, _, err := h.Explain(r)
		if err != nil || facts.Refused != got {
			t.Errorf("whoami says %+v, %v; want refused with %q", facts, err, got)
		}
		proxytest.CheckUser(t, h, proxytest.NewConn()(), "alice@example.com")
		time.Sleep(time.Minute)
		proxytest.CheckUser(t, h, request(), "alice@example.com")
	})
}

// A recheck asks anew, and what it finds out counts for requests at once.
func TestIdentify_RefusalCountsForRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node := proxytest.NewChangingNode()
		h := newServer(t, Options{CacheTTL: time.Hour}, node.Node)
		first := proxytest.NewConn()()
		proxytest.CheckUser(t, h, first, "alice@example.com")
		node.Says(nil, tailnet.ErrPeerNotFound)
		time.Sleep(time.Millisecond)
		again := proxytest.NewConn()
		if _, err := h.Identify(t.Context(), aliceAddr, netip.AddrPortFrom(nodeAddr, 0), time.Now()); apistatus.ReasonOf(err) != apistatus.UnknownPeer {
			t.Errorf("got error %v; want one that says that the peer is unknown", err)
		}
		proxytest.CheckUser(t, h, again(), "")
		h.Forget(aliceAddr, nodeAddr)
		node.Says(proxytest.WhoIs(), nil)
		proxytest.CheckUser(t, h, again(), "alice@example.com")
	})
}

func TestCached_ListsNoRefusedPeer(t *testing.T) {
	h := newServer(t, Options{CacheTTL: time.Hour, Limits: impersonate.Limits{RequireGroups: true}}, proxytest.NewNode(proxytest.WhoIsMallory(), nil))
	proxytest.CheckUser(t, h, proxytest.NewConn()(), "")
	h.Cached(func(remote, _ netip.Addr, caller *Caller) { t.Errorf("listed is %v: %+v; want nobody", remote, caller) })
}

// What a node did not answer is no answer.
func TestCache_FailureIsNotKept(t *testing.T) {
	node := proxytest.NewChangingNode()
	node.Says(nil, errors.New("no LocalAPI"))
	h := newServer(t, Options{CacheTTL: time.Hour}, node.Node)
	request := proxytest.NewConn()
	proxytest.CheckUser(t, h, request(), "")
	node.Says(proxytest.WhoIs(), nil)
	proxytest.CheckUser(t, h, request(), "alice@example.com")
}

// A peer that may no longer open the connection that it has is refused, and the open
// requests on it end.
func TestResolve_PeerThatIsNotAdmitted(t *testing.T) {
	dialled := netip.AddrPortFrom(nodeAddr, 443)
	jailed := proxytest.WhoIs()
	jailed.Node.IsJailed = true
	for _, tt := range []struct {
		name     string
		who      *apitype.WhoIsResponse
		admitted bool
		err      error
		dialled  netip.AddrPort
		want     apistatus.Reason // empty if it is let through
	}{
		{"admitted", proxytest.WhoIs(), true, nil, dialled, ""},
		{"not admitted", proxytest.WhoIs(), false, nil, dialled, apistatus.NotAdmitted},
		{"jailed", jailed, true, nil, dialled, apistatus.NotAdmitted},
		{"no answer", proxytest.WhoIs(), false, errors.New("no packet filter"), dialled, apistatus.NoAnswer},
		{"another port", proxytest.WhoIs(), true, nil, netip.AddrPortFrom(nodeAddr, 80), apistatus.NotAdmitted},
		{"not dialled yet", proxytest.WhoIs(), false, nil, netip.AddrPortFrom(nodeAddr, 0), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			node := proxytest.NewNode(tt.who, nil)
			node.Admits = func(remote netip.Addr, to netip.AddrPort) (bool, error) {
				return tt.admitted && remote == aliceAddr && to == dialled, tt.err
			}
			id, err := newServer(t, Options{}, node).Identify(t.Context(), aliceAddr, tt.dialled, time.Now())
			switch {
			case tt.want == "" && (err != nil || id.User != "alice@example.com"):
				t.Errorf("got %+v, %v; want alice", id, err)
			case tt.want != "" && apistatus.ReasonOf(err) != tt.want:
				t.Errorf("got %+v, %v; want an error with the reason %s", id, err, tt.want)
			}
		})
	}
}
