// SPDX-License-Identifier: Apache-2.0

package recorder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordertest"
)

// recording is what grants say about recording.
type recording = impersonate.Recording

// However many recorders are dead, a caller waits for one timeout.
func TestUpload_DeadRecordersCostOneTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		u, err := newClient(t).Upload(t.Context(), newNetwork(t).node(), &recording{Recorders: []netip.AddrPort{first, second, third}})
		if u != nil || err == nil {
			t.Fatal("got a recorder")
		}
		if took := time.Since(began); took != timeout {
			t.Errorf("it took %v; want %v", took, timeout)
		}
		synctest.Wait() // synctest fails the test if goroutines are left
	})
}

// kubectl tries a session that is refused once more, over another protocol.
func TestUpload_SecondEnforcedAttemptFailsAtOnce(t *testing.T) {
	for _, tt := range []struct {
		name      string
		recorders []netip.AddrPort
		enforce   bool
		want      time.Duration
	}{
		{"enforced", []netip.AddrPort{first, third}, true, 0},
		{"enforced, and another refuses connections", []netip.AddrPort{first, second}, true, 0},
		{"not enforced", []netip.AddrPort{first}, false, timeout},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, node := newClient(t), newNetwork(t).node()
				for _, want := range []time.Duration{timeout, tt.want} {
					began := time.Now()
					if _, err := c.Upload(t.Context(), node, &recording{Recorders: tt.recorders, Enforce: tt.enforce}); err == nil {
						t.Fatal("got a recorder")
					}
					if took := time.Since(began); took != want {
						t.Errorf("it took %v; want %v", took, want)
					}
				}
			})
		})
	}
}

func TestUpload_RecorderIsTriedAgain(t *testing.T) {
	r := recordertest.Start(t) // outside of the bubble, in which Tailscale's client leaves timers
	c, node := newClient(t), new(network).node()
	node.DialPeer = func(ctx context.Context, _, _ string) (net.Conn, error) { return r.Dial(ctx) }
	c.as(node).memory.note(first, time.Now().Add(-timeout))
	u, err := c.Upload(t.Context(), node, &recording{Recorders: []netip.AddrPort{first}, Enforce: true})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Discard()
	if len(c.as(node).memory.late) > 0 {
		t.Error("the recorder is still remembered as late after it answered")
	}
}

// Sessions and events share one memory.
func TestUpload_TimeoutSparesEventsTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, node := newClient(t), newNetwork(t).node()
		if _, err := c.Upload(t.Context(), node, &recording{Recorders: []netip.AddrPort{first}}); err == nil {
			t.Fatal("got a recorder")
		}
		began := time.Now()
		if err := c.Send(t.Context(), node, []netip.AddrPort{first}, []byte("{}")); !errors.Is(err, errHanging) {
			t.Errorf("got error %v; want %v", err, errHanging)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("it took %v; want no time", took)
		}
	})
}

func TestUpload_WithoutAddress(t *testing.T) {
	if _, err := newClient(t).Upload(t.Context(), new(network).node(), &recording{Unresolved: true}); !errors.Is(err, errNoAddress) {
		t.Errorf("got error %v; want %v", err, errNoAddress)
	}
}

// A caller that goes away is not waited for, and says nothing about the recorders.
func TestUpload_EndsWithRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		c, node := newClient(t), newNetwork(t).node()
		began := time.Now()
		if u, err := c.Upload(ctx, node, &recording{Recorders: []netip.AddrPort{first}, Enforce: true}); u != nil || err == nil {
			t.Fatal("got a recorder")
		}
		if took := time.Since(began); took != time.Second {
			t.Errorf("it took %v; want 1s", took)
		}
		if len(c.as(node).memory.late) > 0 {
			t.Error("the recorder is remembered as late")
		}
	})
}

// All recorders are asked at once, so their order does not matter.
func TestUpload_FindsRecorderThatAnswers(t *testing.T) {
	nw := newNetwork(t, third)
	began := time.Now()
	u, err := newClient(t).Upload(t.Context(), nw.node(), &recording{Recorders: []netip.AddrPort{first, second, third}})
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > dialTimeout {
		t.Errorf("it took %v", took)
	}
	if u.Recorder() != third {
		t.Errorf("got recorder %v; want %v", u.Recorder(), third)
	}
	if _, err := u.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := u.Complete(); err != nil {
		t.Errorf("the recording is not complete: %v", err)
	}
	recordings := nw.recorders[third].Take()
	if len(recordings) != 1 || string(recordings[0].Bytes()) != "x" {
		t.Errorf("the recorder has %d recordings", len(recordings))
	}
}

// A recorder confirms the parts that it has received.
func TestUpload_CompleteNeedsConfirmation(t *testing.T) {
	broken := errors.New("broken")
	for _, tt := range []struct {
		name  string
		close error
		ended bool
		err   error // of the upload
		want  string
	}{
		{"confirmed", nil, true, nil, "<nil>"},
		{"failed", nil, true, broken, "broken"},
		{"its end cannot be sent", broken, true, nil, "broken"},
		{"no answer", nil, false, nil, "it does not confirm the recording"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := &Upload{WriteCloser: closer{err: tt.close}, ended: make(chan struct{}), abort: func() {}, conns: new(connections), err: tt.err}
				if tt.ended {
					close(u.ended)
				}
				if got := fmt.Sprint(u.Complete()); got != tt.want {
					t.Errorf("got %s; want %s", got, tt.want)
				}
			})
		})
	}
}

// closer is an upload whose Close returns err.
type closer struct {
	io.Writer
	err error
}

// Close implements [io.Closer].
func (c closer) Close() error { return c.err }

// Tailscale's client may open a connection that it does not use.
func TestUpload_WatchesConnectionInUse(t *testing.T) {
	nw := newNetwork(t, first)
	conns := &connections{dial: nw.dial}
	defer conns.close()
	client := &http.Client{Transport: &http.Transport{DialContext: conns.dialContext}}
	req, err := http.NewRequestWithContext(conns.trace(t.Context()), http.MethodHead, "http://"+first.String()+"/v2/record", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if _, err := conns.dialContext(t.Context(), "tcp", first.String()); err != nil {
		t.Fatal(err)
	}
	u := &Upload{conns: conns, ended: make(chan struct{})}
	go u.wait(make(chan error))
	nw.recorders[first].Cut()
	select {
	case <-u.Ended():
	case <-time.After(10 * time.Second):
		t.Fatal("the end of the connection goes unnoticed")
	}
	if u.Err() == nil {
		t.Error("got no error; want one")
	}
}

// The network stack of a recorder drops packets from a port that it has known before.
func TestConnections_DialTriesOtherPorts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tries := 0
		c := &connections{dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			if tries++; tries < 3 {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return nil, errors.New("connection refused")
		}}
		began := time.Now()
		if _, err := c.dialContext(t.Context(), "tcp", first.String()); err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("got error %v", err)
		}
		if tries != 3 || time.Since(began) != 2*dialTimeout {
			t.Errorf("%d tries took %v", tries, time.Since(began))
		}
	})
}

// A connection that opens after the upload was discarded would stay open.
func TestConnections_LateConnectionIsClosed(t *testing.T) {
	recorder, proxy := net.Pipe()
	c := new(connections)
	c.dial = func(context.Context, string, string) (net.Conn, error) {
		c.close()
		return proxy, nil
	}
	if _, err := c.dialContext(t.Context(), "tcp", first.String()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got error %v; want %v", err, net.ErrClosed)
	}
	_ = recorder.SetReadDeadline(time.Now()) // fails if recorder is closed
	if _, err := recorder.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the recorder reads %v; want %v", err, io.EOF)
	}
}
