// SPDX-License-Identifier: Apache-2.0

package proxytest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// Readers is a grant that makes a caller a member of the group tailnet-readers.
const Readers = `{"impersonate":{"groups":["tailnet-readers"]}}`

// aliceKey is the node key of alice's laptop, the same on all nodes.
var aliceKey = key.NewNode().Public()

// WhoIs returns what a node says about alice's laptop if her grants hold the given
// rules.
func WhoIs(rules ...string) *apitype.WhoIsResponse {
	who := &apitype.WhoIsResponse{
		Node:        &tailcfg.Node{Name: "laptop.example.ts.net.", Key: aliceKey},
		UserProfile: &tailcfg.UserProfile{LoginName: "alice@example.com"},
	}
	if len(rules) > 0 {
		who.CapMap = tailcfg.PeerCapMap{tailcfg.PeerCapabilityKubernetes: nil}
	}
	for _, rule := range rules {
		who.CapMap[tailcfg.PeerCapabilityKubernetes] = append(who.CapMap[tailcfg.PeerCapabilityKubernetes], tailcfg.RawMessage(rule))
	}
	return who
}

// WhoIsTagged returns what a node says about a tagged device without grants.
func WhoIsTagged(name string, tags ...string) *apitype.WhoIsResponse {
	return &apitype.WhoIsResponse{Node: &tailcfg.Node{Name: name, Tags: tags}}
}

// WhoIsMallory returns what a node says about mallory's phone. She has no grants.
func WhoIsMallory() *apitype.WhoIsResponse {
	return &apitype.WhoIsResponse{
		Node:        &tailcfg.Node{Name: "phone.example.ts.net."},
		UserProfile: &tailcfg.UserProfile{LoginName: "mallory@example.com"},
	}
}

// NewNode returns a node that answers every question about a peer with who and err.
func NewNode(who *apitype.WhoIsResponse, err error) *tailnet.Node {
	return &tailnet.Node{
		Name:  "k8s",
		Addrs: func() (ip4, ip6 netip.Addr) { return netip.MustParseAddr(NodeAddr), netip.Addr{} },
		Status: func(context.Context) (tailnet.Status, error) {
			return tailnet.Status{State: "Running"}, nil
		},
		DNSName: func(context.Context) (string, error) { return "k8s.example.ts.net", nil },
		Ask: func(_ context.Context, remote, local netip.Addr) (*apitype.WhoIsResponse, error) {
			if local != netip.MustParseAddr(NodeAddr) {
				return nil, fmt.Errorf("asked with the local address %v; want %v", local, NodeAddr)
			}
			return who, err
		},
	}
}

// AliceNode returns a node that knows alice as a member of tailnet-readers.
func AliceNode() *tailnet.Node { return NewNode(WhoIs(Readers), nil) }

// SilentNode returns a node that must not be asked who a peer is.
func SilentNode(t testing.TB) *tailnet.Node {
	n := AliceNode()
	n.Ask = func(context.Context, netip.Addr, netip.Addr) (*apitype.WhoIsResponse, error) {
		t.Error("the node was asked who the peer is")
		return nil, errors.New("must not be asked")
	}
	return n
}

// ChangingNode is a node whose answers a test can change.
type ChangingNode struct {
	*tailnet.Node
	mu    sync.Mutex
	who   *apitype.WhoIsResponse
	err   error
	asked int
}

// NewChangingNode returns a node that knows alice as a member of tailnet-readers.
func NewChangingNode() *ChangingNode {
	c := &ChangingNode{Node: AliceNode(), who: WhoIs(Readers)}
	c.Ask = func(context.Context, netip.Addr, netip.Addr) (*apitype.WhoIsResponse, error) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.asked++
		return c.who, c.err
	}
	return c
}

// Says changes the answer.
func (c *ChangingNode) Says(who *apitype.WhoIsResponse, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.who, c.err = who, err
}

// Asked returns how often the node was asked.
func (c *ChangingNode) Asked() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.asked
}
