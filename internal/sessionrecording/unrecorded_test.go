// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
)

// unrecordedConn returns the connection of a session that is not recorded, and what ends it.
func unrecordedConn(t *testing.T, w *wire, early string) (*conn, context.CancelCauseFunc) {
	t.Helper()
	p, err := terminalProtocol(unobserved{}, false, websocketUpgrade, "v5.channel.k8s.io")
	if err != nil {
		t.Fatal(err)
	}
	c := newConn(w, []byte(early), &lenient{protocol: p}, func() {})
	ctx, cancel := context.WithCancelCause(t.Context())
	c.endWith(ctx)
	return c, cancel
}

// What nobody records need not be understood.
func TestUnrecorded_PassesWhatItDoesNotUnderstand(t *testing.T) {
	for _, tt := range []struct{ name, sent string }{
		{"unknown channel", wsServer("\x09x")},
		{"reserved bits", "\xf2\x01x"},
		{"the start of a long frame", "\x82\x7f\x00\x00\x00\x00\x00\x40\x00\x00" + strings.Repeat("x", maxHeld+1)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := new(wire)
			c, end := unrecordedConn(t, w, "\xf2\x01x")
			for _, sent := range []string{wsServer("\x01known"), tt.sent, "anything"} {
				if n, err := c.Write([]byte(sent)); n != len(sent) || err != nil {
					t.Errorf("got %d, %v", n, err)
				}
			}
			if want := wsServer("\x01known") + tt.sent + "anything"; w.wrote.String() != want {
				t.Errorf("%.100q passes; want %.100q", w.wrote.String(), want)
			}
			b := make([]byte, 100)
			if n, err := c.Read(b); string(b[:n]) != "\xf2\x01x" || err != nil {
				t.Errorf("%q passes to the pod, %v", b[:n], err)
			}
			// Frames may begin anywhere from now on.
			wrote := w.wrote.Len()
			end(errors.New("the reason"))
			<-c.said
			if w.wrote.Len() != wrote {
				t.Errorf("the client is told %q, perhaps within a frame", w.wrote.String()[wrote:])
			}
		})
	}
}

func TestUnrecorded_TellsOnlyCauses(t *testing.T) {
	w := new(wire)
	c, end := unrecordedConn(t, w, "")
	end(nil) // the request is over
	if err := c.failed(); err != nil {
		t.Errorf("the session was ended: %v", err)
	}
	w = new(wire)
	c, end = unrecordedConn(t, w, wsClient("\x00late"))
	end(errors.New("the reason"))
	if n, err := c.Write([]byte(wsServer("\x01late"))); n != 0 || err == nil {
		t.Errorf("%d bytes pass after the end, %v", n, err)
	}
	if n, err := c.Read(make([]byte, 100)); n != 0 || err == nil {
		t.Errorf("%d bytes pass to the pod after the end, %v", n, err)
	}
	// Nothing passes before the client was told, either.
	cancelled, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("the reason"))
	if n, err := (&conn{Conn: new(wire), ctx: cancelled}).Write([]byte("late")); n != 0 || err == nil {
		t.Errorf("%d bytes pass once the request has ended, %v", n, err)
	}
	<-c.said
	if got := w.wrote.String(); !strings.Contains(got, "the reason") || strings.Contains(got, "late") {
		t.Errorf("the client reads %q; want only the reason", got)
	}
}

// ending is a connection whose session is ended while it is read.
type ending struct {
	*wire
	end func()
}

// Read implements [net.Conn].
func (e *ending) Read(p []byte) (int, error) {
	if e.end == nil {
		return 0, io.EOF
	}
	e.end()
	e.end = nil
	return copy(p, wsClient("\x00late")), nil
}

func TestUnrecorded_ReadThatWaitsReturnsNothingAfterEnd(t *testing.T) {
	e := &ending{wire: new(wire)}
	c, end := unrecordedConn(t, e.wire, "")
	c.Conn = e
	e.end = func() { end(errors.New("the reason")) }
	if n, err := c.Read(make([]byte, 100)); n != 0 || err == nil || err.Error() != "the reason" {
		t.Errorf("%d bytes pass to the pod after the end, %v", n, err)
	}
}
