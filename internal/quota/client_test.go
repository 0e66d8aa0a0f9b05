// SPDX-License-Identifier: Apache-2.0

package quota

import (
	"bufio"
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"
)

// stalled is the response writer of a client that reads nothing until reads is closed.
type stalled struct {
	http.ResponseWriter
	reads    <-chan struct{}
	hijacked func() net.Conn
}

func (s *stalled) Write(p []byte) (int, error) { <-s.reads; return len(p), nil }

func (s *stalled) FlushError() error { <-s.reads; return nil }

func (s *stalled) Hijack() (net.Conn, *bufio.ReadWriter, error) { return s.hijacked(), nil, nil }

// stalledConn is the connection of such a client.
type stalledConn struct {
	net.Conn
	reads <-chan struct{}
}

func (s *stalledConn) Write(p []byte) (int, error) { <-s.reads; return len(p), nil }

// What is written to a client that reads nothing waits in the network stack of the node.
func TestClient_UnreadCounts(t *testing.T) {
	for _, tt := range []struct {
		name  string
		proto int
		// write writes what the client does not read, and returns when it has.
		write func(t *testing.T, w http.ResponseWriter, handled func())
		state http.ConnState // after that
	}{
		{"a part of an answer", 1, func(_ *testing.T, w http.ResponseWriter, handled func()) {
			_, _ = w.Write([]byte("x"))
			handled()
		}, http.StateIdle},
		{"a stream", 2, func(t *testing.T, w http.ResponseWriter, handled func()) {
			if err := http.NewResponseController(w).Flush(); err != nil {
				t.Error(err)
			}
			handled()
		}, http.StateIdle},
		{"a session", 1, func(t *testing.T, w http.ResponseWriter, handled func()) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Fatal(err)
			}
			_, _ = conn.Write([]byte("x"))
			handled()
		}, http.StateHijacked},
		{"the end of an answer", 1, func(_ *testing.T, w http.ResponseWriter, handled func()) {
			handled()
			<-w.(interface{ Unwrap() http.ResponseWriter }).Unwrap().(*stalled).reads
		}, http.StateClosed},
	} {
		for _, affordable := range []bool{true, false} {
			synctest.Test(t, func(t *testing.T) {
				b := &Budget{Size: 10 * unread}
				if !affordable {
					b.Size = 2 * unread
				}
				raw, _ := net.Pipe()
				r, cancel := request(1, "/api")
				defer cancel()
				r.ProtoMajor = tt.proto
				r = r.WithContext(b.ConnContext(r.Context(), raw))
				time.Sleep(time.Minute)
				b.ConnState(raw, http.StateActive)
				if got := b.holds(peer(1)); got != connection {
					t.Errorf("%s: %d bytes are held before anything was written; want %d", tt.name, got, connection)
				}
				reads := make(chan struct{})
				if tt.state == http.StateClosed {
					// handle_errors handles a request again.
					_, charge, err := b.Admit(httptest.NewRecorder(), r)
					if err != nil {
						t.Fatal(err)
					}
					charge.Close()
				}
				w, charge, err := b.Admit(&stalled{httptest.NewRecorder(), reads, func() net.Conn {
					b.ConnState(raw, http.StateHijacked)
					return &stalledConn{raw, reads}
				}}, r)
				if err != nil {
					t.Fatal(err)
				}
				before, over := b.holds(peer(1)), make(chan struct{})
				go func() {
					defer close(over)
					tt.write(t, w, charge.Close)
				}()
				time.Sleep(readWithin - time.Millisecond)
				if got := b.holds(peer(1)); got > before {
					t.Errorf("%s: %d bytes more are held at once", tt.name, got-before)
				}
				before = b.holds(peer(1)) // HTTP/1.1 may have ended
				time.Sleep(2 * time.Millisecond)
				synctest.Wait()
				if got := b.holds(peer(1)) - before; affordable && got != unread {
					t.Errorf("%s, unread: %d bytes more are held; want %d", tt.name, got, unread)
				}
				if closed := context.Cause(r.Context()) != nil; closed == affordable {
					t.Errorf("%s, unread, with a budget of %d bytes: the connection was closed: %t", tt.name, b.Size, closed)
				}
				close(reads)
				<-over
				if b.ConnState(raw, tt.state); tt.state == http.StateIdle {
					b.ConnState(raw, http.StateActive)
				}
				time.Sleep(time.Hour)
				if got := b.holds(peer(1)); got > before {
					t.Errorf("%s: %d bytes more are held after it has been read", tt.name, got-before)
				}
				cancel()
				b.ConnState(raw, http.StateClosed)
				synctest.Wait()
				if b.held != 0 || len(b.callers) != 0 {
					t.Errorf("%s: %d bytes and %v are left", tt.name, b.held, b.callers)
				}
			})
		}
	}
}

// A client that reads one of several streams reads.
func TestClient_ProgressOfAnyStreamCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &Budget{Size: 10 * unread}
		c, _ := net.Pipe()
		r, cancel := request(1, "/api?watch=true")
		defer cancel()
		b.ConnContext(r.Context(), c)
		w := b.conns[c].writing
		b.ConnState(c, http.StateActive)
		w.begin() // and never ends
		for range 5 {
			w.begin()
			time.Sleep(readWithin * 2 / 3)
			w.end()
			time.Sleep(readWithin * 2 / 3)
		}
		if got := b.holds(peer(1)); got != connection {
			t.Errorf("%d bytes are held while one of two streams is read; want %d", got, connection)
		}
		time.Sleep(readWithin)
		synctest.Wait()
		if got := b.holds(peer(1)); got != connection+unread {
			t.Errorf("%d bytes are held when none is; want %d", got, connection+unread)
		}
		w.begin() // another one
		time.Sleep(2 * readWithin)
		if got := b.holds(peer(1)); got != connection+unread {
			t.Errorf("%d bytes are held when two are not; want %d", got, connection+unread)
		}
		w.end()
		w.end()
		b.ConnState(c, http.StateClosed)
		if b.held != 0 {
			t.Errorf("%d bytes are left", b.held)
		}
	})
}
