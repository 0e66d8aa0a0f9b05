// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"net/http/httptest"
	"net/netip"
	"sync"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
)

// control is Tailscale's own control server for tests, with made-up peers, which
// Headscale cannot have. They stand for a tailnet of ten thousand devices.
type control struct {
	server *testcontrol.Server
	http   *httptest.Server

	mu      sync.Mutex
	granted netip.Addr
	changed chan struct{} // closed when there is an update for the nodes
}

// startControl starts a control server with n made-up peers. Its nodes use another
// server's relay.
func startControl(n int, relay *tailcfg.DERPMap) *control {
	c := &control{changed: make(chan struct{})}
	c.server = &testcontrol.Server{
		Logf:         func(string, ...any) {},
		DERPMap:      relay,
		AllOnline:    true,
		AltMapStream: c.serve,
	}
	for range n {
		c.server.AddFakeNode()
	}
	c.http = httptest.NewUnstartedServer(c.server)
	c.server.HTTPTestServer = c.http
	c.http.Start()
	return c
}

func (c *control) url() string { return c.http.URL }

func (c *control) stop() {
	// Close would wait for polls that nodes keep open.
	_ = c.http.Listener.Close()
	c.http.CloseClientConnections()
}

// grant grants the peer with that address system:masters.
func (c *control) grant(addr netip.Addr) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.granted = addr
	c.tell()
}

// tell sends the changes to all nodes. c.mu must be held.
func (c *control) tell() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// serve answers a node's poll: at once if it only reports something, otherwise for
// as long as the node listens.
func (c *control) serve(ctx context.Context, w testcontrol.MapStreamWriter, req *tailcfg.MapRequest) {
	if !req.Stream {
		if node := c.server.Node(req.NodeKey); node != nil {
			node.Endpoints, node.DiscoKey, node.Cap = req.Endpoints, req.DiscoKey, req.Version
			if req.Hostinfo != nil {
				node.Hostinfo = req.Hostinfo.View()
				if info := req.Hostinfo.NetInfo; info != nil {
					node.HomeDERP = info.PreferredDERP
				}
			}
			c.server.UpdateNode(node)
			c.mu.Lock()
			c.tell()
			c.mu.Unlock()
		}
		_ = w.SendMapMessage(&tailcfg.MapResponse{})
		return
	}
	for {
		c.mu.Lock()
		changed := c.changed
		c.mu.Unlock()
		resp, err := c.server.MapResponse(req)
		if err != nil || resp == nil {
			return
		}
		resp.PacketFilter = append(resp.PacketFilter, c.grants()...)
		if w.SendMapMessage(resp) != nil {
			return
		}
	waiting:
		for {
			select {
			case <-ctx.Done():
				return
			case <-changed:
				break waiting
			case <-time.After(50 * time.Second):
				if w.SendMapMessage(&tailcfg.MapResponse{KeepAlive: true}) != nil {
					return
				}
			}
		}
	}
}

// grants returns one rule for each made-up peer, and one for the peer that is
// granted system:masters.
func (c *control) grants() (rules []tailcfg.FilterRule) {
	c.mu.Lock()
	granted := c.granted
	c.mu.Unlock()
	rule := func(src netip.Addr, groups string) tailcfg.FilterRule {
		return tailcfg.FilterRule{SrcIPs: []string{src.String()}, CapGrant: []tailcfg.CapGrant{{
			Dsts:   []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")},
			CapMap: tailcfg.PeerCapMap{tailcfg.PeerCapabilityKubernetes: {tailcfg.RawMessage(`{"impersonate":{"groups":["` + groups + `"]}}`)}},
		}}}
	}
	for _, node := range c.server.AllNodes() {
		if node.Hostinfo.Valid() || len(node.Addresses) == 0 {
			continue // not made up
		}
		rules = append(rules, rule(node.Addresses[0].Addr(), "tailnet-readers"))
	}
	if granted.IsValid() {
		rules = append(rules, rule(granted, "system:masters"))
	}
	return rules
}
