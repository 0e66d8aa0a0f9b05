// SPDX-License-Identifier: Apache-2.0

package upgrade_test

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

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

func (s *stalled) Read([]byte) (int, error) { return 0, io.EOF }

func (s *stalled) Close() error { close(s.over); return nil }

func (*stalled) SetReadDeadline(time.Time) error { return nil }

// half can be closed in one direction.
type half struct{ *stalled }

var errHalf = errors.New("closed for writing")

func (half) CloseWrite() error { return errHalf }

type wrapped struct{ net.Conn }

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
	for _, tt := range []struct {
		conn           net.Conn
		client, server error
	}{
		{newStalled(), errors.ErrUnsupported, errors.ErrUnsupported},
		// There may be something to read from the API server.
		{half{newStalled()}, errHalf, nil},
		// As Caddy wraps it for the access log.
		{&wrapped{half{newStalled()}}, errHalf, nil},
	} {
		c := sides(t, tt.conn)
		for side, want := range map[string]error{"client": tt.client, "server": tt.server} {
			if err := c[side].(interface{ CloseWrite() error }).CloseWrite(); !errors.Is(err, want) {
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

// deaf is an API server that takes nothing more, and then says last.
type deaf struct {
	last   io.Reader
	failed chan struct{} // closed once a write has failed
	once   sync.Once
	half   error // of CloseWrite
}

func newDeaf(last string) *deaf {
	return &deaf{last: strings.NewReader(last), failed: make(chan struct{}), half: io.ErrClosedPipe}
}

func (d *deaf) fail() { d.once.Do(func() { close(d.failed) }) }

func (d *deaf) Write([]byte) (int, error) { d.fail(); return 0, io.ErrClosedPipe }

func (d *deaf) CloseWrite() error { d.fail(); return d.half }

func (d *deaf) Read(p []byte) (int, error) {
	<-d.failed
	return d.last.Read(p)
}

func (d *deaf) Close() error { d.fail(); return nil }

// tunnel returns the client's end of a tunnel to api through a reverse proxy that ends a
// tunnel as Caddy's does.
func tunnel(t *testing.T, api io.ReadWriteCloser) *net.TCPConn {
	t.Helper()
	proxy := &httputil.ReverseProxy{
		Rewrite: func(*httputil.ProxyRequest) {},
		Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
			resp := &http.Response{StatusCode: http.StatusSwitchingProtocols, Header: r.Header.Clone(), Request: r, Body: api}
			upgrade.Server(resp)
			return resp, nil
		}),
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		proxy.ServeHTTP(upgrade.Client(w), r)
	}))
	t.Cleanup(server.Close)
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: k8s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	return conn.(*net.TCPConn)
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// A command may end before it has read its input. Its exit code comes last.
func TestTunnel_LastWordsReachClientThatIsSending(t *testing.T) {
	const last = "exit code 6"
	for range 20 {
		conn := tunnel(t, newDeaf(last))
		sent := make(chan error, 1)
		go func() {
			var err error
			for block := make([]byte, 64<<10); err == nil; {
				_, err = conn.Write(block)
			}
			sent <- err
		}()
		got, err := io.ReadAll(conn)
		if err != nil || !strings.HasSuffix(string(got), last) {
			t.Errorf("got %.200q, %v; want the last words", got, err)
		}
		// A reset can overtake them, and makes some systems discard what has arrived.
		select {
		case err := <-sent:
			t.Fatalf("the client, which is still sending, got %v", err)
		case <-time.After(20 * time.Millisecond): // long enough for a reset
		}
		_ = conn.Close()
		<-sent
	}
}

func TestTunnel_LastWordsReachClientThatHasSentAll(t *testing.T) {
	conn := tunnel(t, newDeaf("exit code 6"))
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); err != nil || !strings.HasSuffix(string(got), "exit code 6") {
		t.Errorf("got %.200q, %v; want the last words", got, err)
	}
}

// silent says nothing, and takes nothing.
type silent struct{ closed chan struct{} }

func (silent) Write([]byte) (int, error)       { return 0, io.ErrClosedPipe }
func (s silent) Read([]byte) (int, error)      { <-s.closed; return 0, net.ErrClosed }
func (s silent) Close() error                  { close(s.closed); return nil }
func (silent) SetReadDeadline(time.Time) error { return nil }

// An API server that neither takes nor says anything must not keep the tunnel open.
func TestServer_DrainsForLimitedTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		resp := &http.Response{StatusCode: http.StatusSwitchingProtocols, Body: silent{make(chan struct{})}}
		upgrade.Server(resp)
		c := resp.Body.(io.ReadWriter)
		began := time.Now()
		if n, err := c.Write([]byte("x")); n != 1 || err != nil {
			t.Errorf("got %d, %v; want no error while there may be something to read", n, err)
		}
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("got no error from reading")
		}
		if waited := time.Since(began); waited != 10*time.Second {
			t.Errorf("reading ended after %v", waited)
		}
		if _, err := c.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("got %v; want the error of the write that failed", err)
		}
	})
}
