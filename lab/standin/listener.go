// SPDX-License-Identifier: Apache-2.0

package standin

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterNetwork("tailscale", listenTCP)
	caddy.RegisterNetwork("tailscale+tls", listenTLS)
	caddy.RegisterNetwork("tailscale/udp", listenUDP)
	caddyhttp.RegisterNetworkHTTP3("tailscale", "tailscale/udp")
}

// listeners holds the listeners that configs share, by listenerKey.
var listeners = caddy.NewUsagePool()

type listenerKey struct {
	network, node string
	port          uint16
}

// listenTCP opens "tailscale/<node>:<port>". Like the real plugin, it starts the
// node but does not wait until it has joined its tailnet.
func listenTCP(ctx context.Context, network, host, portRange string, portOffset uint, _ net.ListenConfig) (any, error) {
	return listen(ctx, network, host, portRange, portOffset, func(_ *node, ln net.Listener) (net.Listener, error) { return ln, nil })
}

// listenTLS opens "tailscale+tls/<node>:<port>", with TLS that uses the certificate
// from the control server. Headscale issues none, so in the lab no handshake
// succeeds.
func listenTLS(ctx context.Context, network, host, portRange string, portOffset uint, _ net.ListenConfig) (any, error) {
	return listen(ctx, network, host, portRange, portOffset, func(n *node, ln net.Listener) (net.Listener, error) {
		client, err := n.server.LocalClient()
		if err != nil {
			return nil, fmt.Errorf("certificates of tailnet node %q: %w", n.name, err)
		}
		return tls.NewListener(ln, &tls.Config{
			MinVersion:     tls.VersionTLS12,
			GetCertificate: client.GetCertificate,
			NextProtos:     []string{"h2", "http/1.1"},
		}), nil
	})
}

// listen returns a new handle on the node's listener. It opens the listener, and wraps
// it, if no other config has.
func listen(ctx context.Context, network, host, portRange string, portOffset uint, wrap func(*node, net.Listener) (net.Listener, error)) (any, error) {
	app, key, err := resolve(ctx, network, host, portRange, portOffset)
	if err != nil {
		return nil, err
	}
	n, err := acquireNode(app, key.node)
	if err != nil {
		return nil, err
	}
	value, _, err := listeners.LoadOrNew(key, func() (caddy.Destructor, error) {
		inner, err := n.server.Listen("tcp", fmt.Sprintf(":%d", key.port))
		if err != nil {
			return nil, fmt.Errorf("port %d of tailnet node %q: %w", key.port, key.node, err)
		}
		wrapped, err := wrap(n, inner)
		if err != nil {
			return nil, errors.Join(err, inner.Close())
		}
		return &sharedListener{wrapped}, nil
	})
	if err != nil {
		return nil, errors.Join(err, n.release())
	}
	return &handle{
		sharedListener: value.(*sharedListener),
		release: func() error {
			_, err := listeners.Delete(key)
			return errors.Join(err, n.release())
		},
	}, nil
}

// listenUDP opens "tailscale/udp", which Caddy uses for HTTP/3 of a "tailscale"
// site. It listens only on the node's IPv4 address, for which it has to wait. Caddy
// itself shares the result between configs.
func listenUDP(ctx context.Context, network, host, portRange string, portOffset uint, _ net.ListenConfig) (any, error) {
	app, key, err := resolve(ctx, network, host, portRange, portOffset)
	if err != nil {
		return nil, err
	}
	n, err := acquireNode(app, key.node)
	if err != nil {
		return nil, err
	}
	ip, err := n.ipv4(ctx)
	if err != nil {
		return nil, errors.Join(err, n.release())
	}
	conn, err := n.server.ListenPacket("udp4", netip.AddrPortFrom(ip, key.port).String())
	if err != nil {
		return nil, errors.Join(fmt.Errorf("udp port %d of tailnet node %q: %w", key.port, key.node, err), n.release())
	}
	return &packetConn{PacketConn: conn, release: sync.OnceValue(n.release)}, nil
}

// packetConn is a node's UDP socket, and a use of that node.
type packetConn struct {
	net.PacketConn
	release func() error // once
}

func (c *packetConn) Close() error {
	return errors.Join(c.PacketConn.Close(), c.release())
}

// resolve returns the config's app, and the node and port of a network address.
func resolve(ctx context.Context, network, host, portRange string, portOffset uint) (*App, listenerKey, error) {
	start, _, _ := strings.Cut(portRange, "-")
	startPort, err := strconv.ParseUint(start, 10, 16)
	if err != nil {
		return nil, listenerKey{}, fmt.Errorf("port %q of tailnet node %q: %w", portRange, host, err)
	}
	port := startPort + uint64(portOffset)
	if port > 65535 {
		return nil, listenerKey{}, fmt.Errorf("port %d of tailnet node %q is above 65535", port, host)
	}
	caddyCtx, ok := ctx.(caddy.Context)
	if !ok {
		return nil, listenerKey{}, fmt.Errorf("tailnet node %q: asked to listen outside of a Caddy config (context is a %T)", host, ctx)
	}
	app, err := caddyCtx.App("tailscale")
	if err != nil {
		return nil, listenerKey{}, err
	}
	return app.(*App), listenerKey{network: network, node: host, port: uint16(port)}, nil
}

// sharedListener is a listener that configs share. Their handles call its Accept
// directly.
type sharedListener struct{ net.Listener }

// Destruct closes the listener. The last handle's Close calls it.
func (s *sharedListener) Destruct() error { return s.Close() }

// handle is one config's view of a shared listener.
type handle struct {
	*sharedListener
	closed  atomic.Bool
	release func() error // gives up the handle's reference to the listener and the node
}

// Accept returns the next connection, or an error if the handle is closed. As with the
// real plugin, a call that waits when the handle is closed still gets the next
// connection.
func (h *handle) Accept() (net.Conn, error) {
	if h.closed.Load() {
		return nil, &net.OpError{Op: "accept", Net: h.Addr().Network(), Addr: h.Addr(), Err: net.ErrClosed}
	}
	return h.sharedListener.Accept()
}

// Close closes this handle, and the listener with the last one. It wakes no call of
// Accept, unless it closes the listener.
func (h *handle) Close() error {
	if h.closed.CompareAndSwap(false, true) {
		return h.release()
	}
	return nil
}

// Unwrap returns the listener below, which leads to the node's own.
func (h *handle) Unwrap() net.Listener { return h.Listener }

// Interface guards
var (
	_ caddy.Destructor                   = (*sharedListener)(nil)
	_ net.Listener                       = (*handle)(nil)
	_ interface{ Unwrap() net.Listener } = (*handle)(nil)
)
