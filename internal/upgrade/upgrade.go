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
// A tunnel of reverse_proxy ends with the first error, in either direction. What the API
// server says last, such as the exit code of a command that did not read all of its
// input, must reach the client nevertheless. So a write to the API server that fails is
// no error as long as there may be something to read from it, and closing the client's
// connection leaves the client the time to read.
package upgrade

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"reflect"
	"sync"
	"time"
)

const (
	// drainTimeout is how long the API server may go on sending when it no longer takes
	// what is written to it.
	drainTimeout = 10 * time.Second
	// lingerTimeout is how long a client may take to read what it was sent last, and then
	// to close the connection.
	lingerTimeout = 5 * time.Second
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
	out  writer
	once sync.Once
}

// Write implements [net.Conn].
func (c *clientConn) Write(p []byte) (int, error) { return c.out.Write(p) }

// CloseWrite closes c for writing.
func (c *clientConn) CloseWrite() error { return CloseWrite(c.Conn) }

// Close closes c, once the client has closed it or has had the time to read: closing a
// connection at once, with unread data from the client, would reset it, and the client
// would lose what it has not read. Close does not wait for that.
func (c *clientConn) Close() error {
	c.once.Do(func() {
		// For a Read that waits as well: until then, it reads what the client sends.
		_ = c.SetReadDeadline(time.Now().Add(lingerTimeout))
		go func() {
			// Otherwise the client would not notice the end before the timeout.
			if c.CloseWrite() == nil {
				_, _ = io.Copy(io.Discard, c.Conn)
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

	mu sync.Mutex
	// unsent is the error of a write, nil if none has failed. From then on everything
	// that is written is discarded.
	unsent error
	// over is set when there is nothing more to read.
	over  bool
	drain *time.Timer // closes the connection after drainTimeout, nil if unsent is
}

// Read implements [io.Reader].
func (c *serverConn) Read(p []byte) (int, error) {
	n, err := c.ReadWriteCloser.Read(p)
	if err != nil {
		c.mu.Lock()
		c.over = true
		c.mu.Unlock()
	}
	return n, err
}

// Write implements [io.Writer]. It reports the error of a write only when there is nothing
// more to read.
func (c *serverConn) Write(p []byte) (int, error) {
	if discard, err := c.failed(nil); discard {
		return len(p), err
	}
	n, err := c.out.Write(p)
	if err == nil || errors.Is(err, ErrBusy) {
		return n, err
	}
	if _, err = c.failed(err); err != nil {
		return n, err
	}
	return len(p), nil
}

// CloseWrite closes c for writing. Like Write, it reports an error only when there is
// nothing more to read, or if c cannot be closed in one direction.
func (c *serverConn) CloseWrite() error {
	if discard, err := c.failed(nil); discard {
		return err
	}
	err := CloseWrite(c.ReadWriteCloser)
	if err == nil || errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	_, err = c.failed(err)
	return err
}

// failed notes that a write failed with err, unless err is nil. It reports whether any
// write has failed, and returns the error if there is nothing more to read.
func (c *serverConn) failed(err error) (failed bool, report error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.unsent == nil && err != nil {
		c.unsent = err
		c.drain = time.AfterFunc(drainTimeout, func() { _ = c.ReadWriteCloser.Close() })
	}
	if c.unsent == nil || !c.over {
		return c.unsent != nil, nil
	}
	return true, c.unsent
}

// Close closes c.
func (c *serverConn) Close() error {
	c.mu.Lock()
	c.over = true
	if c.drain != nil {
		c.drain.Stop()
	}
	c.mu.Unlock()
	return c.ReadWriteCloser.Close()
}

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
