// SPDX-License-Identifier: Apache-2.0

package standin

import (
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// fakeListener is a net.Listener whose connections come from the test.
type fakeListener struct {
	conns  chan net.Conn
	closed chan struct{}
}

func newFakeListener() *fakeListener {
	return &fakeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

var errFakeClosed = errors.New("fake listener is closed")

func (l *fakeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, errFakeClosed
	}
}

func (l *fakeListener) Close() error {
	close(l.closed) // panics the second time, intentionally
	return nil
}

func (l *fakeListener) Addr() net.Addr { return &net.TCPAddr{Port: 443} }

// connect makes the listener accept a new connection, and returns it.
func (l *fakeListener) connect() *fakeConn {
	conn := new(fakeConn)
	l.conns <- conn
	return conn
}

type fakeConn struct {
	net.Conn
	closed atomic.Bool
}

func (c *fakeConn) Close() error {
	c.closed.Store(true)
	return nil
}

type accepted struct {
	conn net.Conn
	err  error
}

// accept calls Accept; in a bubble, synctest.Wait waits until that call waits.
func accept(h *handle) <-chan accepted {
	result := make(chan accepted, 1)
	go func() {
		conn, err := h.Accept()
		result <- accepted{conn, err}
	}()
	return result
}

// reload runs test with two handles on one listener, as the old and the new config
// have during a reload. When test has returned and both are closed, no goroutine of
// the listener may run, which synctest checks.
func reload(t *testing.T, linger bool, test func(t *testing.T, inner *fakeListener, old, current *handle)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		inner := newFakeListener()
		var released bool
		shared := share(inner, func() error { released = true; return nil })
		var uses atomic.Int32
		uses.Store(2)
		release := func() error {
			if uses.Add(-1) == 0 {
				return shared.Destruct()
			}
			return nil
		}
		old, current := newHandle(shared, linger, release), newHandle(shared, linger, release)
		test(t, inner, old, current)
		if err := errors.Join(old.Close(), current.Close()); err != nil {
			t.Errorf("closing the handles: %v", err)
		}
		if !released {
			t.Error("both handles are closed, but the node is not released")
		}
	})
}

func TestHandle_ClosedAcceptsNothing(t *testing.T) {
	reload(t, false, func(t *testing.T, inner *fakeListener, old, current *handle) {
		waits := accept(old)
		synctest.Wait()
		if err := old.Close(); err != nil {
			t.Fatal(err)
		}
		if got := <-waits; !errors.Is(got.err, net.ErrClosed) {
			t.Fatalf("Accept that waited when its handle was closed = %v, %v; want net.ErrClosed", got.conn, got.err)
		}

		conn := inner.connect()
		synctest.Wait() // until the connection can be accepted
		for range 20 {  // a select between both would pick either
			if got, err := old.Accept(); !errors.Is(err, net.ErrClosed) {
				t.Fatalf("Accept after Close = %v, %v; want net.ErrClosed", got, err)
			}
		}
		if got := <-accept(current); got.conn != conn {
			t.Fatalf("Accept of the new handle = %v, %v; want the connection", got.conn, got.err)
		}
	})
}

// If Close and a connection come at the same time, exactly one handle gets the
// connection.
func TestHandle_CloseAndConnectAtOnce(t *testing.T) {
	for range 500 {
		reload(t, false, func(t *testing.T, inner *fakeListener, old, current *handle) {
			first := accept(old)
			closed := make(chan error)
			go func() { closed <- old.Close() }()
			conn := inner.connect()
			second := accept(current)
			if err := <-closed; err != nil {
				t.Fatal(err)
			}
			got := <-first
			switch {
			case got.err == nil && got.conn == conn:
				synctest.Wait()
				select {
				case got := <-second:
					t.Fatalf("new handle got %v, %v; want it to wait, as the old handle has the connection", got.conn, got.err)
				default:
				}
				if err := current.Close(); err != nil {
					t.Fatal(err)
				}
				<-second
			case errors.Is(got.err, net.ErrClosed):
				if got := <-second; got.conn != conn {
					t.Fatalf("new handle got %v, %v; want the connection", got.conn, got.err)
				}
			default:
				t.Fatalf("old handle got %v, %v; want the connection or net.ErrClosed", got.conn, got.err)
			}
		})
	}
}

func TestHandle_LingeringAcceptsOneMore(t *testing.T) {
	reload(t, true, func(t *testing.T, inner *fakeListener, old, current *handle) {
		waits := accept(old)
		synctest.Wait()
		if err := old.Close(); err != nil {
			t.Fatal(err)
		}
		next := accept(current)
		synctest.Wait()

		conn := inner.connect()
		if got := <-waits; got.conn != conn {
			t.Fatalf("Accept that waited when its handle was closed = %v, %v; want the connection", got.conn, got.err)
		}
		if got, err := old.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Fatalf("second Accept after Close = %v, %v; want net.ErrClosed", got, err)
		}
		conn = inner.connect()
		if got := <-next; got.conn != conn {
			t.Fatalf("Accept of the new handle = %v, %v; want the connection", got.conn, got.err)
		}
	})
}

func TestHandle_LingeringEndsWithListener(t *testing.T) {
	reload(t, true, func(t *testing.T, _ *fakeListener, old, current *handle) {
		waits := accept(old)
		synctest.Wait()
		if err := errors.Join(old.Close(), current.Close()); err != nil {
			t.Fatal(err)
		}
		if got := <-waits; got.err == nil {
			t.Fatalf("Accept on a closed listener = %v; want an error", got.conn)
		}
	})
}

func TestListener_CloseClosesWaitingConnection(t *testing.T) {
	reload(t, false, func(t *testing.T, inner *fakeListener, old, current *handle) {
		conn := inner.connect()
		if err := errors.Join(old.Close(), current.Close()); err != nil {
			t.Fatal(err)
		}
		if !conn.closed.Load() {
			t.Error("the listener is closed; want its waiting connection closed too")
		}
	})
}

func TestListener_FailureReachesEveryHandle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inner := newFakeListener()
		shared := share(inner, func() error { return nil })
		nothing := func() error { return nil }
		waits := []<-chan accepted{accept(newHandle(shared, false, nothing)), accept(newHandle(shared, true, nothing))}
		synctest.Wait()
		inner.Close()
		for _, w := range waits {
			if got := <-w; !errors.Is(got.err, errFakeClosed) || !strings.HasPrefix(got.err.Error(), "accept tcp :443: ") {
				t.Errorf("Accept = %v, %v; want the listener's error with its address", got.conn, got.err)
			}
		}
	})
}

func TestHandle_Unwrap(t *testing.T) {
	reload(t, false, func(t *testing.T, inner *fakeListener, old, _ *handle) {
		if got := old.Unwrap(); got != net.Listener(inner) {
			t.Errorf("Unwrap() = %v; want the inner listener", got)
		}
	})
}
