// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"context"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"

	"tailscale.com/tsnet"
	"tailscale.com/wgengine/netstack"
)

// RetireListeners closes those of listeners that end in a tsnet node's, and makes sure
// that none of them accepts another connection. It stops waiting when ctx ends, and returns
// the names of the nodes that it no longer waits for.
//
// caddy-tailscale shares the node's own listener between configs. To close a config's
// handle on it does not wake a call of Accept that waits: that call takes one more
// connection, whenever one comes, for a config that is no longer in use.
func RetireListeners(ctx context.Context, listeners []net.Listener) (hanging []string) {
	retired := make(chan string, len(listeners))
	left := make(map[string]int) // listeners, by node
	for _, ln := range listeners {
		if node := server(ln); node != nil {
			name := FromServer(node).Name
			left[name]++
			go func() {
				retire(ln, node)
				retired <- name
			}()
		}
	}
	for len(left) > 0 {
		select {
		case name := <-retired:
			if left[name]--; left[name] == 0 {
				delete(left, name)
			}
		case <-ctx.Done():
			return slices.Sorted(maps.Keys(left))
		}
	}
	return nil
}

// retire closes ln, a listener on node, and uses up a call of Accept that still waits.
func retire(ln net.Listener, node *tsnet.Server) {
	// If ln is the node's last handle, this closes the node, which may hang.
	_ = ln.Close()
	// Calls of Accept are served in the order in which they came. One of the config that
	// is in use may be in front of ln's.
	for range 2 {
		if accept := acceptor(node, ln.Addr()); accept != nil {
			accept(newVisitor())
		}
	}
}

// acceptor returns the function to which node passes connections to addr, nil if nothing
// listens there. It waits until a call of Accept returns the connection, for at most a
// second.
//
// A connection over the tailnet would do the same, but only while the node is connected.
func acceptor(node *tsnet.Server, addr net.Addr) func(net.Conn) {
	sys := node.Sys()
	if sys == nil {
		return nil // the node has not been started
	}
	stack, _ := sys.Netstack.GetOK()
	impl, ok := stack.(*netstack.Impl)
	if !ok {
		return nil
	}
	host, port, err := net.SplitHostPort(addr.String())
	if err != nil {
		return nil
	}
	// A listener on all of the node's addresses is registered without one.
	ip, _ := netip.ParseAddr(host)
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil
	}
	handler, _ := impl.GetTCPHandlerForFlow(netip.AddrPort{}, netip.AddrPortFrom(ip, uint16(n)))
	return handler
}

// visitor is a connection whose peer has left at once.
type visitor struct{ net.Conn }

func newVisitor() visitor {
	conn, peer := net.Pipe()
	_ = peer.Close()
	return visitor{conn}
}

// LocalAddr returns an address that looks like any other to listener wrappers, which may
// end the server if they cannot parse one.
func (visitor) LocalAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }

// RemoteAddr returns the same address.
func (v visitor) RemoteAddr() net.Addr { return v.LocalAddr() }
