// SPDX-License-Identifier: Apache-2.0

package recording

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/recording/recordertest"
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
