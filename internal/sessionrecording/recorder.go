// SPDX-License-Identifier: Apache-2.0

package sessionrecording

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
)

// connectTimeout is how long all recorders together may take to answer.
const connectTimeout = 5 * time.Second

// dialAttempt is how long a recorder may take to answer from one port. The network
// stack of a tailnet node, which a recorder is, drops whatever comes from a port
// that it had a connection from a minute ago; the next attempt is from another.
const dialAttempt = 2 * time.Second

// DialFunc connects to an address of the tailnet.
type DialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// upload is a recording on its way to a recorder.
type upload struct {
	io.WriteCloser
	recorder netip.AddrPort
	// ended is closed when the upload has ended, err says how.
	ended chan struct{}
	err   error
	abort context.CancelFunc
	conns *connections
}

// connections are those of one upload. The client opens more of them than it uses at
// times, and keeps some open for half a minute after it is done with them.
type connections struct {
	dial DialFunc

	mu     sync.Mutex
	open   []*connection
	used   *connection // by the latest request, which is the upload in the end
	closed bool
}

// connection notes when it has ended. The client that uses it does not see that
// until it has something to send.
type connection struct {
	net.Conn
	once sync.Once
	gone chan struct{} // closed when it has ended
	err  error         // how
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

// dialOnce connects, trying again from other ports.
func (c *connections) dialOnce(ctx context.Context, network, address string) (net.Conn, error) {
	for {
		attempt, cancel := context.WithTimeout(ctx, dialAttempt)
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

// trace returns ctx for requests whose connection is to be known.
func (c *connections) trace(ctx context.Context) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(got httptrace.GotConnInfo) {
		if conn, ok := got.Conn.(*connection); ok {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.used = conn
		}
	}})
}

// last returns the connection of the latest request, nil if that is not known.
func (c *connections) last() *connection {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.used
}

func (c *connections) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for _, conn := range c.open {
		_ = conn.Close()
	}
	c.open = nil
}

// connect returns the upload to the recorder that answers first, all being asked at
// once. It is an error if none has within the timeout, or before ctx ends. The
// upload outlives ctx.
func connect(ctx context.Context, recorders []netip.AddrPort, dial DialFunc, timeout time.Duration) (*upload, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	type attempt struct {
		*upload
		result <-chan error
		err    error
	}
	attempts := make(chan attempt, len(recorders))
	aborts := make(map[netip.AddrPort]context.CancelFunc, len(recorders))
	for _, recorder := range recorders {
		uploading, abort := context.WithCancel(context.WithoutCancel(ctx))
		aborts[recorder] = abort
		u := &upload{recorder: recorder, abort: abort, conns: &connections{dial: dial}}
		go func() {
			w, _, result, err := sessionrecording.ConnectToRecorder(u.conns.trace(uploading), []netip.AddrPort{recorder}, u.conns.dialOnce)
			u.WriteCloser = w
			attempts <- attempt{u, result, err}
		}()
	}

	var won *upload
	var result <-chan error
	var errs []error
	left := len(recorders)
	for won == nil && left > 0 && ctx.Err() == nil {
		select {
		case <-ctx.Done():
			errs = append(errs, fmt.Errorf("no answer of %d recorders within %v", left, timeout))
		case a := <-attempts:
			left--
			if a.err != nil {
				a.discard()
				errs = append(errs, a.err)
				continue
			}
			won, result = a.upload, a.result
		}
	}
	for recorder, abort := range aborts {
		if won == nil || won.recorder != recorder {
			abort()
		}
	}
	go func() {
		for range left {
			(<-attempts).discard()
		}
	}()
	if won == nil {
		return nil, errors.Join(errs...)
	}
	won.ended = make(chan struct{})
	go won.wait(result)
	return won, nil
}

// verdictTimeout is how long after its connection an upload may say how it has ended.
const verdictTimeout = time.Second

// wait waits until the upload has ended.
func (u *upload) wait(result <-chan error) {
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

// discard cuts the upload off, whatever has become of it.
func (u *upload) discard() {
	u.abort()
	if u.WriteCloser != nil {
		_ = u.Close()
	}
	u.conns.close()
}

// complete ends the upload and returns an error unless the recorder says within a
// few seconds that it has all of it.
func (u *upload) complete() error {
	defer u.discard()
	if err := u.Close(); err != nil {
		return err
	}
	timer := time.NewTimer(stall)
	defer timer.Stop()
	select {
	case <-u.ended:
		return u.err
	case <-timer.C:
		return errors.New("it does not confirm the recording")
	}
}
