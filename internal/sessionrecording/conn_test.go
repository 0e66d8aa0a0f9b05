// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
)

// connected returns a session's connection, which has read early before, with what
// tells whether it was cancelled, and the client's end of it.
func connected(t *testing.T, early string) (c *conn, cancelled <-chan struct{}, client net.Conn) {
	t.Helper()
	client, server := net.Pipe()
	cancel := make(chan struct{})
	c = newConn(server, []byte(early), binaryChannels(newNoted()), func() { close(cancel) })
	t.Cleanup(func() {
		_ = server.Close()
		_ = client.Close()
	})
	return c, cancel, client
}

// hear returns what the client of a session hears, until done is called.
func hear(c *conn, client net.Conn) (done func() string) {
	heard := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(client) // until it is closed
		heard <- string(b)
	}()
	return func() string {
		_ = c.Conn.Close()
		return <-heard
	}
}

// announced is a connection that says when it is read.
type announced struct {
	net.Conn
	begun chan struct{}
}

// Read implements [net.Conn].
func (a *announced) Read(p []byte) (int, error) {
	close(a.begun) // it is read once here
	return a.Conn.Read(p)
}

// What comes after the end of a session is not recorded any more.
func TestAfterItsEndNothingPasses(t *testing.T) {
	reason := errors.New("the reason")

	// What was sent ahead of the switch is there without anything being read.
	c, cancelled, client := connected(t, wsClient("\x00rm -r /\n"))
	done := hear(c, client)
	c.end(reason)
	select {
	case <-cancelled:
	default:
		t.Error("reverse_proxy goes on with it")
	}
	if n, err := c.Read(make([]byte, 100)); n != 0 || !errors.Is(err, reason) {
		t.Errorf("from the client: got %d bytes, %v; want %v", n, err, reason)
	}
	if _, err := c.Write([]byte(wsServer("\x01secret"))); !errors.Is(err, reason) {
		t.Errorf("from the API server: got error %v; want %v", err, reason)
	}
	if heard := done(); !strings.Contains(heard, "the reason") || strings.Contains(heard, "secret") {
		t.Errorf("the client hears %q; want the reason and no more", heard)
	}

	// Whoever reads does not wait for the client.
	c, _, client = connected(t, "")
	done = hear(c, client)
	begun := make(chan struct{})
	c.Conn = &announced{c.Conn, begun}
	read := make(chan error, 1)
	go func() {
		_, err := c.Read(make([]byte, 100))
		read <- err
	}()
	<-begun
	c.end(reason)
	select {
	case err := <-read:
		if !errors.Is(err, reason) {
			t.Errorf("got error %v; want %v", err, reason)
		}
	case <-time.After(10 * time.Second):
		t.Error("reading goes on")
	}
	done()
}

// A client that does not read why its session ends holds up nobody for long.
func TestSayingWhyHasAnEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _, _ := connected(t, "")
		began := time.Now()
		c.end(errors.New("the reason"))
		if took := time.Since(began); took != farewellTimeout {
			t.Errorf("it took %v; want %v", took, farewellTimeout)
		}
	})
}

// What is left of frames that nobody understands would be read in another way by the
// API server.
func TestAClientThatIsNotUnderstoodIsNotHeardAnyMore(t *testing.T) {
	c, cancelled, client := connected(t, wsClient("\x00ls\n")+wsClient("\x05x")+wsClient("\x00id\n"))
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil { // or it would wait for ever
		t.Fatal(err)
	}
	done := hear(c, client)
	got, err := io.ReadAll(c)
	if want := wsClient("\x00ls\n"); string(got) != want {
		t.Errorf("%q passes; want %q", got, want)
	}
	if err == nil || !strings.Contains(err.Error(), "channel 5") {
		t.Errorf("got error %v; want one that mentions channel 5", err)
	}
	select {
	case <-cancelled:
	default:
		t.Error("the session goes on")
	}
	if heard := done(); !strings.Contains(heard, "channel 5") {
		t.Errorf("the client hears %q; want the reason", heard)
	}
}

// wire is a connection that keeps what is written, or a byte of it if it is cut.
type wire struct {
	net.Conn
	wrote bytes.Buffer
	cut   bool
}

// Write implements [net.Conn].
func (w *wire) Write(p []byte) (int, error) {
	if w.cut {
		w.wrote.Write(p[:1])
		return 1, io.ErrShortWrite
	}
	return w.wrote.Write(p)
}

// SetReadDeadline and SetWriteDeadline implement [net.Conn].
func (*wire) SetReadDeadline(time.Time) error  { return nil }
func (*wire) SetWriteDeadline(time.Time) error { return nil }

// In the midst of a frame, what the proxy says would be taken for the pod's.
func TestNothingIsSaidInTheMidstOfAFrame(t *testing.T) {
	w := &wire{cut: true}
	c := newConn(w, nil, binaryChannels(newNoted()), func() {})
	if _, err := c.Write([]byte(wsServer("\x01x"))); err == nil {
		t.Error("half a frame is said to be written")
	}
	w.cut = false
	c.end(errors.New("the reason"))
	if w.wrote.Len() != 1 {
		t.Errorf("%q was written; want a byte", &w.wrote)
	}
}

// slow is a connection on which writing takes until it is let go on. It notes what is
// done with it.
type slow struct {
	net.Conn
	writing, goOn chan struct{}
	done          chan string
}

func newSlow() *slow {
	return &slow{writing: make(chan struct{}), goOn: make(chan struct{}), done: make(chan string, 10)}
}

func (s *slow) Write(p []byte) (int, error) {
	close(s.writing)
	<-s.goOn
	s.done <- "write"
	return len(p), nil
}

func (s *slow) CloseWrite() error              { s.done <- "close for writing"; return nil }
func (s *slow) Close() error                   { s.done <- "close"; return nil }
func (*slow) Read([]byte) (int, error)         { return 0, io.EOF }
func (*slow) SetReadDeadline(time.Time) error  { return nil }
func (*slow) SetWriteDeadline(time.Time) error { return nil }

// Whoever else notices that a session ends may close its connection, but not before
// its user has been told why.
func TestAClientIsToldWhyBeforeItsConnectionIsClosed(t *testing.T) {
	s := newSlow()
	c := newConn(s, nil, binaryChannels(newNoted()), func() {})
	go c.end(errors.New("the reason"))
	<-s.writing
	if n, err := c.Write([]byte(wsServer("\x01x"))); n != 0 || err == nil || err.Error() != "the reason" {
		t.Errorf("what comes from the API server meanwhile: got %d bytes, %v; want the reason", n, err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case what := <-s.done:
		t.Errorf("%s, before the client was told", what)
	case <-time.After(100 * time.Millisecond): // in which a Close that does not wait is through
	}
	close(s.goOn)
	for _, want := range []string{"write", "close for writing", "close"} {
		select {
		case got := <-s.done:
			if got != want {
				t.Errorf("got %s; want %s", got, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("no %s", want)
		}
	}
}

// What ends a session may come before its connection has been taken over.
func TestASessionThatHasToEndEndsAsItBegins(t *testing.T) {
	s := &Session{kind: forward, log: zap.NewNop()}
	s.end(errRecorderLost)
	c := newConn(new(wire), []byte(wsClient("\x00ls\n")), binaryChannels(newNoted()), func() {})
	s.begin(c)
	if n, err := c.Read(make([]byte, 100)); n != 0 || !errors.Is(err, errRecorderLost) {
		t.Errorf("got %d bytes, %v; want %v", n, err, errRecorderLost)
	}
}
