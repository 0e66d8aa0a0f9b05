// SPDX-License-Identifier: Apache-2.0

// Package upgrade recognizes requests for an upgrade of the connection, and wraps the
// two sides of an upgraded connection: the client's and the API server's.
//
// When a config is reloaded, or its stream_close_delay is over, Caddy closes these
// connections one after the other, and sends a close frame first if it is a WebSocket. A
// client or a pod that does not read would block that write, and with it the reload and
// the end of every other session. So a write fails while another one is in progress on
// the same side.
//
// reverse_proxy ends a tunnel with the first error in either direction, and closes both
// connections. What the API server says last has to reach the client nevertheless: it may
// be the exit code of a command that did not read all of its input. So only the API
// server's silence ends a tunnel, not a failed write to it. And a client that is still
// sending when its connection is closed has to be read from, as the connection would be
// reset otherwise: see [clientConn.Close].
package upgrade

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"reflect"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// drainTimeout is how long the API server may go on sending when it no longer takes
	// what is written to it.
	drainTimeout = 10 * time.Second
	// lingerTimeout is how long a client may take to read what it was sent last, and then
	// to close the connection.
	lingerTimeout = 5 * time.Second
	// maxDiscarded is how many bytes of a client are discarded in either case. It is more
	// than a fast connection has in flight.
	maxDiscarded = 64 << 20
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
//
// Caddy's wrappers hide whether a connection can: that of a hijacked connection, which
// counts bytes for the access log, embeds it as a [net.Conn].
func CloseWrite(conn any) error {
	for {
		if half, ok := conn.(interface{ CloseWrite() error }); ok {
			return half.CloseWrite()
		}
		wrapper := reflect.Indirect(reflect.ValueOf(conn))
		if wrapper.Kind() != reflect.Struct {
			return errors.ErrUnsupported
		}
		inner := wrapper.FieldByName("Conn")
		if !inner.IsValid() || !inner.CanInterface() {
			return errors.ErrUnsupported
		}
		conn = inner.Interface()
	}
}

// clientConn is the client's side.
type clientConn struct {
	net.Conn
	out writer

	close     sync.Once
	closed    atomic.Bool   // Close was called
	discarded int           // by Read since then
	readEnded chan struct{} // closed once Read has failed
	endRead   sync.Once     // closes readEnded
}

// Read implements [net.Conn]. Once c is closed, it discards what the client sends until
// the client closes the connection.
func (c *clientConn) Read(p []byte) (int, error) {
	for {
		n, err := c.Conn.Read(p)
		if c.closed.Load() {
			c.discarded += n
			n = 0
			if c.discarded > maxDiscarded {
				err = net.ErrClosed
			}
		}
		if err != nil {
			c.endRead.Do(func() { close(c.readEnded) })
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

// Write implements [net.Conn].
func (c *clientConn) Write(p []byte) (int, error) {
	if c.closed.Load() {
		return 0, net.ErrClosed
	}
	return c.out.Write(p)
}

// CloseWrite closes c: the API server says no more, and listens no more.
func (c *clientConn) CloseWrite() error { return c.Close() }

// Close tells the client that nothing follows, and closes the connection when the client
// has closed it as well, or after lingerTimeout. It does not wait for that.
//
// A connection that is closed while data arrives is reset, and the client may lose what it
// has not read yet. So the goroutine that copies to the API server goes on reading.
func (c *clientConn) Close() error {
	c.close.Do(func() {
		c.closed.Store(true)
		if !c.out.mu.TryLock() { // which is never unlocked: nothing more is written
			_ = c.Conn.Close() // a client that does not read blocks a write
			return
		}
		timeout := time.After(lingerTimeout)
		go func() {
			if CloseWrite(c.Conn) == nil {
				select {
				case <-c.readEnded:
				case <-timeout:
				}
			}
			_ = c.Conn.Close()
		}()
	})
	return nil
}

// serverConn is the API server's side.
type serverConn struct {
	io.ReadWriteCloser
	out writer

	deaf      atomic.Bool  // a write has failed
	discarded atomic.Int64 // bytes since then
}

// Write implements [io.Writer]. If the API server no longer takes what is written, Write
// discards it without an error.
func (c *serverConn) Write(p []byte) (int, error) {
	if !c.deaf.Load() {
		n, err := c.out.Write(p)
		if err == nil || errors.Is(err, ErrBusy) {
			return n, err
		}
		c.drain()
	}
	if c.discarded.Add(int64(len(p))) > maxDiscarded {
		_ = c.Close()
	}
	return len(p), nil
}

// CloseWrite closes c for writing. Like Write, it reports no failure, unless c cannot be
// closed in one direction.
func (c *serverConn) CloseWrite() error {
	err := CloseWrite(c.ReadWriteCloser)
	if err == nil || errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	c.drain()
	return nil
}

// drain leaves the API server the time to say what it has to say.
func (c *serverConn) drain() {
	if !c.deaf.Swap(true) {
		time.AfterFunc(drainTimeout, func() { _ = c.Close() })
	}
}

// Server wraps the body of resp, if resp switches protocols, in a connection whose writes
// never wait for one another. It does not change other responses.
func Server(resp *http.Response) {
	if conn, ok := resp.Body.(io.ReadWriteCloser); ok && resp.StatusCode == http.StatusSwitchingProtocols {
		resp.Body = &serverConn{ReadWriteCloser: conn, out: writer{Writer: conn}}
	}
}

// Last returns w for the last answer on its connection: the client has to open another one.
// Over HTTP/2, Go sends GOAWAY, and what is open goes on.
func Last(w http.ResponseWriter) http.ResponseWriter {
	w.Header().Set("Connection", "close")
	return &lastWriter{w}
}

type lastWriter struct{ http.ResponseWriter }

// Unwrap is for [http.ResponseController].
func (w *lastWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader implements [http.ResponseWriter]. No request follows on an upgraded
// connection, and clients look for Upgrade alone.
func (w *lastWriter) WriteHeader(code int) {
	if code == http.StatusSwitchingProtocols {
		w.Header().Set("Connection", "Upgrade")
	}
	w.ResponseWriter.WriteHeader(code)
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
	return &clientConn{Conn: conn, out: writer{Writer: conn}, readEnded: make(chan struct{})}, buffered, nil
}
