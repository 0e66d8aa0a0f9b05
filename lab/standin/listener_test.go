// SPDX-License-Identifier: Apache-2.0

package standin

import (
	"errors"
	"net"
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
func (l *fakeListener) connect() net.Conn {
	conn, peer := net.Pipe()
	_ = peer.Close()
	l.conns <- conn
	return conn
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
// have during a reload. When test has returned and both are closed, no goroutine may
// run, which synctest checks.
func reload(t *testing.T, test func(t *testing.T, inner *fakeListener, old, current *handle)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		inner := newFakeListener()
		shared := &sharedListener{inner}
		uses := 2
		release := func() error {
			if uses--; uses == 0 {
				return shared.Destruct()
			}
			return nil
		}
		old, current := &handle{sharedListener: shared, release: release}, &handle{sharedListener: shared, release: release}
		test(t, inner, old, current)
		if err := errors.Join(old.Close(), current.Close()); err != nil {
			t.Errorf("closing the handles: %v", err)
		}
		if uses != 0 {
			t.Errorf("both handles are closed, and %d are in use; want 0", uses)
		}
	})
}

func TestHandle_ClosedWhileItWaitsAcceptsOneMore(t *testing.T) {
	reload(t, func(t *testing.T, inner *fakeListener, old, current *handle) {
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

func TestHandle_LastCloseEndsAccept(t *testing.T) {
	reload(t, func(t *testing.T, _ *fakeListener, old, current *handle) {
		waits := accept(old)
		synctest.Wait()
		if err := errors.Join(old.Close(), old.Close(), current.Close()); err != nil {
			t.Fatal(err)
		}
		if got := <-waits; !errors.Is(got.err, errFakeClosed) {
			t.Fatalf("Accept on a closed listener = %v, %v; want the listener's error", got.conn, got.err)
		}
	})
}

func TestHandle_Unwrap(t *testing.T) {
	reload(t, func(t *testing.T, inner *fakeListener, old, _ *handle) {
		if got := old.Unwrap(); got != net.Listener(inner) {
			t.Errorf("Unwrap() = %v; want the inner listener", got)
		}
	})
}
