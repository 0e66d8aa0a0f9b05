// SPDX-License-Identifier: Apache-2.0

package upgrade_test

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade"
)

// stalled is a connection whose writes block until it is closed.
type stalled struct {
	net.Conn
	begun, over chan struct{}
}

func newStalled() *stalled {
	return &stalled{begun: make(chan struct{}), over: make(chan struct{})}
}

func (s *stalled) Write([]byte) (int, error) {
	close(s.begun)
	<-s.over
	return 0, io.ErrClosedPipe
}

func (s *stalled) Close() error { close(s.over); return nil }

// half can be closed in one direction.
type half struct{ *stalled }

var errHalf = errors.New("closed for writing")

func (half) CloseWrite() error { return errHalf }

// hijacked returns conn when it is hijacked.
type hijacked struct {
	http.ResponseWriter
	conn net.Conn
}

func (h hijacked) Hijack() (net.Conn, *bufio.ReadWriter, error) { return h.conn, nil, nil }

// sides returns conn wrapped as each side of an upgraded connection.
func sides(t *testing.T, conn net.Conn) map[string]io.ReadWriteCloser {
	t.Helper()
	resp := &http.Response{StatusCode: http.StatusSwitchingProtocols, Body: conn}
	upgrade.Server(resp)
	client, _, err := http.NewResponseController(upgrade.Client(hijacked{httptest.NewRecorder(), conn})).Hijack()
	if err != nil {
		t.Fatal(err)
	}
	return map[string]io.ReadWriteCloser{"client": client, "server": resp.Body.(io.ReadWriteCloser)}
}

func TestWrite_FailsWhileAnotherIsInProgress(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		conn := newStalled()
		c := sides(t, conn)[side]
		written := make(chan error)
		go func() {
			_, err := c.Write([]byte("x"))
			written <- err
		}()
		<-conn.begun
		if _, err := c.Write([]byte("goodbye")); !errors.Is(err, upgrade.ErrBusy) {
			t.Errorf("%s: got %v; want %v", side, err, upgrade.ErrBusy)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if err := <-written; !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("%s: got %v; want the connection's own error", side, err)
		}
	}
}

func TestCloseWrite(t *testing.T) {
	for conn, want := range map[net.Conn]error{newStalled(): errors.ErrUnsupported, half{newStalled()}: errHalf} {
		for side, c := range sides(t, conn) {
			if err := c.(interface{ CloseWrite() error }).CloseWrite(); !errors.Is(err, want) {
				t.Errorf("%s: got %v; want %v", side, err, want)
			}
		}
	}
}

func TestServer_LeavesOtherResponses(t *testing.T) {
	conn := newStalled()
	resp := &http.Response{StatusCode: http.StatusOK, Body: conn}
	upgrade.Server(resp)
	if resp.Body != io.ReadCloser(conn) {
		t.Errorf("got the body %T", resp.Body)
	}
	if _, _, err := http.NewResponseController(upgrade.Client(httptest.NewRecorder())).Hijack(); err == nil {
		t.Error("got no error from hijacking a connection that cannot be hijacked")
	}
}
