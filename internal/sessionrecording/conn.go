// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade"
)

const (
	// farewellTimeout is how long a client may take to read why its session ends,
	// and how long it is then waited for to go.
	farewellTimeout = 2 * time.Second
	readBuffer      = 32 << 10
)

// conn is a client's connection on which a session runs. It passes on whole frames
// that have been understood, in both directions.
type conn struct {
	net.Conn
	in, out  filter
	farewell func(reason string) []byte
	// cancel ends what reverse_proxy does for the session.
	cancel context.CancelFunc

	// early is what was read before the connection was taken over. It and what
	// follows belong to Read.
	early  []byte
	buffer []byte
	ready  []byte // may be read
	err    error  // is to be returned once ready has been

	write  sync.Mutex // held while writing
	broken bool       // a frame was written in part

	mu     sync.Mutex
	reason error         // why the session was ended, if it was
	said   chan struct{} // closed once the client has been told
}

func newConn(nc net.Conn, early []byte, p protocol, cancel context.CancelFunc) *conn {
	return &conn{
		Conn: nc, early: early, buffer: make([]byte, readBuffer), cancel: cancel, said: make(chan struct{}),
		in: filter{next: p.fromClient}, out: filter{next: p.fromServer}, farewell: p.farewell,
	}
}

// Read reads what goes to the API server.
func (c *conn) Read(p []byte) (int, error) {
	for len(c.ready) == 0 {
		if err := c.failed(); err != nil {
			return 0, err
		}
		if c.err != nil {
			return 0, c.err
		}
		arrived := c.early
		c.early = nil
		if len(arrived) == 0 {
			var n int
			n, c.err = c.Conn.Read(c.buffer)
			arrived = c.buffer[:n]
		}
		var err error
		if c.ready, err = c.in.push(arrived); err != nil {
			c.end(err)
		}
	}
	n := copy(p, c.ready)
	c.ready = c.ready[n:]
	return n, nil
}

// Write writes what comes from the API server.
func (c *conn) Write(p []byte) (int, error) {
	err := c.writeFrames(p)
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c *conn) writeFrames(p []byte) error {
	// What comes from the API server is written by one goroutine. Another is Caddy's
	// for the last frame of a WebSocket that it is about to close: waiting for a
	// client that does not read, it would hold up the reload of a config.
	if !c.write.TryLock() {
		return cmp.Or(c.failed(), upgrade.ErrBusy)
	}
	if err := c.failed(); err != nil {
		c.write.Unlock()
		return err
	}
	pass, refused := c.out.push(p)
	var err error
	if len(pass) > 0 {
		if _, err = c.Conn.Write(pass); err != nil {
			c.broken = true
		}
	}
	c.write.Unlock()
	if refused != nil {
		c.end(refused)
	}
	return errors.Join(refused, err)
}

// end ends the session, and tells the client why. Only the first call counts.
func (c *conn) end(reason error) {
	c.mu.Lock()
	if c.reason != nil {
		c.mu.Unlock()
		return
	}
	c.reason = reason
	c.mu.Unlock()

	// A client that does not read holds up a Write, and whoever waits for it.
	_ = c.SetWriteDeadline(time.Now().Add(farewellTimeout))
	c.write.Lock()
	// In the midst of a frame, anything would be taken for the rest of it.
	if !c.broken {
		_, _ = c.Conn.Write(c.farewell(shorten("The session was ended by the proxy: " + reason.Error())))
	}
	c.write.Unlock()
	_ = c.SetReadDeadline(time.Now()) // wakes up Read
	close(c.said)
	// Whoever waits for a pod that neither reads nor prints is not in Read.
	c.cancel()
}

// failed returns why the session was ended, nil if it was not.
func (c *conn) failed() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reason
}

// CloseWrite says that nothing more will be written.
func (c *conn) CloseWrite() error { return upgrade.CloseWrite(c.Conn) }

// Close closes the connection. A client that is being told why is left the time to
// read it: closed at once, with something from it unread, the connection would be
// reset, and the client lose what it has not read.
func (c *conn) Close() error {
	if c.failed() == nil {
		return c.Conn.Close()
	}
	go func() {
		<-c.said
		_ = c.SetReadDeadline(time.Now().Add(farewellTimeout))
		_ = c.CloseWrite()
		_, _ = io.Copy(io.Discard, c.Conn)
		_ = c.Conn.Close()
	}()
	return nil
}
