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
	once        *sync.Once // closes over
}

func newStalled() *stalled {
	return &stalled{begun: make(chan struct{}), over: make(chan struct{}), once: new(sync.Once)}
}

func (s *stalled) Write([]byte) (int, error) {
	close(s.begun)
	<-s.over
	return 0, io.ErrClosedPipe
}

func (s *stalled) Read([]byte) (int, error) { return 0, io.EOF }

func (s *stalled) Close() error { s.once.Do(func() { close(s.over) }); return nil }

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
		// What is written to the API server is discarded from now on.
		want := map[string]error{"client": io.ErrClosedPipe}[side]
		if err := <-written; !errors.Is(err, want) {
			t.Errorf("%s: got %v; want %v", side, err, want)
		}
	}
}

func TestCloseWrite(t *testing.T) {
	for _, tt := range []struct {
		conn         net.Conn
		want, server error
	}{
		{newStalled(), errors.ErrUnsupported, errors.ErrUnsupported},
		// There may be something to read from the API server.
		{half{newStalled()}, errHalf, nil},
		// As Caddy wraps it for the access log.
		{&wrapped{half{newStalled()}}, errHalf, nil},
	} {
		if err := upgrade.CloseWrite(tt.conn); !errors.Is(err, tt.want) {
			t.Errorf("got %v; want %v", err, tt.want)
		}
		server := sides(t, tt.conn)["server"].(interface{ CloseWrite() error })
		if err := server.CloseWrite(); !errors.Is(err, tt.server) {
			t.Errorf("server: got %v; want %v", err, tt.server)
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
			// Less than what is discarded at most.
			for block, n := make([]byte, 64<<10), 0; n < 32<<20; n += len(block) {
				if _, err := conn.Write(block); err != nil {
					sent <- err
					return
				}
			}
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

// silent is an API server that takes and says nothing.
type silent struct {
	closed chan struct{}
	once   *sync.Once
}

func newSilent() silent { return silent{make(chan struct{}), new(sync.Once)} }

func (silent) Write([]byte) (int, error)  { return 0, io.ErrClosedPipe }
func (silent) CloseWrite() error          { return io.ErrClosedPipe }
func (s silent) Read([]byte) (int, error) { <-s.closed; return 0, net.ErrClosed }
func (s silent) Close() error             { s.once.Do(func() { close(s.closed) }); return nil }

// An API server that neither takes nor says anything must not keep the tunnel open.
func TestServer_DrainsForLimitedTime(t *testing.T) {
	for what, say := range map[string]func(io.ReadWriter) error{
		"Write":      func(c io.ReadWriter) error { _, err := c.Write([]byte("x")); return err },
		"CloseWrite": func(c io.ReadWriter) error { return c.(interface{ CloseWrite() error }).CloseWrite() },
	} {
		synctest.Test(t, func(t *testing.T) {
			resp := &http.Response{StatusCode: http.StatusSwitchingProtocols, Body: newSilent()}
			upgrade.Server(resp)
			c := resp.Body.(io.ReadWriter)
			began := time.Now()
			if err := say(c); err != nil {
				t.Errorf("%s: got %v; want no error while there may be something to read", what, err)
			}
			if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Errorf("%s: got no error from reading", what)
			}
			if waited := time.Since(began); waited != 10*time.Second {
				t.Errorf("%s: reading ended after %v", what, waited)
			}
		})
	}
}

func TestServer_DiscardsLimitedAmount(t *testing.T) {
	s := newSilent()
	resp := &http.Response{StatusCode: http.StatusSwitchingProtocols, Body: s}
	upgrade.Server(resp)
	for range 64 {
		if n, err := resp.Body.(io.Writer).Write(make([]byte, 1<<20)); n != 1<<20 || err != nil {
			t.Fatalf("got %d, %v", n, err)
		}
	}
	select {
	case <-s.closed:
		t.Fatal("the connection is closed after 64 MiB")
	default:
	}
	if _, err := resp.Body.(io.Writer).Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.closed:
	default:
		t.Error("more than 64 MiB are discarded")
	}
}

// sender is a client that sends as long as its connection is open, or nothing.
type sender struct {
	net.Conn
	silent
	nothing bool
	sent    *int
}

func (s sender) Read(p []byte) (int, error) {
	if s.nothing {
		return s.silent.Read(p)
	}
	select {
	case <-s.closed:
		return 0, net.ErrClosed
	default:
		*s.sent += len(p)
		return len(p), nil
	}
}

func (s sender) Write(p []byte) (int, error) { return len(p), nil }
func (s sender) CloseWrite() error           { return nil }
func (s sender) Close() error                { return s.silent.Close() }

// clientOf returns conn wrapped as a client's side.
func clientOf(t *testing.T, conn net.Conn) net.Conn {
	t.Helper()
	c, _, err := http.NewResponseController(upgrade.Client(hijacked{httptest.NewRecorder(), conn})).Hijack()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A client that does not close its connection must not keep it open.
func TestClient_LingersForLimitedTime(t *testing.T) {
	for _, read := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			s := sender{silent: newSilent(), nothing: true}
			c := clientOf(t, s)
			began := time.Now()
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(began); took != 0 {
				t.Errorf("Close takes %v", took)
			}
			if read {
				if _, err := c.Read(make([]byte, 1)); err == nil {
					t.Error("got no error from reading")
				}
			}
			<-s.closed
			if waited := time.Since(began); waited != 5*time.Second {
				t.Errorf("the connection is closed after %v", waited)
			}
		})
	}
}

// What a client sends after the end reaches no one.
func TestClient_DiscardsLimitedAmount(t *testing.T) {
	s := sender{silent: newSilent(), sent: new(int)}
	c := clientOf(t, s)
	if n, err := c.Read(make([]byte, 1<<20)); n != 1<<20 || err != nil {
		t.Errorf("got %d bytes, %v", n, err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 1<<20)); n != 0 || err == nil {
		t.Errorf("got %d bytes, %v after Close", n, err)
	}
	if *s.sent > 70<<20 {
		t.Errorf("%d bytes are discarded", *s.sent)
	}
	<-s.closed
	if n, err := c.Write([]byte("x")); n != 0 || !errors.Is(err, net.ErrClosed) {
		t.Errorf("writing after the end: got %d, %v", n, err)
	}
}

// A client that gets an upgrade looks for Upgrade alone in the answer.
func TestLast_ClosesUnlessUpgraded(t *testing.T) {
	for code, want := range map[int]string{
		http.StatusOK:                 "close",
		http.StatusForbidden:          "close",
		http.StatusSwitchingProtocols: "Upgrade",
	} {
		rec := httptest.NewRecorder()
		w := upgrade.Last(rec)
		if code == http.StatusSwitchingProtocols {
			w.Header().Add("Connection", "Upgrade") // as reverse_proxy does
		}
		w.WriteHeader(code)
		if got := rec.Header()["Connection"]; len(got) != 1 || got[0] != want {
			t.Errorf("%d: the answer has Connection %q; want %s", code, got, want)
		}
		if err := http.NewResponseController(w).Flush(); err != nil {
			t.Errorf("Flush: %v", err)
		}
	}
}
