// SPDX-License-Identifier: Apache-2.0

// Package recorder is a client of the session recorders of a tailnet, such as
// Tailscale's tsrecorder. It uploads sessions ([Client.Upload]) and sends events
// ([Client.Send]).
//
// Recorders are dialled as the tailnet node that the caller connected to, and only
// at addresses of its tailnet. A recorder that hangs delays one request, not each: the
// client remembers it for a while.
package recorder

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

const (
	// timeout is how long all recorders together may take to answer. A recorder that
	// did not answer within it is not asked again for as long.
	timeout = 5 * time.Second
	// idleTimeout is how long an unused connection to a recorder is kept.
	idleTimeout = 30 * time.Second
)

var (
	errNoAddress = errors.New("the caller's grants name no address of a recorder; a control server that knows recorders' tags puts it there")
	errHanging   = errors.New("all recorders timed out less than 5s ago")
)

// Client sends sessions and events to recorders. Its zero value is ready for use.
type Client struct {
	mu    sync.Mutex
	nodes map[*tailnet.Node]*nodeClient
}

// dialFunc connects to an address of the tailnet.
type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// nodeClient is the part of a Client that dials as one node. Different tailnets may
// use the same addresses, so nodes share nothing.
type nodeClient struct {
	dial   dialFunc
	events *http.Transport
	memory memory
}

// as returns the part of c that dials as node.
func (c *Client) as(node *tailnet.Node) *nodeClient {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, ok := c.nodes[node]
	if !ok {
		if c.nodes == nil {
			c.nodes = make(map[*tailnet.Node]*nodeClient)
		}
		n = &nodeClient{
			dial:   node.Dial,
			events: &http.Transport{DialContext: node.Dial, MaxIdleConnsPerHost: 16, IdleConnTimeout: idleTimeout, DisableCompression: true},
		}
		c.nodes[node] = n
	}
	return n
}

// Close closes idle connections. Uploads in progress go on.
func (c *Client) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, n := range c.nodes {
		n.events.CloseIdleConnections()
	}
}
