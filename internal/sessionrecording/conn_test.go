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
)

// connected returns a session's connection, on which the client has sent early, with a
// channel that is closed when the connection cancels its request, and the client's end.
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

// hear reads what a session sends to its client. done ends that and returns it.
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

// announced is a connection that announces that it is read.
type announced struct {
	net.Conn
	begun chan struct{}
}

// Read implements [net.Conn].
func (a *announced) Read(p []byte) (int, error) {
	close(a.begun) // it is read only once
	return a.Conn.Read(p)
}

// Data after the end of a session is not recorded, so it must not be forwarded.
func TestConn_ForwardsNothingAfterEnd(t *testing.T) {
	reason := errors.New("the reason")

	// Read returns data that the client sent early without reading the connection.
	c, cancelled, client := connected(t, wsClient("\x00rm -r /\n"))
	done := hear(c, client)
	c.end(reason)
	select {
	case <-cancelled:
	default:
		t.Error("the request to the API server is not canceled")
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

	// A Read that waits for the client returns.
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
		t.Error("Read does not return")
	}
	done()
}

// A client that does not read the farewell does not block for long.
func TestConn_FarewellTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _, _ := connected(t, "")
		began := time.Now()
		c.end(errors.New("the reason"))
		if took := time.Since(began); took != farewellTimeout {
			t.Errorf("it took %v; want %v", took, farewellTimeout)
		}
	})
}

// The API server might parse what follows an invalid frame differently.
func TestConn_InvalidFrameEndsSession(t *testing.T) {
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

// Read, Close and SetWriteDeadline implement [net.Conn].
func (*wire) Read([]byte) (int, error)         { return 0, io.EOF }
func (*wire) Close() error                     { return nil }
func (*wire) SetWriteDeadline(time.Time) error { return nil }

// After a part of a frame, the client would read the farewell as output of the pod.
func TestConn_NoFarewellWithinFrame(t *testing.T) {
	w := &wire{cut: true}
	c := newConn(w, nil, binaryChannels(newNoted()), func() {})
	if _, err := c.Write([]byte(wsServer("\x01x"))); err == nil {
		t.Error("writing half a frame is not an error")
	}
	w.cut = false
	c.end(errors.New("the reason"))
	if w.wrote.Len() != 1 {
		t.Errorf("%q was written; want a byte", &w.wrote)
	}
}

// slow is a connection whose Write waits for goOn. It notes the calls.
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

func (s *slow) Close() error                   { s.done <- "close"; return nil }
func (*slow) Read([]byte) (int, error)         { return 0, io.EOF }
func (*slow) SetWriteDeadline(time.Time) error { return nil }

// reverse_proxy may close the connection of a session that ends, but the client is told
// why first.
func TestConn_FarewellPrecedesClose(t *testing.T) {
	s := newSlow()
	c := newConn(s, nil, binaryChannels(newNoted()), func() {})
	go c.end(errors.New("the reason"))
	<-s.writing
	if n, err := c.Write([]byte(wsServer("\x01x"))); n != 0 || err == nil || err.Error() != "the reason" {
		t.Errorf("output meanwhile: got %d bytes, %v; want the reason", n, err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case what := <-s.done:
		t.Errorf("%s, before the client was told", what)
	case <-time.After(100 * time.Millisecond): // long enough for a Close that does not wait
	}
	close(s.goOn)
	for _, want := range []string{"write", "close"} {
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

// recordsFirst is the observer of a session that prints on w. It fails t unless output
// is recorded before any of it is written to w.
type recordsFirst struct {
	*noted
	t   *testing.T
	w   *wire
	err error
}

func (o *recordsFirst) fromServer(s stream, p []byte) error {
	if o.w.wrote.Len() > 0 {
		o.t.Errorf("%q was sent to the client before it was recorded", &o.w.wrote)
	}
	return errors.Join(o.err, o.noted.fromServer(s, p))
}

func TestConn_RecordsBeforeForwarding(t *testing.T) {
	w := new(wire)
	o := &recordsFirst{noted: newNoted(), t: t, w: w}
	c := newConn(w, nil, binaryChannels(o), func() {})
	frame := wsServer("\x01secret")
	if _, err := c.Write([]byte(frame)); err != nil {
		t.Fatal(err)
	}
	if got := o.server[stdout]; got != "secret" {
		t.Errorf("recorded %q; want secret", got)
	}
	if got := w.wrote.String(); got != frame {
		t.Errorf("the client got %q; want %q", got, frame)
	}
}

func TestConn_DoesNotForwardWhatIsNotRecorded(t *testing.T) {
	w := new(wire)
	lost := errors.New("the recording is lost")
	c := newConn(w, nil, binaryChannels(&recordsFirst{newNoted(), t, w, lost}), func() {})
	if _, err := c.Write([]byte(wsServer("\x01secret"))); !errors.Is(err, lost) {
		t.Errorf("got error %v; want %v", err, lost)
	}
	if got := w.wrote.String(); strings.Contains(got, "secret") || !strings.Contains(got, lost.Error()) {
		t.Errorf("the client got %q; want only the reason", got)
	}
}
