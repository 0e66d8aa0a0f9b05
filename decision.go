// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"net/http"
	"strings"

	"github.com/caddyserver/caddy/v2"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

// placeholders starts the names of those that the handler sets.
const placeholders = "http.tailscale_impersonate."

// decision is what was decided about a caller. It is made once and used for many
// requests, so what each of them needs is ready in it, and it does not change.
type decision struct {
	identity impersonate.Identity
	// user is identity.User, for a replacer.
	user any
	// values are those of the placeholders, by the end of their names, and get
	// finds them.
	values map[string]any
	get    caddy.ReplacerFunc
}

func newDecision(id impersonate.Identity) *decision {
	d := &decision{identity: id, user: id.User, values: map[string]any{
		"user":   id.User,
		"groups": strings.Join(id.Groups, ","),
		"node":   id.Node,
		"source": string(id.Source),
	}}
	d.get = func(key string) (any, bool) {
		name, ok := strings.CutPrefix(key, placeholders)
		if !ok {
			return nil, false
		}
		value, ok := d.values[name]
		return value, ok
	}
	return d
}

// setPlaceholders tells the config and the access log who the caller is. The
// values are set and never expanded: a group named {env.SECRET} stays that.
func (d *decision) setPlaceholders(r *http.Request) {
	repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return
	}
	// Set, as another handler may have said by its means who the user is.
	repl.Set("http.auth.user.id", d.user)
	if _, again := impersonate.FromContext(r.Context()); !again {
		repl.Map(d.get)
		return
	}
	// The first of two handlers has mapped them, and what is set goes before.
	for name, value := range d.values {
		repl.Set(placeholders+name, value)
	}
}
