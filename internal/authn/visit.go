// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	tskey "tailscale.com/types/key"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

// Visitor is a device that has sent a request to one site, for the other sites of the same
// Caddy to recognize.
//
// Sites may be on different tailnets, which give out the same addresses and the same node
// IDs. No two devices have the same node key, and the visitor has proved that it has the
// key: with it, its connection is encrypted.
type Visitor struct {
	// Address is its address, at the site that it has sent the request to.
	Address netip.Addr
	device  tskey.NodePublic
	// since is when its connection was accepted. What was said earlier about the address
	// may be about another device.
	since time.Time
}

// Door is where a visitor could knock at a site.
type Door struct {
	Host string // empty for the name of the tailnet node
	Port uint16
	TLS  bool
	// Service is the name of the Tailscale Service that the site has there, empty for the
	// node's own address.
	Service string
}

// Welcome is what a visitor finds at a site.
type Welcome struct {
	Facts *whoami.Facts
	// Host is the name to use, and Local the address that the site has.
	Host  string
	Local netip.AddrPort
}

// Visit returns what a visitor finds at a's site, which lets it in at that door. It is nil
// if the visitor has no identity there, or cannot connect. An error means that this is
// unknown, as a node has not answered. What a's node says comes from the cache, as for
// requests.
func (a *Authenticator) Visit(ctx context.Context, visitor Visitor, door Door) (*Welcome, error) {
	select {
	case <-a.ready:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if visitor.device.IsZero() {
		return nil, nil // it could not be told from another
	}
	var failures []error
	for _, node := range a.behind(ctx, door.Host) {
		welcome, err := a.visitAt(ctx, node, visitor, door)
		if welcome != nil {
			return welcome, nil
		}
		if err != nil {
			failures = append(failures, fmt.Errorf("tailnet node %q: %w", node.Name, err))
		}
	}
	return nil, errors.Join(failures...)
}

// behind returns the nodes that a connection to host may lead to.
func (a *Authenticator) behind(ctx context.Context, host string) tailnet.Nodes {
	if host == "" || len(a.nodes) < 2 {
		return a.nodes
	}
	for _, node := range a.nodes {
		if owns, err := node.Owns(ctx, host); err == nil && owns {
			return tailnet.Nodes{node}
		}
	}
	return a.nodes // DNS may say that it is any of them
}

// dialled returns the address that the visitor would dial to get to door at node. It is not
// ok if the door does not lead there. An error means that this is unknown.
func dialled(ctx context.Context, node *tailnet.Node, visitor Visitor, door Door) (local netip.Addr, ok bool, err error) {
	if door.Host != "" {
		if ok, err := node.LeadsTo(ctx, door.Host, door.Service); !ok || err != nil {
			return netip.Addr{}, false, err
		}
	}
	if door.Service == "" {
		if node.ServicesOnly {
			return netip.Addr{}, false, nil
		}
		ip4, ip6 := node.Addrs()
		if visitor.Address.Is6() {
			return ip6, true, nil
		}
		return ip4, true, nil
	}
	addrs, ok := node.Hosts(door.Service, door.Port)
	if !ok {
		return netip.Addr{}, false, nil
	}
	for _, addr := range addrs {
		if addr.Is6() == visitor.Address.Is6() {
			return addr, true, nil
		}
	}
	// Another node may host it. But this node tells grants by the service's address, which
	// it does not have.
	return netip.Addr{}, false, fmt.Errorf("the Tailscale Service %q has no address here that the visitor could dial", door.Service)
}

// visitAt is [Authenticator.Visit] at one of the site's nodes.
func (a *Authenticator) visitAt(ctx context.Context, node *tailnet.Node, visitor Visitor, door Door) (*Welcome, error) {
	local, ok, err := dialled(ctx, node, visitor, door)
	if !ok || err != nil {
		return nil, err
	}
	owner, err := a.nodes.Accepting(local)
	switch {
	case errors.Is(err, tailnet.ErrNotConnected):
		return nil, err
	case err != nil || owner != node:
		return nil, nil // the site refuses everybody at this address
	}
	at := netip.AddrPortFrom(local, door.Port)
	answer, err := a.peers.since(ctx, peerKey{node, visitor.Address, at}, visitor.since)
	if err != nil {
		return nil, err
	}
	res := answer.value
	if res.err != nil || res.device != visitor.device {
		return nil, nil
	}
	host := door.Host
	if host == "" {
		if door.Service != "" {
			host, err = node.ServiceFQDN(ctx, door.Service)
		} else {
			host, err = node.FQDN(ctx)
		}
		if host == "" || err != nil {
			return nil, err
		}
	}
	if !door.TLS && !slices.Contains(a.AllowHosts, tailnet.Hostname(host)) {
		// As checkHost does.
		if owns, err := node.Owns(ctx, host); !owns || err != nil {
			return nil, err
		}
	}
	facts, err := a.facts(res)
	if err != nil {
		return nil, err
	}
	return &Welcome{Facts: facts, Host: host, Local: at}, nil
}
