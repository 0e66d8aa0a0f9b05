// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"tailscale.com/client/local"
	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/ipn"
	"tailscale.com/net/tsaddr"
	"tailscale.com/tsnet"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/once"
)

// WhoIsTimeout bounds one question to a node. A node answers from memory within
// a tenth of a millisecond; one that does not is stuck. The bound is short
// because client-go asks eleven times, a second apart, before it tells its user why.
const WhoIsTimeout = 250 * time.Millisecond

var (
	// ErrPeerNotFound is returned by [Node.WhoIs] for an address of no peer.
	ErrPeerNotFound = local.ErrPeerNotFound
	// ErrSelf is returned by [Node.WhoIs] if the peer is the node itself. To WhoIs,
	// that is a peer like any other. But other processes can dial from the proxy's host,
	// and must not get the identity of its node.
	ErrSelf = errors.New("the peer is the answering node itself")

	// ErrNotConnected is returned by [Nodes.Accepting] while a node does not know its
	// own addresses.
	ErrNotConnected = errors.New("the node is not connected to its tailnet")
)

// Node is a tailnet node that a server listens on.
type Node struct {
	// Name is the hostname that the node asks for. It is for messages only: the name
	// that the tailnet gives the node can differ (see [Node.Owns]).
	Name string

	// Addrs returns the node's current tailnet addresses, each the zero Addr if
	// the node has none.
	Addrs func() (ip4, ip6 netip.Addr)

	// Ask returns who the peer at remote is, with the capabilities that it is granted on
	// local. It returns [ErrPeerNotFound] if there is no such peer. The answer must not
	// change later.
	Ask func(ctx context.Context, remote, local netip.Addr) (*apitype.WhoIsResponse, error)

	// Admits reports whether the node lets the peer at remote open a connection to
	// dialled. Nil if it cannot tell. Use [Node.WhoIs].
	Admits func(remote netip.Addr, dialled netip.AddrPort) (bool, error)

	// Lookup returns the addresses of the peers with this tailnet name, first label of
	// one, or node ID.
	Lookup func(ctx context.Context, name string) ([]netip.Addr, error)

	// DNSName returns the tailnet name of the node ("k8s.example.ts.net"), empty if it
	// has none.
	DNSName func(ctx context.Context) (string, error)

	// Services are the listeners of the server for Tailscale Services on the node.
	Services []Service
	// ServicesOnly is whether the server has no listener on the node's own addresses.
	ServicesOnly bool

	// Status returns how the node is connected to its tailnet.
	Status func(ctx context.Context) (Status, error)

	// DialPeer connects to an address of the tailnet, as the node. Use [Node.Dial].
	DialPeer func(ctx context.Context, network, address string) (net.Conn, error)

	// lastName is the last result of DNSName.
	lastName atomic.Pointer[nodeName]
	naming   once.Group[string, *nodeName]
}

// nodeName is the name of a node at the time when it was asked for.
type nodeName struct {
	name  string
	asked time.Time
}

// namePeriod is how long the name of a node counts in requests for other hosts. A client
// writes the host, and must not make the node answer each time.
const namePeriod = time.Second

// Status is how a node is connected to its tailnet.
type Status struct {
	// State is the state of the node, as Tailscale names it.
	State string
	// KeyExpiry is when the key of the node expires, zero if never or unknown.
	KeyExpiry time.Time
	// Health is what the node itself says is wrong.
	Health []string
	// DNSName is the tailnet name of the node, empty if it does not know.
	DNSName string
	// CertDomains are the names for which the tailnet's control server has certificates
	// issued. There are none unless an administrator turns that on.
	CertDomains []string
}

// Up reports whether peers can reach the node.
func (s Status) Up() bool { return s.State == ipn.Running.String() }

// Expired reports whether the key of the node has expired at now. Once the node has
// started anew, only its control server's answer says so.
func (s Status) Expired(now time.Time) bool {
	return !s.KeyExpiry.IsZero() && !now.Before(s.KeyExpiry) ||
		slices.ContainsFunc(s.Health, func(problem string) bool { return strings.Contains(problem, "NodeKeyExpired") })
}

// WorseThan reports whether a node with status s needs attention before one with other.
func (s Status) WorseThan(other Status) bool {
	if s.Up() != other.Up() {
		return other.Up()
	}
	return !s.KeyExpiry.IsZero() && (other.KeyExpiry.IsZero() || s.KeyExpiry.Before(other.KeyExpiry))
}

// FromServer returns the node of s.
func FromServer(s *tsnet.Server) *Node {
	addrs := func() (ip4, ip6 netip.Addr) {
		if s.Sys() == nil { // tsnet panics before the node has been started
			return
		}
		return s.TailscaleIPs()
	}
	n := fromClient(cmp.Or(s.Hostname, defaultHostname()), addrs, s.LocalClient)
	overLocalAPI := n.Ask
	n.Ask = func(ctx context.Context, remote, local netip.Addr) (*apitype.WhoIsResponse, error) {
		if q := questionsTo(s); q != nil {
			return q.ask(ctx, remote, local)
		}
		return overLocalAPI(ctx, remote, local)
	}
	n.Admits = admits(s)
	n.DialPeer = tailnetOnly(s.Dial)
	return n
}

// tailnetOnly returns dial without the connections that tsnet makes over the network of its
// host, where a tailnet address may be anybody's. It does that while the node knows no peer
// with the address.
func tailnetOnly(dial func(ctx context.Context, network, address string) (net.Conn, error)) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		if _, ok := c.(*gonet.TCPConn); !ok {
			return nil, errors.Join(fmt.Errorf("%s is no peer of the node", address), c.Close())
		}
		return c, nil
	}
}

// defaultHostname returns the hostname that tsnet asks for where none is configured, as
// with "bind tailscale/".
func defaultHostname() string {
	exe, err := os.Executable()
	if err != nil {
		return "tsnet"
	}
	return strings.TrimSuffix(strings.ToLower(filepath.Base(exe)), ".exe")
}

// fromClient returns a node that answers through its LocalAPI. It lacks DialPeer.
func fromClient(name string, addrs func() (ip4, ip6 netip.Addr), client func() (*local.Client, error)) *Node {
	return &Node{
		Name:  name,
		Addrs: addrs,
		Ask: func(ctx context.Context, remote, local netip.Addr) (*apitype.WhoIsResponse, error) {
			lc, err := client()
			if err != nil {
				return nil, err
			}
			return lc.WhoIsForIP(ctx, remote.String(), local)
		},
		Lookup: func(ctx context.Context, name string) ([]netip.Addr, error) {
			lc, err := client()
			if err != nil {
				return nil, err
			}
			status, err := lc.Status(ctx)
			if err != nil {
				return nil, err
			}
			var found []netip.Addr
			for _, peer := range status.Peer {
				if string(peer.ID) == name || names(strings.TrimSuffix(peer.DNSName, "."), Hostname(name)) {
					found = append(found, peer.TailscaleIPs...)
				}
			}
			return found, nil
		},
		DNSName: func(ctx context.Context) (string, error) {
			lc, err := client()
			if err != nil {
				return "", err
			}
			status, err := lc.StatusWithoutPeers(ctx)
			if err != nil {
				return "", err
			}
			if status.Self == nil {
				return "", errors.New("the node does not know its own name yet")
			}
			return strings.TrimSuffix(status.Self.DNSName, "."), nil
		},
		Status: func(ctx context.Context) (Status, error) {
			lc, err := client()
			if err != nil {
				return Status{}, err
			}
			status, err := lc.StatusWithoutPeers(ctx)
			if err != nil {
				return Status{}, err
			}
			out := Status{State: status.BackendState, Health: status.Health, CertDomains: status.CertDomains}
			if status.Self == nil {
				return out, nil
			}
			out.DNSName = strings.TrimSuffix(status.Self.DNSName, ".")
			if status.Self.KeyExpiry != nil {
				out.KeyExpiry = *status.Self.KeyExpiry
			}
			return out, nil
		},
	}
}

// Dial connects to the peer at address, an IP address and a port, as this node. It refuses
// any other address: the node would dial that over the network of its host, unencrypted.
func (n *Node) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	peer, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	if !tsaddr.IsTailscaleIP(peer.Addr()) {
		return nil, fmt.Errorf("%v is not an address of a tailnet", peer.Addr())
	}
	if n.Is(peer.Addr().Unmap()) {
		return nil, ErrSelf
	}
	return n.DialPeer(ctx, network, address)
}

// WhoIs returns who the peer at remote is, with the capabilities that it is granted on
// local, the node's address that it dialled. Errors are
// [ErrPeerNotFound], [ErrSelf], or a failure of the node to answer within
// [WhoIsTimeout].
func (n *Node) WhoIs(ctx context.Context, remote, local netip.Addr) (*apitype.WhoIsResponse, error) {
	// The first comparison also works while a daemon does not tell its addresses.
	if remote == local || n.Is(remote) {
		return nil, ErrSelf
	}
	ctx, cancel := context.WithTimeout(ctx, WhoIsTimeout)
	defer cancel()
	return n.Ask(ctx, remote, local)
}

// Is reports whether addr is one of the node's own addresses, or of a service that the
// server hosts on it.
func (n *Node) Is(addr netip.Addr) bool {
	ip4, ip6 := n.Addrs()
	return addr.IsValid() && (addr == ip4 || addr == ip6) || n.hosts(addr)
}

// connected reports whether the node knows its own addresses.
func (n *Node) connected() bool {
	ip4, ip6 := n.Addrs()
	return ip4.IsValid() || ip6.IsValid()
}

// Owns reports whether host, the Host header of a request, is this node's tailnet name,
// the first label of that, or one of its addresses, each with or without a port. The same
// goes for the services that the server hosts on it.
func (n *Node) Owns(ctx context.Context, host string) (bool, error) {
	host = Hostname(host)
	if addr, err := netip.ParseAddr(host); err == nil {
		return n.Is(addr.Unmap()), nil
	}
	if last := n.lastName.Load(); last != nil && (names(last.name, host) || time.Since(last.asked) < namePeriod) {
		return n.named(last.name, host), nil
	}
	last, err := n.askName(ctx)
	if err != nil {
		return false, err
	}
	return n.named(last.name, host), nil
}

// FQDN returns the node's tailnet name, which may be a second old. It is empty if the node
// has none.
func (n *Node) FQDN(ctx context.Context) (string, error) {
	if last := n.lastName.Load(); last != nil && time.Since(last.asked) < namePeriod {
		return last.name, nil
	}
	last, err := n.askName(ctx)
	if err != nil {
		return "", err
	}
	return last.name, nil
}

// askName asks the node for its name.
func (n *Node) askName(ctx context.Context) (*nodeName, error) {
	return n.naming.Ask(ctx, "", time.Time{}, func(ctx context.Context, asked time.Time) (*nodeName, error) {
		ctx, cancel := context.WithTimeout(ctx, WhoIsTimeout)
		defer cancel()
		name, err := n.DNSName(ctx)
		if err != nil {
			return nil, fmt.Errorf("asking node %q for its own name: %w", n.Name, err)
		}
		last := &nodeName{name, asked}
		n.lastName.Store(last)
		return last, nil
	})
}

// named reports whether host is the node, whose tailnet name is fqdn, or a service that the
// server hosts on it.
func (n *Node) named(fqdn, host string) bool {
	return names(fqdn, host) || n.namesService(fqdn, host)
}

// names reports whether host is the node name fqdn or its first label.
func names(fqdn, host string) bool {
	fqdn = strings.ToLower(fqdn)
	label, _, _ := strings.Cut(fqdn, ".")
	return host != "" && (host == fqdn || host == label)
}

// Hostname returns the host part of a Host header or host:port, in lower case,
// without brackets and without a final dot. Only a number after the colon is a port:
// "k8s:80.example.com" stays as it is.
func Hostname(host string) string {
	if h, port, err := net.SplitHostPort(host); err == nil && strings.Trim(port, "0123456789") == "" {
		host = h
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	return strings.TrimSuffix(strings.ToLower(host), ".")
}
