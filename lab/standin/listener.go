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
	node string
	port uint16
}

// listenTCP opens "tailscale/<node>:<port>". Like the real plugin, it starts the
// node but does not wait until it has joined its tailnet.
func listenTCP(ctx context.Context, _, host, portRange string, portOffset uint, _ net.ListenConfig) (any, error) {
	app, key, err := resolve(ctx, host, portRange, portOffset)
	if err != nil {
		return nil, err
	}
	h, err := openHandle(app, key)
	if err != nil {
		return nil, err // not a nil *handle in a non-nil any
	}
	return h, nil
}

// listenTLS opens "tailscale+tls/<node>:<port>", with TLS that uses the certificate
// from the control server. Headscale issues none, so in the lab no handshake
// succeeds.
func listenTLS(ctx context.Context, _, host, portRange string, portOffset uint, _ net.ListenConfig) (any, error) {
	app, key, err := resolve(ctx, host, portRange, portOffset)
	if err != nil {
		return nil, err
	}
	h, err := openHandle(app, key)
	if err != nil {
		return nil, err
	}
	server, ok := Node(key.node)
	if !ok {
		return nil, errors.Join(fmt.Errorf("[unexpected] tailnet node %q has a listener but does not run", key.node), h.Close())
	}
	client, err := server.LocalClient()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("certificates of tailnet node %q: %w", key.node, err), h.Close())
	}
	return tls.NewListener(h, &tls.Config{
		MinVersion:     tls.VersionTLS12,
		GetCertificate: client.GetCertificate,
		NextProtos:     []string{"h2", "http/1.1"},
	}), nil
}

// listenUDP opens "tailscale/udp", which Caddy uses for HTTP/3 of a "tailscale"
// site. It listens only on the node's IPv4 address, for which it has to wait. Caddy
// itself shares the result between configs.
func listenUDP(ctx context.Context, _, host, portRange string, portOffset uint, _ net.ListenConfig) (any, error) {
	app, key, err := resolve(ctx, host, portRange, portOffset)
	if err != nil {
		return nil, err
	}
	lifecycle.Lock()
	n, err := acquireNode(app, key.node)
	lifecycle.Unlock()
	if err != nil {
		return nil, err
	}
	release := func() error {
		lifecycle.Lock()
		defer lifecycle.Unlock()
		return n.release()
	}
	ip, err := n.ipv4(ctx)
	if err != nil {
		return nil, errors.Join(err, release())
	}
	conn, err := n.server.ListenPacket("udp4", netip.AddrPortFrom(ip, key.port).String())
	if err != nil {
		return nil, errors.Join(fmt.Errorf("udp port %d of tailnet node %q: %w", key.port, key.node, err), release())
	}
	return &packetConn{PacketConn: conn, release: sync.OnceValue(release)}, nil
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
func resolve(ctx context.Context, host, portRange string, portOffset uint) (*App, listenerKey, error) {
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
	return app.(*App), listenerKey{node: host, port: uint16(port)}, nil
}

// openHandle returns a new handle on the listener. It opens the listener if no other
// config has.
func openHandle(app *App, key listenerKey) (*handle, error) {
	lifecycle.Lock()
	defer lifecycle.Unlock()
	value, _, err := listeners.LoadOrNew(key, func() (caddy.Destructor, error) {
		n, err := acquireNode(app, key.node)
		if err != nil {
			return nil, err
		}
		inner, err := n.server.Listen("tcp", fmt.Sprintf(":%d", key.port))
		if err != nil {
			return nil, errors.Join(fmt.Errorf("port %d of tailnet node %q: %w", key.port, key.node, err), n.release())
		}
		return share(inner, n.release), nil
	})
	if err != nil {
		return nil, err
	}
	return newHandle(value.(*sharedListener), app.LingerOnClose, func() error {
		lifecycle.Lock()
		defer lifecycle.Unlock()
		_, err := listeners.Delete(key)
		return err
	}), nil
}

// sharedListener accepts from one listener on behalf of several handles.
type sharedListener struct {
	inner   net.Listener
	release func() error   // releases what inner uses
	conns   chan net.Conn  // unbuffered
	done    chan struct{}  // closed when inner stops accepting
	err     error          // why; written before done is closed
	running sync.WaitGroup // goroutines of accept and deliver
}

func share(inner net.Listener, release func() error) *sharedListener {
	s := &sharedListener{
		inner:   inner,
		release: release,
		conns:   make(chan net.Conn),
		done:    make(chan struct{}),
	}
	s.running.Go(s.accept)
	return s
}

// accept passes inner's connections to any handle that waits for one.
func (s *sharedListener) accept() {
	for {
		conn, err := s.inner.Accept()
		if err != nil {
			s.err = err
			close(s.done)
			return
		}
		// In a goroutine of its own, as this loop has to notice inner's end even
		// while no handle wants a connection.
		s.running.Go(func() { s.deliver(conn) })
	}
}

// deliver waits until a handle takes conn, or closes it with the listener.
func (s *sharedListener) deliver(conn net.Conn) {
	select {
	case s.conns <- conn:
	case <-s.done:
		conn.Close()
	}
}

// Destruct closes the listener. The last handle's Close calls it.
func (s *sharedListener) Destruct() error {
	err := s.inner.Close()
	s.running.Wait()
	return errors.Join(err, s.release())
}

// handle is one config's view of a shared listener.
type handle struct {
	shared *sharedListener
	linger bool // see App.LingerOnClose
	closed chan struct{}
	close  func() error // once: closes closed and releases this use of shared
}

func newHandle(shared *sharedListener, linger bool, release func() error) *handle {
	h := &handle{shared: shared, linger: linger, closed: make(chan struct{})}
	h.close = sync.OnceValue(func() error {
		close(h.closed)
		return release()
	})
	return h
}

// Accept returns the next connection, or an error if the handle is closed. With
// LingerOnClose, a call that is already waiting when the handle is closed still gets
// the next connection.
func (h *handle) Accept() (net.Conn, error) {
	select {
	case <-h.closed:
		return nil, h.acceptError(net.ErrClosed)
	default:
	}
	closed := h.closed
	if h.linger {
		closed = nil
	}
	select {
	case conn := <-h.shared.conns:
		// If both cases are ready, select picks either.
		select {
		case <-closed:
			h.shared.deliver(conn) // to another handle
			return nil, h.acceptError(net.ErrClosed)
		default:
			return conn, nil
		}
	case <-closed:
		return nil, h.acceptError(net.ErrClosed)
	case <-h.shared.done:
		return nil, h.acceptError(h.shared.err)
	}
}

func (h *handle) acceptError(err error) error {
	return &net.OpError{Op: "accept", Net: h.Addr().Network(), Addr: h.Addr(), Err: err}
}

// Close closes this handle, and the listener with the last one.
func (h *handle) Close() error { return h.close() }

// Addr returns the listener's address.
func (h *handle) Addr() net.Addr { return h.shared.inner.Addr() }

// Unwrap returns the node's own listener, whose Server method returns the node.
func (h *handle) Unwrap() net.Listener { return h.shared.inner }

// Interface guards
var (
	_ caddy.Destructor                   = (*sharedListener)(nil)
	_ net.Listener                       = (*handle)(nil)
	_ interface{ Unwrap() net.Listener } = (*handle)(nil)
)
