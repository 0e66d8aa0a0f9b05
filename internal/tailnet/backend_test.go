// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"tailscale.com/ipn/ipnext"
	"tailscale.com/tailcfg"
	"tailscale.com/tsd"
	"tailscale.com/tsnet"
)

// fakeBackend is a backend that knows one peer. lab/testcontrol compares that of a node on
// a tailnet with the node's LocalAPI.
type fakeBackend struct {
	peer    netip.Addr
	node    *tailcfg.Node
	stuck   chan struct{} // closed when it answers; nil if it does
	granted [][2]netip.Addr
}

func (b *fakeBackend) WhoIs(proto string, ipp netip.AddrPort) (n tailcfg.NodeView, u tailcfg.UserProfile, ok bool) {
	if b.stuck != nil {
		<-b.stuck
	}
	if ipp != netip.AddrPortFrom(b.peer, 0) || proto != "" {
		return n, u, false
	}
	return b.node.View(), tailcfg.UserProfile{LoginName: "alice@example.com"}, true
}

func (b *fakeBackend) PeerCapsForIP(src, dst netip.Addr) tailcfg.PeerCapMap {
	b.granted = append(b.granted, [2]netip.Addr{src, dst})
	return tailcfg.PeerCapMap{"cap": {"1"}}
}

func TestQuestions_AskOnDialledAddress(t *testing.T) {
	b := &fakeBackend{peer: peer6, node: &tailcfg.Node{
		Name:      "laptop.example.ts.net.",
		Addresses: []netip.Prefix{netip.PrefixFrom(peer4, 32), netip.PrefixFrom(peer6, 128)},
	}}
	who, err := newQuestions(b).ask(t.Context(), peer6, node6)
	if err != nil {
		t.Fatal(err)
	}
	if who.Node.Name != b.node.Name || who.UserProfile.LoginName != "alice@example.com" || !who.CapMap.HasCapability("cap") {
		t.Errorf("got %+v, %+v, %v", who.Node, who.UserProfile, who.CapMap)
	}
	// As LocalAPI does, by the first address of the peer.
	if want := [2]netip.Addr{peer4, node6}; len(b.granted) != 1 || b.granted[0] != want {
		t.Errorf("asked for the grants of %v; want those of %v", b.granted, want)
	}
	// The answer is the asker's own.
	who.Node.Tags = append(who.Node.Tags, "tag:a")
	if b.node.Tags != nil {
		t.Error("the answer shares memory with the backend")
	}
}

func TestQuestions_UnknownPeer(t *testing.T) {
	b := &fakeBackend{peer: peer4, node: new(tailcfg.Node)}
	if who, err := newQuestions(b).ask(t.Context(), peer6, node6); who != nil || !errors.Is(err, ErrPeerNotFound) {
		t.Errorf("got %v, %v; want %v", who, err, ErrPeerNotFound)
	}
	if who, err := newQuestions(b).ask(t.Context(), peer4, node4); err != nil || len(b.granted) != 0 || who.CapMap != nil {
		t.Errorf("a peer without addresses: got %v, %v, and asked for the grants of %v; want none", who, err, b.granted)
	}
}

// A backend that is stuck keeps neither those who ask nor more than some goroutines.
func TestQuestions_StuckBackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &fakeBackend{peer: peer4, node: new(tailcfg.Node), stuck: make(chan struct{})}
		q := newQuestions(b)
		node := &Node{Addrs: func() (ip4, ip6 netip.Addr) { return node4, node6 }, Ask: q.ask}
		began := time.Now()
		failed := make(chan error)
		for range 10 * maxQuestions {
			go func() {
				_, err := node.WhoIs(t.Context(), peer4, node4)
				failed <- err
			}()
		}
		for range 10 * maxQuestions {
			if err := <-failed; !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("got error %v; want %v", err, context.DeadlineExceeded)
			}
		}
		if took := time.Since(began); took != WhoIsTimeout {
			t.Errorf("it took %v; want %v", took, WhoIsTimeout)
		}
		if got := len(q.slots); got != maxQuestions {
			t.Errorf("%d goroutines wait for the backend; want %d", got, maxQuestions)
		}
		close(b.stuck)
		synctest.Wait()
		if got := len(q.slots); got != 0 {
			t.Errorf("%d goroutines wait for a backend that answers; want none", got)
		}
		if _, err := node.WhoIs(t.Context(), peer4, node4); err != nil {
			t.Errorf("a backend that answers again: %v", err)
		}
	})
}

// A node that has ended is not asked what it knew.
func TestFromServer_AsksBackendWhileNodeRuns(t *testing.T) {
	node := offline(t)
	n := FromServer(node)
	if questionsTo(node) != nil {
		t.Error("a node that has not been started has a backend")
	}
	if err := node.Start(); err != nil {
		t.Fatal(err)
	}
	q := questionsTo(node)
	if q == nil {
		t.Fatal("a node that runs has no backend; LocalAPI, which costs more, would be asked")
	}
	if questionsTo(new(tsnet.Server)) != nil {
		t.Error("another node has this one's backend")
	}
	if _, err := n.WhoIs(t.Context(), peer4, node4); !errors.Is(err, ErrPeerNotFound) {
		t.Errorf("a node without a tailnet: got error %v; want %v", err, ErrPeerNotFound)
	}
	asked := &fakeBackend{peer: peer4, node: new(tailcfg.Node)}
	q.backend = asked
	if _, err := n.WhoIs(t.Context(), peer4, node4); err != nil {
		t.Errorf("the backend was not asked: %v", err)
	}
	if err := node.Close(); err != nil {
		t.Fatal(err)
	}
	if questionsTo(node) != nil {
		t.Error("a node that has ended has a backend")
	}
	if _, err := n.WhoIs(t.Context(), peer4, node4); err == nil || errors.Is(err, ErrPeerNotFound) {
		t.Errorf("a node that has ended: got error %v; want that it does not answer", err)
	}
}

// safeBackend is all that extensions are promised.
type safeBackend struct {
	ipnext.SafeBackend
	node *tsnet.Server
}

func (b safeBackend) Sys() *tsd.System { return b.node.Sys() }

// What is no backend as this package knows it is asked over LocalAPI.
func TestExtension_IgnoresUnknownBackend(t *testing.T) {
	node := offline(t)
	if err := node.Start(); err != nil {
		t.Fatal(err)
	}
	running.Delete(node.Sys())
	if err := (extension{safeBackend{node: node}}).Init(nil); err != nil {
		t.Fatal(err)
	}
	if questionsTo(node) != nil {
		t.Error("a backend without the methods is asked")
	}
	if _, err := FromServer(node).WhoIs(t.Context(), peer4, node4); !errors.Is(err, ErrPeerNotFound) {
		t.Errorf("over LocalAPI: got error %v; want %v", err, ErrPeerNotFound)
	}
}
