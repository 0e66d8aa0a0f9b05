// SPDX-License-Identifier: Apache-2.0

package authn

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

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

// lookupTimeout is how long a node may take to list its peers.
const lookupTimeout = 5 * time.Second

// Explain returns what the caller of r is told about itself, or why it is told
// nothing. r passes the checks of every request; a peer that is known and refused is
// told why. The visitor is the caller, for other sites of this Caddy.
func (a *Authenticator) Explain(r *http.Request) (*whoami.Facts, Visitor, error) {
	if err := checkProtocol(r); err != nil {
		return nil, Visitor{}, err
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return nil, Visitor{}, apistatus.MethodNotAllowed(apistatus.Method, "method %s is not supported for %s", clip.String(r.Method), clip.String(r.URL.Path))
	}
	if err := a.checkOrigin(r, isWhoami); err != nil {
		return nil, Visitor{}, err
	}
	arrived, err := a.accepted(r)
	if err != nil {
		return nil, Visitor{}, err
	}
	res, err := a.who(r.Context(), arrived)
	if err != nil {
		return nil, Visitor{}, err
	}
	facts, err := a.facts(res)
	return facts, Visitor{Address: res.key.remote, device: res.device, since: arrived.conn.Accepted}, err
}

// ExplainPeer returns what each of the server's nodes, and its configuration, says
// about a peer, which is given by its address, its node ID or its tailnet name. What it
// says to who dials a Tailscale Service comes after that: grants can be for the service
// alone. The error says what could not be found out.
func (a *Authenticator) ExplainPeer(ctx context.Context, name string) (all []*whoami.Facts, err error) {
	select {
	case <-a.ready:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	for _, node := range a.nodes {
		addrs, lookupErr := addressesOf(ctx, node, name)
		if lookupErr != nil {
			err = errors.Join(err, fmt.Errorf("tailnet node %q: %w", node.Name, lookupErr))
			continue
		}
		ip4, ip6 := node.Addrs()
		told := make(map[string]bool) // by the service, none for the node itself
		for _, addr := range addrs {
			for _, local := range append([]netip.Addr{ip4, ip6}, node.ServiceAddrs()...) {
				service := node.ServiceAt(local)
				// The device's other address is the same device's; only grants that name
				// an address can differ.
				if !local.IsValid() || addr.Is6() != local.Is6() || told[service] {
					continue
				}
				facts, refused := a.facts(a.resolve(ctx, peerKey{node, addr, netip.AddrPortFrom(local, 0)}))
				if refused != nil {
					err = errors.Join(err, refused, apistatus.Cause(refused)) // for an operator
					continue
				}
				facts.Listen = a.Listen
				all = append(all, facts)
				told[service] = true
			}
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

// facts explains the identity of a peer. It is an error if the peer is unknown, or its
// node has not answered. That a known peer is refused is one of the facts.
func (a *Authenticator) facts(res *resolution) (*whoami.Facts, error) {
	f := &whoami.Facts{
		Address:  res.key.remote.String(),
		Proxy:    res.key.node.Name,
		Service:  res.key.node.ServiceAt(res.key.dialled.Addr()),
		LooksFor: string(a.Capabilities[0]),
	}
	if res.err != nil {
		refusal := res.refusal(a.CacheTTL)
		status, ok := apistatus.From(refusal)
		switch {
		case !ok:
			return nil, res.key.noAnswer(res.err)
		case res.peer.Node == "" && res.peer.Login == "":
			return nil, refusal
		}
		f.Refused, f.Reason = status.Message, string(apistatus.ReasonOf(res.err))
	} else {
		f.User = res.identity.User
		f.Source = string(res.identity.Source)
		f.Recording = a.recording(res)
	}
	peer := &res.peer
	f.ID, f.Device, f.Login, f.Tags, f.Shared = string(peer.NodeID), peer.Node, peer.Login, peer.Tags, peer.Shared
	f.Capability, f.TagsLeftOut = string(res.explanation.Capability), res.explanation.TagsLeftOut
	for _, grant := range res.explanation.Grants {
		f.Grants = append(f.Grants, whoami.Grant{Value: json.RawMessage(grant.Value), Groups: grant.Groups, Problems: grant.Problems})
	}
	for _, group := range res.identity.Groups {
		f.Groups = append(f.Groups, whoami.Group{Name: group, Grants: res.grantsOf(strings.TrimPrefix(group, a.Limits.GroupPrefix))})
	}
	for _, group := range res.identity.HeldBack {
		f.HeldBack = append(f.HeldBack, whoami.Group{Name: group, Grants: res.grantsOf(strings.TrimPrefix(group, a.Limits.GroupPrefix))})
	}
	if group := a.Limits.GroupPrefix + a.ReadOnlyGroup; a.ReadOnlyGroup != "" && slices.Contains(slices.Concat(res.identity.Groups, res.identity.HeldBack), group) {
		f.ReadOnly = group
	}
	for _, group := range res.removed {
		f.Cut = append(f.Cut, whoami.Cut{Name: group, Option: a.Limits.RemovedBy(group), Grants: res.grantsOf(group)})
	}
	return f, nil
}

// grantsOf returns the numbers, from 1, of the grants that give a group.
func (res *resolution) grantsOf(group string) (numbers []int) {
	for i, grant := range res.explanation.Grants {
		if slices.Contains(grant.Groups, group) {
			numbers = append(numbers, i+1)
		}
	}
	return numbers
}

// recording returns whether the caller's sessions and requests are recorded.
func (a *Authenticator) recording(res *resolution) whoami.Recording {
	granted := &res.identity.Recording
	r := whoami.Recording{
		Wanted:   granted.Wanted() || a.RecordsFiles,
		Files:    a.RecordsFiles,
		Enforced: granted.Enforce,
		Requests: granted.Events || a.LogsEvents,
	}
	for _, recorder := range granted.Recorders {
		r.Recorders = append(r.Recorders, recorder.String())
	}
	return r
}
