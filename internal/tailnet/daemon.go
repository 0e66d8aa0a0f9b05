// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"tailscale.com/client/local"
)

// The daemon's addresses change when the host joins another tailnet.
const (
	// addrsPeriod is how old they may be before the daemon is asked again, while
	// requests go on with them.
	addrsPeriod = time.Second
	// addrsMaxAge is how old they may be if the daemon does not answer. From then on
	// the daemon has none.
	addrsMaxAge = 30 * time.Second
	// addrsTimeout is how long the daemon may take to answer. A request waits for
	// that only if there are no addresses that it may use.
	addrsTimeout = time.Second
)

// FromDaemon returns the host itself as a node, as the Tailscale daemon knows it that
// listens on the Unix socket at that path. Its connections are sockets of the host: see
// [HostConnFrom].
func FromDaemon(socket string) *Node {
	client := &local.Client{Socket: socket, UseSocketOnly: true}
	a := &daemonAddrs{ask: func(ctx context.Context) ([]netip.Addr, error) {
		status, err := client.StatusWithoutPeers(ctx)
		if err != nil {
			return nil, err
		}
		return status.TailscaleIPs, nil
	}}
	n := fromClient("tailscaled", a.get, func() (*local.Client, error) { return client, nil })
	// The host's network would route this elsewhere, unencrypted, while the daemon is down,
	// and the daemon itself does so with an address of no peer.
	n.DialPeer = func(ctx context.Context, network, address string) (net.Conn, error) {
		peer, err := netip.ParseAddrPort(address)
		if err != nil {
			return nil, err
		}
		if _, err := client.WhoIs(ctx, peer.Addr().String()); err != nil {
			return nil, fmt.Errorf("looking for the peer %v: %w", peer.Addr(), err)
		}
		return client.UserDial(ctx, network, peer.Addr().String(), peer.Port())
	}
	return n
}

// daemonAddrs are the addresses that a daemon has given to its host. One request at a time
// asks for them, in the background.
type daemonAddrs struct {
	ask func(context.Context) ([]netip.Addr, error)

	mu       sync.Mutex
	ip4, ip6 netip.Addr
	// asked is when the daemon was asked the question that ip4 and ip6 answer.
	asked time.Time
	// next is when to ask again.
	next time.Time
	// answer is closed when the daemon has been asked. Nil while nobody asks.
	answer chan struct{}
}

// get returns the addresses: none if the daemon has none, or has not answered for
// addrsMaxAge.
func (a *daemonAddrs) get() (ip4, ip6 netip.Addr) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	if a.answer == nil && !now.Before(a.next) {
		a.answer = make(chan struct{})
		go a.refresh(now)
	}
	if answer := a.answer; answer != nil && now.Sub(a.asked) > addrsMaxAge {
		a.mu.Unlock()
		<-answer
		a.mu.Lock()
	}
	if now.Sub(a.asked) > addrsMaxAge {
		return netip.Addr{}, netip.Addr{}
	}
	return a.ip4, a.ip6
}

// refresh asks the daemon, at now.
func (a *daemonAddrs) refresh(now time.Time) {
	ctx, cancel := context.WithTimeout(context.Background(), addrsTimeout)
	defer cancel()
	addrs, err := a.ask(ctx)
	a.mu.Lock()
	defer a.mu.Unlock()
	if err == nil {
		a.ip4, a.ip6, a.asked = netip.Addr{}, netip.Addr{}, now
		for _, addr := range addrs {
			if addr.Is4() {
				a.ip4 = addr
			} else {
				a.ip6 = addr
			}
		}
	}
	a.next = time.Now().Add(addrsPeriod)
	close(a.answer)
	a.answer = nil
}
