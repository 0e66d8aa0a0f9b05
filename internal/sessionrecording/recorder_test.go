// SPDX-License-Identifier: Apache-2.0

package sessionrecording

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

	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordertest"
)

var (
	first  = netip.MustParseAddrPort("100.64.0.7:80")
	second = netip.MustParseAddrPort("100.64.0.8:80")
	third  = netip.MustParseAddrPort("[fd7a:115c:a1e0::9]:80")
)

// nobody does not answer.
func nobody(ctx context.Context, _, _ string) (net.Conn, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// startRecorder starts a recorder, and returns it with what dials it whatever the
// address.
func startRecorder(t *testing.T) (*recordertest.Recorder, DialFunc) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := recordertest.New()
	served := make(chan error, 1)
	go func() { served <- r.Serve(ln) }()
	t.Cleanup(func() {
		if err := errors.Join(r.Close(), <-served); err != nil {
			t.Error(err)
		}
	})
	return r, func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, ln.Addr().String())
	}
}

// However many recorders are dead, a caller waits once.
func TestDeadRecordersCostOneTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		u, err := connect(t.Context(), []netip.AddrPort{first, second, third}, nobody, connectTimeout)
		if u != nil || err == nil {
			t.Fatal("got a recorder")
		}
		if took := time.Since(began); took != 5*time.Second {
			t.Errorf("it took %v; want 5s", took)
		}
		synctest.Wait() // or the bubble says that goroutines are left
	})
}

// The client opens a connection at times that it does not use then.
func TestTheConnectionOfTheUploadIsWatched(t *testing.T) {
	r, dial := startRecorder(t)
	conns := &connections{dial: dial}
	defer conns.close()
	client := &http.Client{Transport: &http.Transport{DialContext: conns.dialOnce}}
	req, err := http.NewRequestWithContext(conns.trace(t.Context()), http.MethodHead, "http://recorder/v2/record", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if _, err := conns.dialOnce(t.Context(), "tcp", "unused"); err != nil {
		t.Fatal(err)
	}
	u := &upload{conns: conns, ended: make(chan struct{})}
	go u.wait(make(chan error))
	r.Cut()
	select {
	case <-u.ended:
	case <-time.After(10 * time.Second):
		t.Fatal("the end of the connection goes unnoticed")
	}
	if u.err == nil {
		t.Error("it ended well")
	}
}

// A caller that goes away is not waited for.
func TestConnectingEndsWithTheRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if u, err := connect(ctx, []netip.AddrPort{first}, nobody, connectTimeout); u != nil || err == nil {
			t.Fatal("got a recorder")
		}
		if took := time.Since(began); took != time.Second {
			t.Errorf("it took %v; want 1s", took)
		}
	})
}

// All are asked at once: the one that answers is found at once, wherever it stands.
func TestTheRecorderThatAnswersIsFoundAtOnce(t *testing.T) {
	r, answers := startRecorder(t)
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		switch address {
		case first.String():
			return nobody(ctx, network, address)
		case second.String():
			return nil, errors.New("connection refused")
		}
		return answers(ctx, network, address)
	}
	began := time.Now()
	u, err := connect(t.Context(), []netip.AddrPort{first, second, third}, dial, connectTimeout)
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > dialAttempt {
		t.Errorf("it took %v", took)
	}
	if u.recorder != third {
		t.Errorf("got recorder %v; want %v", u.recorder, third)
	}
	if _, err := u.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := u.complete(); err != nil {
		t.Errorf("the recording is not complete: %v", err)
	}
	recordings := r.Take()
	if len(recordings) != 1 || string(recordings[0].Bytes()) != "x" {
		t.Errorf("the recorder has %d recordings", len(recordings))
	}
}

// The network stack of a recorder drops what comes from a port that it has known
// before.
func TestDialTriesOtherPorts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tries := 0
		c := &connections{dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			if tries++; tries < 3 {
				return nobody(ctx, network, address)
			}
			return nil, errors.New("connection refused")
		}}
		began := time.Now()
		if _, err := c.dialOnce(t.Context(), "tcp", first.String()); err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("got error %v", err)
		}
		if tries != 3 || time.Since(began) != 2*dialAttempt {
			t.Errorf("%d tries took %v", tries, time.Since(began))
		}
	})
}

// What is opened once nobody needs it any more would stay open.
func TestAConnectionThatComesTooLateIsClosed(t *testing.T) {
	recorder, proxy := net.Pipe()
	c := new(connections)
	c.dial = func(context.Context, string, string) (net.Conn, error) {
		c.close()
		return proxy, nil
	}
	if _, err := c.dialOnce(t.Context(), "tcp", first.String()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got error %v; want %v", err, net.ErrClosed)
	}
	_ = recorder.SetReadDeadline(time.Now()) // which fails on what is closed
	if _, err := recorder.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the recorder reads %v; want %v", err, io.EOF)
	}
}

// closer is an upload whose end is sent, or fails to be.
type closer struct {
	io.Writer
	err error
}

// Close implements [io.Closer].
func (c closer) Close() error { return c.err }

// What the recorder has not said that it has, may be missing.
func TestARecordingIsCompleteWhenTheRecorderSaysSo(t *testing.T) {
	broken := errors.New("broken")
	for _, tt := range []struct {
		name  string
		close error
		ended bool
		err   error // that it ends with
		want  string
	}{
		{"it says so", nil, true, nil, "<nil>"},
		{"it says otherwise", nil, true, broken, "broken"},
		{"it cannot be asked", broken, true, nil, "broken"},
		{"it says nothing", nil, false, nil, "it does not confirm the recording"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				u := &upload{WriteCloser: closer{err: tt.close}, ended: make(chan struct{}), abort: func() {}, conns: new(connections), err: tt.err}
				if tt.ended {
					close(u.ended)
				}
				if got := fmt.Sprint(u.complete()); got != tt.want {
					t.Errorf("got %s; want %s", got, tt.want)
				}
			})
		})
	}
}

// A session goes on with what is recorded of it, and not without: nothing that is
// printed passes once it cannot be.
func TestASessionEndsWithARecordingThatItNeeds(t *testing.T) {
	// nothingPasses fails t unless what s prints is an error once its sink is dead.
	nothingPasses := func(t *testing.T, s *Session, want error) {
		t.Helper()
		s.cast = newCast(s.header, s.sinks...)
		if err := s.cast.output(stdout, []byte("x")); err != nil && !errors.Is(err, want) {
			t.Error(err)
		}
		<-s.sinks[0].dead
		if err := s.cast.output(stdout, []byte("x")); !errors.Is(err, want) {
			t.Errorf("got error %v; want %v", err, want)
		}
	}
	t.Run("its file cannot be written", func(t *testing.T) {
		site := &Site{Dir: t.TempDir(), Logger: zap.NewNop(), Count: func(Outcome) {}}
		_, s, refused := site.Begin(execRequest(t), caller(impersonate.Recording{}, nobody))
		if refused != nil {
			t.Fatal(refused)
		}
		defer s.Close()
		if err := s.file.Close(); err != nil { // as if the disk were gone
			t.Fatal(err)
		}
		nothingPasses(t, s, errFileLost)
	})
	// A recorder that ends a recording by itself has no more of it than one that is gone.
	t.Run("its recorder has ended it", func(t *testing.T) {
		s := &Session{enforce: true, log: zap.NewNop(), upload: &upload{ended: make(chan struct{}), abort: func() {}, conns: new(connections)}}
		close(s.upload.ended)
		s.watch()
		if !errors.Is(s.reason, errRecorderLost) {
			t.Errorf("got %v as the reason to end; want %v", s.reason, errRecorderLost)
		}
	})
	t.Run("its recorder is gone", func(t *testing.T) {
		r, dial := startRecorder(t)
		site := &Site{Logger: zap.NewNop(), Count: func(Outcome) {}}
		_, s, refused := site.Begin(execRequest(t), caller(impersonate.Recording{Recorders: []netip.AddrPort{first}, Enforce: true}, dial))
		if refused != nil {
			t.Fatal(refused)
		}
		defer s.Close()
		r.Cut()
		reason := func() error {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.reason
		}
		for deadline := time.Now().Add(10 * time.Second); reason() == nil; time.Sleep(10 * time.Millisecond) { // between two looks
			if time.Now().After(deadline) {
				t.Fatal("the session goes on")
			}
		}
		if !errors.Is(reason(), errRecorderLost) {
			t.Errorf("got %v as the reason to end; want %v", reason(), errRecorderLost)
		}
		nothingPasses(t, s, errRecorderLost)
	})
}
