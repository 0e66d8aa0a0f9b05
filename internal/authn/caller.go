// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"net/http"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

const (
	// placeholderPrefix starts the names of the handler's own placeholders.
	placeholderPrefix = "http.tailscale_impersonate."
	// userID is the placeholder that Caddy's authentication handlers set.
	userID = "http.auth.user.id"
)

// Caller is who sent a request, and as whom it is forwarded.
type Caller struct {
	// Identity is the identity that the request is forwarded with. Requests share it;
	// do not modify it.
	Identity *impersonate.Identity
	// Peer is what the tailnet node said about the caller's device.
	Peer *impersonate.Peer
	// Node is the tailnet node that accepted Conn. Recorders are dialled as this node.
	Node *tailnet.Node
	// Conn is the connection that the request came on.
	Conn *tailnet.Conn
	// Asked is when the node was asked who the peer is.
	Asked time.Time

	// placeholders finds the values of the caller's placeholders, by name.
	placeholders map[string]any
	lookUp       caddy.ReplacerFunc
}

// newCaller returns the caller that a peer is, without a connection. It is made once
// and cached, and must not change.
func newCaller(node *tailnet.Node, peer impersonate.Peer, id impersonate.Identity, asked time.Time) *Caller {
	c := &Caller{Identity: &id, Peer: &peer, Node: node, Asked: asked, placeholders: map[string]any{
		userID:                       id.User,
		placeholderPrefix + "user":   id.User,
		placeholderPrefix + "groups": strings.Join(id.Groups, ","),
		placeholderPrefix + "login":  peer.Login,
		placeholderPrefix + "node":   id.Node,
		placeholderPrefix + "source": string(id.Source),
	}}
	c.lookUp = func(key string) (any, bool) {
		value, ok := c.placeholders[key]
		return value, ok
	}
	return c
}

// forRequest returns the identity that r is forwarded with: id, with what is r's own,
// if there is any: its ID in the API server's audit log, and the user to act as.
func (a *Authenticator) forRequest(r *http.Request, id *impersonate.Identity, actAs *impersonate.ActAsRequest) *impersonate.Identity {
	if !a.Audit && actAs == nil {
		return id
	}
	own := *id
	if a.Audit {
		own.RequestID = apistatus.RequestID(r)
	}
	own.ActAs = actAs
	if a.recordsTarget(actAs) && !own.Recording.Enforce {
		own.Recording.Enforce, own.Recording.ByGroup = true, true
	}
	return &own
}

// SetPlaceholders tells the config and the access log who the caller is. Values are
// never expanded: a group named {env.SECRET} stays that.
func (c *Caller) SetPlaceholders(r *http.Request) {
	repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return
	}
	if _, taken := repl.Get(userID); !taken {
		repl.Map(c.lookUp)
		return
	}
	// Another handler has set the user. Values that are set win over functions.
	for name, value := range c.placeholders {
		repl.Set(name, value)
	}
}
