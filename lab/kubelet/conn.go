// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"sync"
)

// A stream hijacks its connection from the HTTP server. After that, the request's
// context does not end with the connection, and a handler cannot notice the end
// either: a command that neither reads nor prints anything would outlive its client.
// So connections report their own end.

// conn is a connection whose context ends with it.
type conn struct {
	net.Conn
	ctx    context.Context // ends when reads fail
	cancel context.CancelFunc
	forget func() // removes it from the listener
}

// Read implements [net.Conn].
func (c *conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	// The HTTP server uses deadlines to interrupt reads.
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.cancel()
	}
	return n, err
}

// Close implements [net.Conn].
func (c *conn) Close() error {
	c.cancel()
	c.forget()
	return c.Conn.Close()
}

// listener accepts conns and remembers those that are open.
type listener struct {
	net.Listener

	mu    sync.Mutex
	conns map[*conn]bool // nil after closeConns
}

func newListener(ln net.Listener) *listener {
	return &listener{Listener: ln, conns: make(map[*conn]bool)}
}

// Accept implements [net.Listener].
func (l *listener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: nc}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.forget = func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.conns, c)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conns == nil {
		c.cancel()
		return nil, errors.Join(net.ErrClosed, nc.Close())
	}
	l.conns[c] = true
	return c, nil
}

// closeConns closes every connection and makes Accept fail.
func (l *listener) closeConns() {
	l.mu.Lock()
	conns := l.conns
	l.conns = nil
	l.mu.Unlock()
	for c := range conns {
		_ = c.Close() // the connection ends either way
	}
}

// connKey is the context key of a request's conn.
type connKey struct{}

// withConn adds nc to the context of the requests on it
// ([http.Server.ConnContext]).
func withConn(ctx context.Context, nc net.Conn) context.Context {
	if t, ok := nc.(*tls.Conn); ok {
		nc = t.NetConn()
	}
	return context.WithValue(ctx, connKey{}, nc)
}

// streamContext returns a context that ends with ctx, with the connection of ctx's
// request, with the pod and with the server.
func (s *Server) streamContext(ctx context.Context, p *pod) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stops := []func() bool{
		context.AfterFunc(s.ctx, cancel),
		context.AfterFunc(p.ctx, cancel),
	}
	if c, ok := ctx.Value(connKey{}).(*conn); ok {
		stops = append(stops, context.AfterFunc(c.ctx, cancel))
	}
	return ctx, func() {
		for _, stop := range stops {
			stop()
		}
		cancel()
	}
}
