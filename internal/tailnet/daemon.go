// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"tailscale.com/client/local"
)

// addrsPeriod is how long the daemon's addresses are cached. They change when the host
// joins another tailnet.
const addrsPeriod = time.Second

// FromDaemon returns the host itself as a node, as the Tailscale daemon knows it that
// listens on the Unix socket at that path. Its connections are sockets of the host: see
// [HostConnFrom].
func FromDaemon(socket string) *Node {
	client := &local.Client{Socket: socket, UseSocketOnly: true}
	a := &daemonAddrs{client: client}
	n := fromClient("tailscaled", a.get, func() (*local.Client, error) { return client, nil })
	// While the daemon is down, the host's network would route this elsewhere, unencrypted.
	n.DialPeer = func(ctx context.Context, network, address string) (net.Conn, error) {
		peer, err := netip.ParseAddrPort(address)
		if err != nil {
			return nil, err
		}
		return client.UserDial(ctx, network, peer.Addr().String(), peer.Port())
	}
	return n
}

// daemonAddrs are the addresses that a daemon has given to its host.
type daemonAddrs struct {
	client *local.Client

	mu       sync.Mutex
	ip4, ip6 netip.Addr
	// next is when to ask again.
	next time.Time
}

// get returns the addresses: none if the daemon has none or does not answer.
func (a *daemonAddrs) get() (ip4, ip6 netip.Addr) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if now := time.Now(); now.After(a.next) {
		a.ip4, a.ip6 = a.ask()
		a.next = now.Add(addrsPeriod)
	}
	return a.ip4, a.ip6
}

func (a *daemonAddrs) ask() (ip4, ip6 netip.Addr) {
	ctx, cancel := context.WithTimeout(context.Background(), WhoIsTimeout)
	defer cancel()
	status, err := a.client.StatusWithoutPeers(ctx)
	if err != nil {
		return netip.Addr{}, netip.Addr{}
	}
	for _, addr := range status.TailscaleIPs {
		switch {
		case addr.Is4():
			ip4 = addr
		case addr.Is6():
			ip6 = addr
		}
	}
	return ip4, ip6
}
