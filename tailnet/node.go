// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"tailscale.com/client/local"
	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/tsnet"
)

// WhoIsTimeout bounds one question to a node. A node answers from memory within
// a tenth of a millisecond; one that does not is stuck. The bound is short
// because client-go asks eleven times, a second apart, before it tells its user why.
const WhoIsTimeout = 250 * time.Millisecond

var (
	// ErrPeerNotFound is returned by [Node.WhoIs] for an address that is no
	// peer's.
	ErrPeerNotFound = local.ErrPeerNotFound
	// ErrSelf is returned by [Node.WhoIs] if the peer is the node itself: to
	// WhoIs it is a peer like any other, but whoever can dial from the proxy's
	// own host must not be taken for the proxy.
	ErrSelf = errors.New("the peer is the answering node itself")
)

// Node is a tailnet node that a server listens on.
type Node struct {
	// Name is the hostname the node was configured with. It is for messages
	// only: the name the tailnet gives it can differ (see [Node.Owns]).
	Name string

	// Addrs returns the node's current tailnet addresses.
	Addrs func() []netip.Addr

	// Ask returns who the peer at remote is, with the capabilities that it was
	// granted on local. It returns [ErrPeerNotFound] if there is no such peer.
	Ask func(ctx context.Context, remote netip.AddrPort, local netip.Addr) (*apitype.WhoIsResponse, error)

	// DNSName returns the name that the tailnet gives to the node
	// ("k8s.example.ts.net"), empty if it gives none.
	DNSName func(ctx context.Context) (string, error)

	// lastName is the last result of DNSName.
	lastName atomic.Pointer[string]
}

// FromServer returns the node that s is.
func FromServer(s *tsnet.Server) *Node {
	return &Node{
		Name: s.Hostname,
		Addrs: func() []netip.Addr {
			ip4, ip6 := s.TailscaleIPs()
			return []netip.Addr{ip4, ip6}
		},
		Ask: func(ctx context.Context, remote netip.AddrPort, local netip.Addr) (*apitype.WhoIsResponse, error) {
			lc, err := s.LocalClient()
			if err != nil {
				return nil, err
			}
			return lc.WhoIsForIP(ctx, remote.String(), local)
		},
		DNSName: func(ctx context.Context) (string, error) {
			lc, err := s.LocalClient()
			if err != nil {
				return "", err
			}
			status, err := lc.StatusWithoutPeers(ctx)
			if err != nil {
				return "", err
			}
			if status.Self == nil {
				return "", errors.New("the node does not know itself yet")
			}
			return strings.TrimSuffix(status.Self.DNSName, "."), nil
		},
	}
}

// WhoIs returns who is at the other end of c, with the capabilities that the
// peer was granted on the address that it dialled. Errors are [ErrPeerNotFound],
// [ErrSelf], or a failure of the node to answer within [WhoIsTimeout].
func (n *Node) WhoIs(ctx context.Context, c Conn) (*apitype.WhoIsResponse, error) {
	if n.Is(c.Remote.Addr()) {
		return nil, ErrSelf
	}
	ctx, cancel := context.WithTimeout(ctx, WhoIsTimeout)
	defer cancel()
	return n.Ask(ctx, c.Remote, c.Local)
}

// Is reports whether addr is one of the node's own addresses.
func (n *Node) Is(addr netip.Addr) bool {
	return addr.IsValid() && slices.Contains(n.Addrs(), addr)
}

// Owns reports whether host, as it stands in a request's Host header, names this
// node: its tailnet name, the first label of that, or one of its addresses, each
// with or without a port.
func (n *Node) Owns(ctx context.Context, host string) (bool, error) {
	host = Hostname(host)
	if addr, err := netip.ParseAddr(host); err == nil {
		return n.Is(addr.Unmap()), nil
	}
	if name := n.lastName.Load(); name != nil && names(*name, host) {
		return true, nil
	}
	ctx, cancel := context.WithTimeout(ctx, WhoIsTimeout)
	defer cancel()
	name, err := n.DNSName(ctx)
	if err != nil {
		return false, fmt.Errorf("asking node %q for its own name: %w", n.Name, err)
	}
	n.lastName.Store(&name)
	return names(name, host), nil
}

// names reports whether host is the node name fqdn or its first label.
func names(fqdn, host string) bool {
	fqdn = strings.ToLower(fqdn)
	label, _, _ := strings.Cut(fqdn, ".")
	return host != "" && (host == fqdn || host == label)
}

// Hostname returns the host part of a Host header or host:port, in lower case,
// without brackets and without a final dot.
func Hostname(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	return strings.TrimSuffix(strings.ToLower(host), ".")
}
