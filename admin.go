// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoiscache"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/revocation"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

func init() {
	caddy.RegisterModule(new(Admin))
}

// peersPath is where the admin API has callers.
const peersPath = "/tailscale_impersonate/peers"

// Admin is an endpoint of Caddy's admin API that shows who calls. It is permanently
// mounted:
//
//   - `GET /tailscale_impersonate/peers` lists the callers that are remembered, with
//     what they were taken for and what they have open.
//   - `GET /tailscale_impersonate/peers/<peer>` asks the tailnet nodes about one
//     peer, which need not have called, and says where each of its groups comes from.
//   - `DELETE /tailscale_impersonate/peers/<peer>` forgets a caller and ends what it
//     has open. It may call again: what keeps it out is the policy file.
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

// Routes returns the routes of the admin API. Caddy has checked by then that the
// request may use it.
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

// is reports whether p is whom an operator calls that.
func (p *peer) is(name string) bool {
	if addr, err := netip.ParseAddr(name); err == nil {
		return p.Address == addr.Unmap()
	}
	label, _, _ := strings.Cut(p.Node, ".")
	return name != "" && (name == p.ID || strings.EqualFold(name, p.Node) || strings.EqualFold(name, label))
}

// peers returns everybody who is remembered or has something open.
func peers() []*peer {
	// Two tailnets may have given the same addresses to different devices.
	type key struct {
		remote, local netip.Addr
		device        string
	}
	index := make(map[key]*peer)
	var all []*peer
	for _, h := range running.all() {
		h.decisions.All(func(k whoiscache.Key, d *decision) {
			at := key{k.Remote, k.Local, d.identity.Node}
			p := index[at]
			switch {
			case p == nil:
				p = &peer{Address: k.Remote, local: k.Local, Open: make(map[string]int)}
				index[at] = p
				all = append(all, p)
			case p.Asked.After(d.asked):
				return
			}
			asked := d.asked
			p.ID, p.Node, p.Proxy = string(d.peer.NodeID), d.identity.Node, k.Node.Name
			p.User, p.Groups, p.Source = d.identity.User, d.identity.Groups, string(d.identity.Source)
			p.Asked, p.Age = &asked, time.Since(asked).Round(time.Millisecond).String()
		})
	}
	for _, c := range revocation.Callers() {
		p := index[key{c.Remote, c.Local, c.Identity.Node}]
		if p == nil { // its config is gone, or it has been silent for long
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
	return writeJSON(w, map[string]any{"peers": peers()})
}

func (a *Admin) one(w http.ResponseWriter, r *http.Request) error {
	name := strings.TrimPrefix(r.URL.Path, peersPath+"/")
	if name == "" || strings.Contains(name, "/") {
		return notFound(errors.New("say which peer: by its address, its node ID or its tailnet name"))
	}
	switch r.Method {
	case http.MethodGet:
		return explainPeer(w, r, name)
	case http.MethodDelete:
		return dropPeer(w, name)
	}
	return methodNotAllowed(r)
}

// explainPeer asks every node that a running handler listens on about a peer.
func explainPeer(w http.ResponseWriter, r *http.Request, name string) error {
	explanations := []*whoami.Facts{}
	var failures []error
	for _, h := range running.all() {
		facts, err := h.explainPeer(r.Context(), name)
		explanations = append(explanations, facts...)
		if err != nil {
			failures = append(failures, err)
		}
	}
	if len(explanations) == 0 {
		failures = append(failures, fmt.Errorf("no tailnet node of the running config knows a peer %q", name))
		return notFound(errors.Join(failures...))
	}
	return writeJSON(w, map[string]any{"peers": explanations})
}

// explainPeer returns what there is to say about a peer, for each of the nodes that
// h listens on.
func (h *Handler) explainPeer(ctx context.Context, name string) (all []*whoami.Facts, err error) {
	select {
	case <-h.ready:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	for _, node := range h.nodes {
		addrs, lookupErr := addressesOf(ctx, node, name)
		if lookupErr != nil {
			err = errors.Join(err, fmt.Errorf("tailnet node %q: %w", node.Name, lookupErr))
			continue
		}
		ip4, ip6 := node.Addrs()
		for _, addr := range addrs {
			local := ip4
			if addr.Is6() {
				local = ip6
			}
			if !local.IsValid() {
				continue
			}
			facts, refused := h.facts(ctx, whoiscache.Key{Node: node, Remote: addr, Local: local})
			if refused != nil {
				err = errors.Join(err, refused)
				continue
			}
			facts.Listen = h.listeners
			all = append(all, facts)
			break // the other address is the same device's, with the same grants but for those that name an address
		}
	}
	return all, err
}

// addressesOf returns the addresses that name stands for on node's tailnet.
func addressesOf(ctx context.Context, node *tailnet.Node, name string) ([]netip.Addr, error) {
	if addr, err := netip.ParseAddr(name); err == nil {
		return []netip.Addr{addr.Unmap()}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	return node.Lookup(ctx, name)
}

// lookupTimeout is how long a node may take to list its peers.
const lookupTimeout = 5 * time.Second

// dropPeer forgets a caller and ends its requests.
func dropPeer(w http.ResponseWriter, name string) error {
	var dropped []*peer
	for _, p := range peers() {
		if !p.is(name) {
			continue
		}
		for _, h := range running.all() {
			h.forget(p.Address, p.local)
		}
		p.Open = make(map[string]int)
		for kind, n := range revocation.Drop(p.Address, p.local, p.Node, "an operator has dropped "+p.User) {
			p.Open[kind.String()] = n
		}
		dropped = append(dropped, p)
	}
	if len(dropped) == 0 {
		return notFound(fmt.Errorf("no caller %q is remembered", name))
	}
	return writeJSON(w, map[string]any{"dropped": dropped})
}

// forget has the caller at remote asked about again before its next request.
func (h *Handler) forget(remote, local netip.Addr) {
	for _, node := range h.nodes {
		h.decisions.Forget(whoiscache.Key{Node: node, Remote: remote, Local: local})
	}
	h.drops.Add(1)
}

func writeJSON(w http.ResponseWriter, v any) error {
	w.Header().Set("Content-Type", "application/json")
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(v)
}

func methodNotAllowed(r *http.Request) error {
	return caddy.APIError{HTTPStatus: http.StatusMethodNotAllowed, Err: fmt.Errorf("method %s is not allowed", r.Method)}
}

func notFound(err error) error {
	return caddy.APIError{HTTPStatus: http.StatusNotFound, Err: err}
}

// Interface guards
var (
	_ caddy.Module      = (*Admin)(nil)
	_ caddy.AdminRouter = (*Admin)(nil)
)
