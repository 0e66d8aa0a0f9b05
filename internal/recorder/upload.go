// SPDX-License-Identifier: Apache-2.0

package recorder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http/httptrace"
	"net/netip"
	"os"
	"sync"
	"time"

	"tailscale.com/sessionrecording"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

const (
	// dialTimeout is how long one attempt to connect may take. The network stack of a
	// tailnet node, as a recorder is, drops packets from a port that it had a
	// connection from within the last minute. The next attempt uses another port.
	dialTimeout = 2 * time.Second
	// verdictTimeout is how long the result of an upload may take once its connection
	// has ended.
	verdictTimeout = time.Second
	// confirmTimeout is how long a recorder may take to confirm a whole recording.
	confirmTimeout = 5 * time.Second
)

// Upload is a recording on its way to a recorder. Its Write sends a part of it.
type Upload struct {
	io.WriteCloser
	recorder netip.AddrPort
	ended    chan struct{}
	err      error // how the upload ended
	abort    context.CancelFunc
	conns    *connections
}

// Upload connects to the recorder in recording that answers first, dialling as node.
// It asks all of them at once. The upload outlives ctx.
func (c *Client) Upload(ctx context.Context, node *tailnet.Node, recording *impersonate.Recording) (*Upload, error) {
	if len(recording.Recorders) == 0 {
		return nil, errNoAddress
	}
	n := c.as(node)
	recorders := recording.Recorders
	// kubectl tries a session that was refused once more, over another protocol, and
	// its user should not wait twice. A session that begins in any case is worth the
	// wait.
	if recording.Enforce {
		recorders = n.memory.order(recorders)
	}
	if len(recorders) == 0 {
		return nil, errHanging
	}
	return n.connect(ctx, recorders)
}

// attempt is the outcome of connecting to one recorder.
type attempt struct {
	*Upload
	result <-chan error
	err    error
}

// connect returns the upload to the recorder that answers first.
func (n *nodeClient) connect(ctx context.Context, recorders []netip.AddrPort) (*Upload, error) {
	attempts := make(chan attempt, len(recorders))
	waiting := make(map[netip.AddrPort]context.CancelFunc, len(recorders))
	for _, recorder := range recorders {
		uploading, abort := context.WithCancel(context.WithoutCancel(ctx))
		waiting[recorder] = abort
		u := &Upload{recorder: recorder, abort: abort, conns: &connections{dial: n.dial}}
		go func() {
			w, _, result, err := sessionrecording.ConnectToRecorder(u.conns.trace(uploading), []netip.AddrPort{recorder}, u.conns.dialContext)
			u.WriteCloser = w
			attempts <- attempt{u, result, err}
		}()
	}
	// Recorders that are not needed must not hold a connection.
	defer func() {
		left := len(waiting)
		for _, abort := range waiting {
			abort()
		}
		go func() {
			for range left {
				(<-attempts).Discard()
			}
		}()
	}()

	timer := time.NewTimer(timeout)
	defer timer.Stop()
	var errs []error
	for len(waiting) > 0 {
		select {
		case <-ctx.Done(): // says nothing about the recorders
			return nil, errors.Join(append(errs, ctx.Err())...)
		case <-timer.C:
			for recorder := range waiting {
				n.memory.noteTimeout(recorder)
			}
			return nil, errors.Join(append(errs, fmt.Errorf("no answer of %d recorders within %v", len(waiting), timeout))...)
		case a := <-attempts:
			delete(waiting, a.recorder)
			if a.err != nil {
				a.Discard()
				errs = append(errs, a.err)
				continue
			}
			n.memory.noteAnswer(a.recorder)
			a.ended = make(chan struct{})
			go a.wait(a.result)
			return a.Upload, nil
		}
	}
	return nil, errors.Join(errs...)
}

// Recorder returns the address of the recorder.
func (u *Upload) Recorder() netip.AddrPort { return u.recorder }

// Ended returns a channel that is closed when the upload has ended.
func (u *Upload) Ended() <-chan struct{} { return u.ended }

// Err returns how the upload ended, nil if the recorder ended it without an error. It
// must not be called before Ended is closed.
func (u *Upload) Err() error { return u.err }

// wait waits until the upload has ended.
func (u *Upload) wait(result <-chan error) {
	defer close(u.ended)
	conn := u.conns.last()
	var gone <-chan struct{}
	if conn != nil {
		gone = conn.gone
	}
	select {
	case u.err = <-result:
		return
	case <-gone:
	}
	timer := time.NewTimer(verdictTimeout)
	defer timer.Stop()
	select {
	case u.err = <-result:
	case <-timer.C:
		u.err = fmt.Errorf("the connection has ended: %w", conn.err)
	}
}

// Discard aborts the upload, in whatever state it is.
func (u *Upload) Discard() {
	u.abort()
	if u.WriteCloser != nil {
		_ = u.Close()
	}
	u.conns.close()
}

// Complete ends the upload. It returns an error unless the recorder confirms within a
// few seconds that it has the whole recording.
func (u *Upload) Complete() error {
	defer u.Discard()
	if err := u.Close(); err != nil {
		return err
	}
	timer := time.NewTimer(confirmTimeout)
	defer timer.Stop()
	select {
	case <-u.ended:
		return u.err
	case <-timer.C:
		return errors.New("it does not confirm the recording")
	}
}

// connections are the connections of one upload. Tailscale's client may open more of
// them than it uses, and keeps some open for half a minute after the upload.
type connections struct {
	dial dialFunc

	mu     sync.Mutex
	open   []*connection
	used   *connection // by the latest request, which is the upload in the end
	closed bool
}

// connection notes when it has ended. Tailscale's client does not see that until it
// has something to send.
type connection struct {
	net.Conn
	once sync.Once
	gone chan struct{} // closed when the connection has ended
	err  error         // how it ended
}

// Read implements [net.Conn].
func (c *connection) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.once.Do(func() {
			c.err = err
			close(c.gone)
		})
	}
	return n, err
}

// dialContext connects. It tries again, from another port, when an attempt times out.
func (c *connections) dialContext(ctx context.Context, network, address string) (net.Conn, error) {
	for {
		attempt, cancel := context.WithTimeout(ctx, dialTimeout)
		conn, err := c.dial(attempt, network, address)
		timedOut := attempt.Err() != nil
		cancel()
		if err != nil {
			if timedOut && ctx.Err() == nil {
				continue
			}
			return nil, err
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.closed {
			_ = conn.Close()
			return nil, net.ErrClosed
		}
		opened := &connection{Conn: conn, gone: make(chan struct{})}
		c.open = append(c.open, opened)
		return opened, nil
	}
}

// trace returns a ctx for requests whose connection last returns.
func (c *connections) trace(ctx context.Context) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(got httptrace.GotConnInfo) {
		if conn, ok := got.Conn.(*connection); ok {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.used = conn
		}
	}})
}

// last returns the connection of the latest request, nil if it is not known.
func (c *connections) last() *connection {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.used
}

// close closes all connections, and those that are still being dialled once they are
// open.
func (c *connections) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for _, conn := range c.open {
		_ = conn.Close()
	}
	c.open = nil
}
