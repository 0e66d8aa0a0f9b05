// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// Caller is who sent a request, and as whom it is forwarded.
type Caller struct {
	// Identity is the identity that the request is forwarded with. It is shared
	// among requests, and must not be modified.
	Identity *impersonate.Identity
	// Peer is what the tailnet node said about the caller's device.
	Peer *impersonate.Peer
	// Conn is the connection that the request came on.
	Conn *tailnet.Conn
	// Node is the tailnet node that accepted Conn. Recorders are dialled as this node.
	Node *tailnet.Node
}
