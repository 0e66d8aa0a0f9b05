// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/tailcfg"
	tskey "tailscale.com/types/key"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// A request does not wait long for a node that does not answer.
func TestAuthenticate_SilentNodeIsUnavailable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node := proxytest.AliceNode()
		node.Ask = func(ctx context.Context, _, _ netip.Addr) (*apitype.WhoIsResponse, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		start := time.Now()
		resp, got := proxytest.Serve(t, newServer(t, Options{}, node), proxytest.NewRequest("GET", "http://k8s/api"))
		if got != nil {
			t.Error("the next handler was called")
		}
		proxytest.CheckRefused(t, resp, proxytest.TryAgain, `"k8s"`, proxytest.AliceAddr)
		if d := time.Since(start); d != tailnet.WhoIsTimeout {
			t.Errorf("refused after %v; want %v", d, tailnet.WhoIsTimeout)
		}
	})
}

// A tailnet may give the address of a device that left to another one.
func TestCache_ReassignedAddressIsAskedAnew(t *testing.T) {
	node := proxytest.NewChangingNode()
	h := newServer(t, Options{CacheTTL: time.Hour}, node.Node)
	proxytest.CheckUser(t, h, proxytest.NewConn()(), "alice@example.com")
	node.Says(proxytest.WhoIsMallory(), nil)
	proxytest.CheckUser(t, h, proxytest.NewConn()(), "mallory@example.com")
	node.Says(nil, tailnet.ErrPeerNotFound)
	proxytest.CheckUser(t, h, proxytest.NewConn()(), "")
}

func TestCache_ConnectionSharesAnswerForTTL(t *testing.T) {
	const ttl = 10 * time.Second
	synctest.Test(t, func(t *testing.T) {
		node := proxytest.NewChangingNode()
		h := newServer(t, Options{CacheTTL: ttl}, node.Node)
		request := proxytest.NewConn()
		for range 3 {
			proxytest.CheckUser(t, h, request(), "alice@example.com")
		}
		if node.Asked() != 1 {
			t.Errorf("three requests asked %d times; want once", node.Asked())
		}
		node.Says(proxytest.WhoIsMallory(), nil)
		time.Sleep(ttl - time.Nanosecond)
		proxytest.CheckUser(t, h, request(), "alice@example.com")
		time.Sleep(time.Nanosecond)
		proxytest.CheckUser(t, h, request(), "mallory@example.com")
		node.Says(nil, errors.New("no answer"))
		time.Sleep(ttl)
		proxytest.CheckUser(t, h, request(), "")
	})
}

func TestCache_DisabledAsksForEachRequest(t *testing.T) {
	node := proxytest.NewChangingNode()
	h := newServer(t, Options{CacheTTL: 0}, node.Node)
	request := proxytest.NewConn()
	proxytest.CheckUser(t, h, request(), "alice@example.com")
	node.Says(proxytest.WhoIsMallory(), nil)
	proxytest.CheckUser(t, h, request(), "mallory@example.com")
}

// Handlers with other options decide separately about requests on the same connection.
func TestCache_HandlersOnOneConnectionDecideSeparately(t *testing.T) {
	node := proxytest.NewChangingNode()
	who := proxytest.WhoIs(proxytest.Readers)
	who.CapMap["example.com/cap/staging"] = []tailcfg.RawMessage{`{"impersonate":{"groups":["staging"]}}`}
	node.Says(who, nil)
	production := newServer(t, Options{CacheTTL: time.Hour}, node.Node)
	staging := newServer(t, Options{CacheTTL: time.Hour, Capabilities: []tailcfg.PeerCapability{"example.com/cap/staging"}}, node.Node)
	request := proxytest.NewConn()
	for range 2 {
		for h, group := range map[server]string{production: "tailnet-readers", staging: "staging"} {
			_, got := proxytest.Serve(t, h, request())
			if got == nil || !slices.Equal(got.Header["Impersonate-Group"], []string{group}) {
				t.Errorf("passed on in the wrong groups; want %s: %+v", group, got)
			}
		}
	}
}

var (
	nodeAddr  = netip.MustParseAddr(proxytest.NodeAddr)
	aliceAddr = netip.MustParseAddr(proxytest.AliceAddr)
)

// What changes while a node answers may be missing from its answer.
func TestResolve_DecisionIsAsOldAsItsQuestion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node := proxytest.AliceNode()
		answer := node.Ask
		node.Ask = func(ctx context.Context, remote, local netip.Addr) (*apitype.WhoIsResponse, error) {
			time.Sleep(time.Second) // of the bubble's clock
			return answer(ctx, remote, local)
		}
		began := time.Now()
		res := newServer(t, Options{}, node).resolve(t.Context(), peerKey{node, aliceAddr, netip.AddrPortFrom(nodeAddr, 443)})
		if res.err != nil {
			t.Fatal(res.err)
		}
		if caller := res.caller; !caller.Asked.Equal(began) {
			t.Errorf("asked %v after the question; want no difference", caller.Asked.Sub(began))
		}
	})
}

// What follows from an answer is decided anew whenever the answer differs from the last one,
// and after a refusal.
func TestResolve_ChangedAnswerIsDecidedAnew(t *testing.T) {
	key := func(node *tailnet.Node) peerKey {
		return peerKey{node, netip.MustParseAddr(proxytest.AliceAddr), netip.MustParseAddrPort(proxytest.NodeAddr + ":443")}
	}
	node := proxytest.NewChangingNode()
	a := newServer(t, Options{}, node.Node)
	ask := func() *resolution {
		t.Helper()
		answer, err := a.peers.since(t.Context(), key(node.Node), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		return answer.value
	}
	first := ask()
	again := ask()
	if !again.asked.After(first.asked) || again.caller.Asked != again.asked {
		t.Errorf("asked at %v and then at %v, of which the caller says %v; want the later one twice", first.asked, again.asked, again.caller.Asked)
	}
	if again.caller.Identity != first.caller.Identity {
		t.Error("the same answer was decided anew")
	}
	// Other sites recognize the device by its key, which can change while nothing else does.
	renewed := proxytest.WhoIs(proxytest.Readers)
	renewed.Node.Key = tskey.NewNode().Public()
	node.Says(renewed, nil)
	if got := ask(); got.device != renewed.Node.Key || got.caller.Identity != first.caller.Identity {
		t.Errorf("with another key of the device: got %v with the identity %v; want %v with the same identity", got.device, got.caller.Identity, renewed.Node.Key)
	}
	node.Says(proxytest.WhoIs(`{"impersonate":{"groups":["others"]}}`), nil)
	if got := ask().caller.Identity.Groups; !slices.Equal(got, []string{"others"}) {
		t.Errorf("with another grant: got groups %q", got)
	}
	node.Says(proxytest.WhoIs(), nil)
	if got := ask().caller.Identity.Groups; len(got) > 0 {
		t.Errorf("without a grant: got groups %q; want none", got)
	}
	node.Says(proxytest.WhoIs(`{`), nil)
	if res := ask(); res.err == nil || res.caller != nil {
		t.Error("with a grant that cannot be read: not refused")
	}
	node.Says(proxytest.WhoIs(proxytest.Readers), nil)
	if res := ask(); res.err != nil {
		t.Errorf("with the first grant again: %v", res.err)
	}
	// The filter is asked each time: it can change while the answer does not.
	node.Admits = func(netip.Addr, netip.AddrPort) (bool, error) { return false, nil }
	if res := ask(); res.err == nil {
		t.Error("a peer that may not connect any more: not refused")
	}
	expired := proxytest.WhoIs(proxytest.Readers)
	expired.Node.Expired = true
	node.Admits = nil
	node.Says(expired, nil)
	if res := ask(); res.err == nil {
		t.Error("a peer whose key has expired: not refused")
	}
}

// Open requests end at once if their caller is unknown, and late if that cannot be
// found out. Only the first is forbidden.
func TestIdentify_UnknownPeerIsAnError(t *testing.T) {
	elsewhere := proxytest.AliceNode()
	elsewhere.Addrs = func() (ip4, ip6 netip.Addr) { return netip.MustParseAddr("100.64.0.9"), netip.Addr{} }
	offline := proxytest.AliceNode()
	offline.Addrs = func() (ip4, ip6 netip.Addr) { return }
	for _, tt := range []struct {
		name  string
		node  *tailnet.Node
		final bool
	}{
		{"the node has another address now", elsewhere, true},
		{"the node is not connected", offline, false},
		{"the peer is gone", proxytest.NewNode(nil, tailnet.ErrPeerNotFound), true},
		{"the node does not answer", proxytest.NewNode(nil, errors.New("no LocalAPI")), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			id, err := newServer(t, Options{}, tt.node).Identify(t.Context(), aliceAddr, netip.AddrPortFrom(nodeAddr, 443), time.Now())
			if id != nil || err == nil || apierrors.IsForbidden(err) != tt.final {
				t.Errorf("got %+v and error %v; want an error, forbidden: %v", id, err, tt.final)
			}
		})
	}
}

// A cached answer from before the recheck would hold a grant that was withdrawn since.
func TestIdentify_AsksAgain(t *testing.T) {
	node := proxytest.NewChangingNode()
	a := newServer(t, Options{CacheTTL: time.Hour}, node.Node)
	groups := func() []string {
		t.Helper()
		id, err := a.Identify(t.Context(), aliceAddr, netip.AddrPortFrom(nodeAddr, 443), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		return id.Groups
	}
	if diff := cmp.Diff([]string{"tailnet-readers"}, groups()); diff != "" {
		t.Errorf("groups (-want +got):\n%s", diff)
	}
	node.Says(proxytest.WhoIs(), nil)
	if diff := cmp.Diff([]string(nil), groups()); diff != "" {
		t.Errorf("groups after the grant was withdrawn (-want +got):\n%s", diff)
	}
}

// An answer that was asked for before a caller was dropped is not cached.
func TestForget_DuringLookupIsNotCached(t *testing.T) {
	n := proxytest.NewChangingNode()
	h := newServer(t, Options{CacheTTL: time.Hour}, n.Node)
	answer := n.Ask
	n.Ask = func(ctx context.Context, remote, local netip.Addr) (*apitype.WhoIsResponse, error) {
		who, err := answer(ctx, remote, local)
		n.Ask = answer
		h.Forget(remote, local)
		n.Says(proxytest.WhoIsMallory(), nil)
		return who, err
	}
	request := proxytest.NewConn()
	proxytest.CheckUser(t, h, request(), "alice@example.com")
	proxytest.CheckUser(t, h, request(), "mallory@example.com")
}

// A config that was replaced decides only about connections from before that.
func TestRetire_RefusesLaterConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newServer(t, Options{CacheTTL: time.Hour}, proxytest.AliceNode())
		request := proxytest.NewConn()
		check := func(r *http.Request, passes bool) {
			t.Helper()
			resp, got := proxytest.Serve(t, h, r)
			if passed := got != nil; passed != passes {
				t.Errorf("the request passed: %v; want %v", passed, passes)
			}
			if !passes {
				proxytest.CheckRefused(t, resp, proxytest.TryAgain, "no longer in use")
			}
		}
		check(request(), true)
		earlier := proxytest.NewConn()
		if h.Retired() {
			t.Error("Retired() = true before Retire")
		}
		time.Sleep(time.Second)
		h.Retire()
		time.Sleep(time.Second)
		if !h.Retired() {
			t.Error("Retired() = false after Retire")
		}
		check(request(), true) // also where the caller is cached
		check(earlier(), true)
		later := proxytest.NewConn()
		check(later(), false)
		h.Retire() // a second time changes nothing
		check(later(), false)
		check(request(), true)
	})
}

// A config that never ran decides about no connection.
func TestRetire_UnstartedRefusesAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // which fails if the request waits
		a, err := New(Options{})
		if err != nil {
			t.Fatal(err)
		}
		earlier := proxytest.NewConn()
		a.Retire()
		resp, got := proxytest.Serve(t, server{a}, earlier())
		if got != nil {
			t.Error("the next handler was called")
		}
		proxytest.CheckRefused(t, resp, proxytest.TryAgain, "no longer in use")
	})
}
