// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"net/http"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apievents"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/sessionrecording"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

const (
	// placeholders starts the names of those that are the handler's own.
	placeholders = "http.tailscale_impersonate."
	// userID is Caddy's, for whatever authenticates.
	userID = "http.auth.user.id"
)

// decision is what was decided about a caller. It is made once and used for many
// requests, so what each of them needs is ready in it, and it does not change.
type decision struct {
	identity impersonate.Identity
	// peer is what that was decided on.
	peer impersonate.Peer
	// node is the tailnet node that was asked who the caller is, asked is when,
	// and by is the handler that decided what follows from that.
	node  *tailnet.Node
	asked time.Time
	by    *Handler
	// values are those of the placeholders, and get finds them.
	values map[string]any
	get    caddy.ReplacerFunc
	// allowed counts the requests that are sent on because of it.
	allowed prometheus.Counter
	// drops is how often callers had been dropped when the node was asked.
	drops uint64
}

func newDecision(by *Handler, node *tailnet.Node, peer impersonate.Peer, id impersonate.Identity, asked time.Time, drops uint64) *decision {
	d := &decision{identity: id, peer: peer, node: node, asked: asked, by: by, allowed: allowed[id.Source], drops: drops, values: map[string]any{
		userID:                  id.User,
		placeholders + "user":   id.User,
		placeholders + "groups": strings.Join(id.Groups, ","),
		placeholders + "login":  peer.Login,
		placeholders + "node":   id.Node,
		placeholders + "source": string(id.Source),
	}}
	d.get = func(key string) (any, bool) {
		value, ok := d.values[key]
		return value, ok
	}
	return d
}

// caller returns who the caller is to whoever records its sessions.
func (d *decision) caller(conn *tailnet.Conn) sessionrecording.Caller {
	return sessionrecording.Caller{Peer: &d.peer, Recording: &d.identity.Recording, Remote: conn.Remote, Dial: d.node.Dial}
}

// source returns who an event is about, in a request that is sent on as id.
func (d *decision) source(conn *tailnet.Conn, id *impersonate.Identity) apievents.Caller {
	return apievents.Caller{Peer: &d.peer, Identity: id, Remote: conn.Remote, Node: d.node}
}

// setPlaceholders tells the config and the access log who the caller is. The
// values are set and never expanded: a group named {env.SECRET} stays that.
func (d *decision) setPlaceholders(r *http.Request) {
	repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return
	}
	if _, taken := repl.Get(userID); !taken {
		repl.Map(d.get)
		return
	}
	// Another handler has said who the user is, and what is set goes before what
	// is mapped.
	for name, value := range d.values {
		repl.Set(name, value)
	}
}
