// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"cmp"
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade"
)

const (
	// farewellTimeout is how long a client may take to read why its session ends.
	farewellTimeout = 2 * time.Second
	readBuffer      = 32 << 10
)

// conn is the client's connection of a session. It forwards only whole frames that it
// understands, in both directions.
type conn struct {
	net.Conn
	in, out  filter
	farewell func(reason string) []byte
	// cancel cancels the request to the API server.
	cancel context.CancelFunc
	// ctx is that of endWith, nil if it was not called.
	ctx context.Context

	// Only Read uses the following fields. early holds what the client sent before the
	// connection was hijacked.
	early  []byte
	buffer []byte
	ready  []byte // whole frames, to be returned
	err    error  // to be returned after ready

	write  sync.Mutex // held while writing
	broken bool       // a frame was written only in part

	mu     sync.Mutex
	reason error         // why the session was ended, nil if it was not
	said   chan struct{} // closed once the client was told
}

func newConn(nc net.Conn, early []byte, p protocol, cancel context.CancelFunc) *conn {
	return &conn{
		Conn: nc, early: early, buffer: make([]byte, readBuffer), cancel: cancel, said: make(chan struct{}),
		in: filter{next: p.fromClient}, out: filter{next: p.fromServer}, farewell: p.farewell,
	}
}

// endWith ends the session when ctx is cancelled with a cause, and tells the client the
// cause. It must be called before c is used.
func (c *conn) endWith(ctx context.Context) {
	c.ctx = ctx
	context.AfterFunc(ctx, func() {
		if cause := c.cancelled(); cause != nil {
			c.end(cause)
		}
	})
}

// cancelled returns the cause with which the context was cancelled, nil if it was not, or
// without a cause: the request is over, or the client has gone away.
func (c *conn) cancelled() error {
	if c.ctx == nil || c.ctx.Err() == nil {
		return nil
	}
	if cause := context.Cause(c.ctx); cause != context.Canceled { //nolint:errorlint // causes are a context.Canceled as well
		return cause
	}
	return nil
}

// Read implements [net.Conn]. It returns what the client sends.
func (c *conn) Read(p []byte) (int, error) {
	for len(c.ready) == 0 {
		if err := c.failed(); err != nil {
			return 0, c.drain(err)
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
	if err := c.cancelled(); err != nil {
		return 0, c.drain(err)
	}
	n := copy(p, c.ready)
	c.ready = c.ready[n:]
	return n, nil
}

// drain discards what the client sends after the session was ended, until the client was
// told why and has closed the connection. It returns reason.
func (c *conn) drain(reason error) error {
	<-c.said
	for c.err == nil {
		_, c.err = c.Conn.Read(c.buffer)
	}
	return reason
}

// Write implements [net.Conn]. It sends to the client what comes from the API server.
func (c *conn) Write(p []byte) (int, error) {
	err := c.writeFrames(p)
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c *conn) writeFrames(p []byte) error {
	// One goroutine writes what comes from the API server. Caddy uses another one to
	// write the last frame of a WebSocket that it is about to close. If that waited for
	// a client that does not read, it would block the reload of the config.
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

// end ends the session, and tells the client why. Only the first call has an effect.
func (c *conn) end(reason error) {
	c.mu.Lock()
	if c.reason != nil {
		c.mu.Unlock()
		return
	}
	c.reason = reason
	c.mu.Unlock()

	// A client that does not read blocks Write, which holds the lock.
	_ = c.SetWriteDeadline(time.Now().Add(farewellTimeout))
	c.write.Lock()
	// After a part of a frame, the client would read the farewell as the rest of it.
	if !c.broken {
		_, _ = c.Conn.Write(c.farewell(shorten("The session was ended by the proxy: " + reason.Error())))
	}
	c.write.Unlock()
	_ = c.Conn.Close() // when the client has had the time to read
	close(c.said)
	// reverse_proxy may be waiting for a pod that neither reads nor prints.
	c.cancel()
}

// failed returns why the session was ended or is about to be, nil if it is not.
func (c *conn) failed() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return cmp.Or(c.reason, c.cancelled())
}

// CloseWrite closes the connection: the API server says no more.
func (c *conn) CloseWrite() error { return c.Close() }

// Close closes the connection. If the session was ended, end does that after it has told
// the client why.
func (c *conn) Close() error {
	if c.failed() != nil {
		return nil
	}
	return c.Conn.Close()
}
