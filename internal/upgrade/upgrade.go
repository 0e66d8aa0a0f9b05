// SPDX-License-Identifier: Apache-2.0

// Package upgrade holds the two sides of a connection whose protocol has been
// switched: the client's and the API server's.
//
// When a config is reloaded, or its stream_close_delay is over, Caddy closes these
// one after the other, and over a WebSocket it says so first. While it waited for a
// client or a pod that does not read, it would hold up the reload, and keep every
// other session from ending. So nothing more is said on a side on which something is
// being written already.
package upgrade

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
)

// ErrBusy is returned to whoever would write while another does.
var ErrBusy = errors.New("something else is being written")

// writer is what one goroutine at a time writes to. Others need not wait.
type writer struct {
	io.Writer
	mu sync.Mutex
}

// Write implements [io.Writer]. It returns ErrBusy while another goroutine writes.
func (w *writer) Write(p []byte) (int, error) {
	if !w.mu.TryLock() {
		return 0, ErrBusy
	}
	defer w.mu.Unlock()
	return w.Writer.Write(p)
}

// CloseWrite says on conn that nothing more will be written. It returns
// [errors.ErrUnsupported] if conn cannot be closed in one direction.
func CloseWrite(conn any) error {
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// clientConn is the client's side.
type clientConn struct {
	net.Conn
	out writer
}

// Write implements [net.Conn].
func (c *clientConn) Write(p []byte) (int, error) { return c.out.Write(p) }

// CloseWrite says that nothing more will be written.
func (c *clientConn) CloseWrite() error { return CloseWrite(c.Conn) }

// serverConn is the API server's side.
type serverConn struct {
	io.ReadWriteCloser
	out writer
}

// Write implements [io.Writer].
func (c *serverConn) Write(p []byte) (int, error) { return c.out.Write(p) }

// CloseWrite says that nothing more will be written.
func (c *serverConn) CloseWrite() error { return CloseWrite(c.ReadWriteCloser) }

// Server makes the body of resp, which switches protocols, one that nobody waits for
// while another writes to it. Other answers stay as they are.
func Server(resp *http.Response) {
	if conn, ok := resp.Body.(io.ReadWriteCloser); ok && resp.StatusCode == http.StatusSwitchingProtocols {
		resp.Body = &serverConn{ReadWriteCloser: conn, out: writer{Writer: conn}}
	}
}

// Client returns w for the handlers that follow. When one of them takes over the
// connection, it is given one that nobody waits for while another writes to it.
func Client(w http.ResponseWriter) http.ResponseWriter { return &responseWriter{w} }

type responseWriter struct{ http.ResponseWriter }

// Unwrap is for [http.ResponseController].
func (w *responseWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Hijack implements [http.Hijacker].
func (w *responseWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffered, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	return &clientConn{Conn: conn, out: writer{Writer: conn}}, buffered, nil
}
