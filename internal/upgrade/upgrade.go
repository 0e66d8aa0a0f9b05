// SPDX-License-Identifier: Apache-2.0

// Package upgrade recognizes requests for an upgrade of the connection, and wraps the
// two sides of an upgraded connection: the client's and the API server's.
//
// When a config is reloaded, or its stream_close_delay is over, Caddy closes these
// connections one after the other, and sends a close frame first if it is a WebSocket. A
// client or a pod that does not read would block that write, and with it the reload and
// the end of every other session. So a write fails while another one is in progress on
// the same side.
package upgrade

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
)

// ErrBusy is the error of a write while another one is in progress.
var ErrBusy = errors.New("something else is being written")

// writer lets one goroutine at a time write, without making others wait.
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

// CloseWrite closes conn for writing. It returns [errors.ErrUnsupported] if conn cannot
// be closed in one direction.
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

// CloseWrite closes c for writing.
func (c *clientConn) CloseWrite() error { return CloseWrite(c.Conn) }

// serverConn is the API server's side.
type serverConn struct {
	io.ReadWriteCloser
	out writer
}

// Write implements [io.Writer].
func (c *serverConn) Write(p []byte) (int, error) { return c.out.Write(p) }

// CloseWrite closes c for writing.
func (c *serverConn) CloseWrite() error { return CloseWrite(c.ReadWriteCloser) }

// Server wraps the body of resp, if resp switches protocols, in a connection whose writes
// never wait for one another. It does not change other responses.
func Server(resp *http.Response) {
	if conn, ok := resp.Body.(io.ReadWriteCloser); ok && resp.StatusCode == http.StatusSwitchingProtocols {
		resp.Body = &serverConn{ReadWriteCloser: conn, out: writer{Writer: conn}}
	}
}

// Client returns w for the next handlers. A handler that hijacks the connection gets one
// whose writes never wait for one another.
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
