// SPDX-License-Identifier: Apache-2.0

// Package admin adds an endpoint to Caddy's admin API that lists, explains and drops
// callers.
package admin

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/app"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

func init() {
	caddy.RegisterModule(new(Admin))
}

// peersPath is the path of the endpoint.
const peersPath = "/tailscale_impersonate/peers"

// Admin is an endpoint of Caddy's admin API for the callers of this module. It is
// always mounted:
//
//   - `GET /tailscale_impersonate/peers` lists the recent callers, with their
//     identities and open requests.
//   - `GET /tailscale_impersonate/peers/<peer>` asks the tailnet nodes about one peer,
//     which need not have called, and says where each of its groups comes from.
//   - `DELETE /tailscale_impersonate/peers/<peer>` forgets a caller and ends its open
//     requests. It may call again: only the policy file keeps it out.
//
// A peer is given by its address, its node ID or its tailnet name.
type Admin struct{}

// CaddyModule returns the Caddy module information.
func (*Admin) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "admin.api.tailscale_impersonate",
		New: func() caddy.Module { return new(Admin) },
	}
}

// Routes returns the routes of the admin API. Caddy checks who may use it.
func (a *Admin) Routes() []caddy.AdminRoute {
	return []caddy.AdminRoute{
		{Pattern: peersPath, Handler: caddy.AdminHandlerFunc(a.list)},
		{Pattern: peersPath + "/", Handler: caddy.AdminHandlerFunc(a.one)},
	}
}

// peer is a caller, as the admin API lists it.
type peer struct {
	ID      string         `json:"id,omitempty"`
	Node    string         `json:"node"`
	Address netip.Addr     `json:"address"`
	User    string         `json:"user"`
	Groups  []string       `json:"groups,omitempty"`
	Source  string         `json:"source"`
	Proxy   string         `json:"proxy,omitempty"`
	Asked   *time.Time     `json:"asked,omitempty"`
	Age     string         `json:"age,omitempty"`
	Open    map[string]int `json:"open"`

	local netip.Addr
}

// is reports whether name, given by an operator, means p.
func (p *peer) is(name string) bool {
	if addr, err := netip.ParseAddr(name); err == nil {
		return p.Address == addr.Unmap()
	}
	label, _, _ := strings.Cut(p.Node, ".")
	return name != "" && (name == p.ID || strings.EqualFold(name, p.Node) || strings.EqualFold(name, label))
}

// peers returns every caller that is cached or has open requests.
func peers(process *app.Process) []*peer {
	// Two tailnets may give the same addresses to different devices.
	type key struct {
		remote, local netip.Addr
		device        string
	}
	index := make(map[key]*peer)
	all := []*peer{} // not nil, which would be null in JSON
	for _, a := range process.Running() {
		a.Cached(func(remote, local netip.Addr, caller *authn.Caller) {
			id := caller.Identity
			at := key{remote, local, id.Node}
			p := index[at]
			switch {
			case p == nil:
				p = &peer{Address: remote, local: local, Open: make(map[string]int)}
				index[at] = p
				all = append(all, p)
			case p.Asked.After(caller.Asked):
				return
			}
			asked := caller.Asked
			p.ID, p.Node, p.Proxy = string(caller.Peer.NodeID), id.Node, caller.Node.Name
			p.User, p.Groups, p.Source = id.User, id.Groups, string(id.Source)
			p.Asked, p.Age = &asked, time.Since(asked).Round(time.Millisecond).String()
		})
	}
	for _, c := range process.Requests.Clients() {
		p := index[key{c.Remote, c.Local, c.Identity.Node}]
		if p == nil { // its config is gone, or the cache has dropped it
			p = &peer{Address: c.Remote, local: c.Local, Node: c.Identity.Node, Open: make(map[string]int)}
			p.User, p.Groups, p.Source = c.Identity.User, c.Identity.Groups, string(c.Identity.Source)
			all = append(all, p)
		}
		for kind, n := range c.Open {
			p.Open[kind.String()] = n
		}
	}
	slices.SortFunc(all, func(a, b *peer) int {
		if n := a.Address.Compare(b.Address); n != 0 {
			return n
		}
		return a.local.Compare(b.local)
	})
	return all
}

func (a *Admin) list(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodGet {
		return methodNotAllowed(r)
	}
	process := app.Acquire()
	defer process.Release()
	return writeJSON(w, map[string]any{"peers": peers(process)})
}

func (a *Admin) one(w http.ResponseWriter, r *http.Request) error {
	name := strings.TrimPrefix(r.URL.Path, peersPath+"/")
	if name == "" || strings.Contains(name, "/") {
		return notFound(errors.New("say which peer: by its address, its node ID or its tailnet name"))
	}
	process := app.Acquire()
	defer process.Release()
	switch r.Method {
	case http.MethodGet:
		return explain(w, r, process, name)
	case http.MethodDelete:
		return drop(w, process, name)
	}
	return methodNotAllowed(r)
}

// explain asks every node of the running config about a peer.
func explain(w http.ResponseWriter, r *http.Request, process *app.Process, name string) error {
	explanations := []*whoami.Facts{}
	var failures []error
	for _, a := range process.Running() {
		facts, err := a.ExplainPeer(r.Context(), name)
		explanations = append(explanations, facts...)
		if err != nil {
			failures = append(failures, err)
		}
	}
	if len(explanations) == 0 {
		failures = append(failures, fmt.Errorf("no tailnet node of the running config knows a peer %q", clip.String(name)))
		return notFound(errors.Join(failures...))
	}
	return writeJSON(w, map[string]any{"peers": explanations})
}

// drop forgets a caller and ends its requests.
func drop(w http.ResponseWriter, process *app.Process, name string) error {
	var dropped []*peer
	for _, p := range peers(process) {
		if !p.is(name) {
			continue
		}
		for _, a := range process.Running() {
			a.Forget(p.Address, p.local)
		}
		p.Open = make(map[string]int)
		for kind, n := range process.Requests.Drop(p.Address, p.local, p.Node, "an operator has dropped "+p.User) {
			p.Open[kind.String()] = n
		}
		dropped = append(dropped, p)
	}
	if len(dropped) == 0 {
		return notFound(fmt.Errorf("no caller %q is remembered", clip.String(name)))
	}
	return writeJSON(w, map[string]any{"dropped": dropped})
}

func writeJSON(w http.ResponseWriter, v any) error {
	w.Header().Set("Content-Type", "application/json")
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(v)
}

func methodNotAllowed(r *http.Request) error {
	return caddy.APIError{HTTPStatus: http.StatusMethodNotAllowed, Err: fmt.Errorf("method %s is not allowed", clip.String(r.Method))}
}

func notFound(err error) error {
	return caddy.APIError{HTTPStatus: http.StatusNotFound, Err: err}
}

// Interface guards
var (
	_ caddy.Module      = (*Admin)(nil)
	_ caddy.AdminRouter = (*Admin)(nil)
)
