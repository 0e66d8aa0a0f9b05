// SPDX-License-Identifier: Apache-2.0

package proxytest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/moby/spdystream"
)

// ExecTarget is the target of an exec in a terminal, of the command sh -c ls.
const ExecTarget = "/api/v1/namespaces/default/pods/web/exec?command=sh&command=-c&command=ls&container=main&stdin=true&stdout=true&tty=true"

// Header lines that offer kubectl's protocols for sessions, over WebSocket and SPDY.
const (
	WebSocketV5 = "Sec-WebSocket-Protocol: v5.channel.k8s.io, v4.channel.k8s.io"
	SPDYV4      = "X-Stream-Protocol-Version: v4.channel.k8s.io"
)

// SwitchedToV5 is the answer to [WebSocketV5].
const SwitchedToV5 = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n"

// sessionTimeout is how long a session may take: 200 at once, with the race detector,
// are slow.
const sessionTimeout = 2 * time.Minute

// NewPods returns an API server on which every exec, attach and port-forward says
// "hello " and then what it is told.
func NewPods(t testing.TB) *APIServer {
	t.Helper()
	a := new(APIServer)
	a.Server = httptest.NewUnstartedServer(a.record(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			return
		}
		conn, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Errorf("API server: %v", err)
			return
		}
		defer conn.Close()
		fmt.Fprint(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+r.Header.Get("Upgrade")+"\r\n")
		if r.Header.Get("Upgrade") == "websocket" {
			first, _, _ := strings.Cut(r.Header.Get("Sec-Websocket-Protocol"), ",")
			fmt.Fprintf(conn, "Sec-WebSocket-Protocol: %s\r\n\r\n", first)
			webSocketPod(conn, buffered.Reader)
			return
		}
		fmt.Fprintf(conn, "X-Stream-Protocol-Version: %s\r\n\r\n", r.Header.Get("X-Stream-Protocol-Version"))
		spdyPod(conn)
	}))
	a.StartTLS()
	t.Cleanup(a.Close)
	return a
}

func webSocketPod(conn net.Conn, r *bufio.Reader) {
	_, _ = conn.Write(PodMessage("\x01hello "))
	for {
		opcode, payload, err := readMessage(r)
		if err != nil || opcode == opClose {
			return
		}
		if strings.HasPrefix(payload, "\x00") {
			if _, err := conn.Write(PodMessage("\x01" + payload[1:])); err != nil {
				return
			}
		}
	}
}

func spdyPod(conn net.Conn) {
	s, err := spdystream.NewConnection(conn, true)
	if err != nil {
		return
	}
	stdin, stdout := make(chan *spdystream.Stream, 1), make(chan *spdystream.Stream, 1)
	go func() {
		in, out := <-stdin, <-stdout
		_, _ = out.Write([]byte("hello "))
		_, _ = io.Copy(out, in)
	}()
	s.Serve(func(stream *spdystream.Stream) {
		_ = stream.SendReply(http.Header{}, false)
		switch stream.Headers().Get("streamType") {
		case "stdin":
			stdin <- stream
		case "stdout":
			stdout <- stream
		}
	})
}

// ClientMessage returns a WebSocket message as a client sends it. The first byte of
// payload is the channel.
func ClientMessage(payload string) []byte {
	// A mask of zeros changes nothing.
	return append(append(messageHead(0x80, len(payload)), 0, 0, 0, 0), payload...)
}

// PodMessage returns a WebSocket message as the API server sends it. The first byte of
// payload is the channel.
func PodMessage(payload string) []byte { return append(messageHead(0, len(payload)), payload...) }

func messageHead(maskBit byte, size int) []byte {
	if size < 126 {
		return []byte{0x82, maskBit | byte(size)}
	}
	return binary.BigEndian.AppendUint64([]byte{0x82, maskBit | 127}, uint64(size))
}

const opClose = 8

// readMessage reads a WebSocket message that is in one frame and unmasked, or masked
// with zeros.
func readMessage(r *bufio.Reader) (opcode byte, payload string, err error) {
	head := make([]byte, 2)
	if _, err := io.ReadFull(r, head); err != nil {
		return 0, "", err
	}
	size := uint64(head[1] & 0x7f)
	more := map[uint64]int{126: 2, 127: 8}[size]
	long := make([]byte, 8)
	if _, err := io.ReadFull(r, long[8-more:]); err != nil {
		return 0, "", err
	}
	if more > 0 {
		size = binary.BigEndian.Uint64(long)
	}
	if head[1]&0x80 != 0 {
		if _, err := r.Discard(4); err != nil {
			return 0, "", err
		}
	}
	b := make([]byte, size)
	_, err = io.ReadFull(r, b)
	return head[0] & 0xf, string(b), err
}

// Shell is the client of an exec.
type Shell interface {
	// Say types. TrySay types, and reports whether that succeeded.
	Say(t testing.TB, text string)
	TrySay(text string) bool
	// Hear reads until want was shown, Skip until n more bytes were.
	Hear(t testing.TB, want string)
	Skip(t testing.TB, n int)
	// End reads to the end. It returns what was shown, and what came on the error
	// stream.
	End(t testing.TB) (shown, status string)
	// Leave closes the connection.
	Leave()
}

// OpenShell opens a shell in the pod of target. If the answer is not 101, it returns
// that instead of a shell.
type OpenShell func(t testing.TB, s *Site, target string) (Shell, *http.Response)

// Shells are the ways to open one.
var Shells = map[string]OpenShell{"WebSocket": OpenWebSocket, "SPDY": OpenSPDY}

// OpenWebSocket opens a shell over a WebSocket.
func OpenWebSocket(t testing.TB, s *Site, target string) (Shell, *http.Response) {
	t.Helper()
	sh, resp := DialWebSocket(t, s, UpgradeRequest("GET", target, "websocket", WebSocketV5))
	if sh == nil {
		return nil, resp
	}
	return sh, nil
}

// MustOpen opens a shell in the pod of [ExecTarget], and fails the test if the answer is
// not 101.
func MustOpen(t testing.TB, open OpenShell, s *Site) Shell {
	t.Helper()
	sh, resp := open(t, s, ExecTarget)
	if sh == nil {
		body, _ := io.ReadAll(resp.Body)
		t.Fatalf("got status %d: %s", resp.StatusCode, body)
	}
	t.Cleanup(sh.Leave)
	return sh
}

// MustOpenWebSocket is MustOpen with [OpenWebSocket].
func MustOpenWebSocket(t testing.TB, s *Site) *WebSocketShell {
	t.Helper()
	return MustOpen(t, OpenWebSocket, s).(*WebSocketShell)
}

// UpgradeRequest returns a request that asks for an upgrade, with further header lines.
func UpgradeRequest(method, target, upgrade string, lines ...string) string {
	raw := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: k8s\r\nConnection: Upgrade\r\nUpgrade: %s\r\n", method, target, upgrade)
	return raw + strings.Join(append(lines, "", ""), "\r\n")
}

func dialSession(t testing.TB, s *Site) net.Conn {
	t.Helper()
	conn := s.Dial(t, AliceAddr, "http/1.1")
	if err := conn.SetDeadline(time.Now().Add(sessionTimeout)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// WebSocketShell is a shell over a WebSocket.
type WebSocketShell struct {
	Conn   net.Conn
	reader *bufio.Reader
	shown  string
	status string
}

// DialWebSocket sends raw, a request for a WebSocket and what the client sends behind it
// without waiting for the answer. If the answer is not 101, it returns that instead of a
// shell.
func DialWebSocket(t testing.TB, s *Site, raw string) (*WebSocketShell, *http.Response) {
	t.Helper()
	conn := dialSession(t, s)
	if _, err := io.WriteString(conn, raw); err != nil {
		t.Fatal(err)
	}
	reader := bufio.NewReader(conn)
	resp := ReadResponse(t, reader)
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return nil, resp
	}
	return &WebSocketShell{Conn: conn, reader: reader}, nil
}

func (s *WebSocketShell) Say(t testing.TB, text string) {
	t.Helper()
	s.Send(t, ClientMessage("\x00"+text))
}

// Send sends bytes as they are.
func (s *WebSocketShell) Send(t testing.TB, raw []byte) {
	t.Helper()
	if _, err := s.Conn.Write(raw); err != nil {
		t.Fatal(err)
	}
}

func (s *WebSocketShell) TrySay(text string) bool {
	_, err := s.Conn.Write(ClientMessage("\x00" + text))
	return err == nil
}

// Stall types until the other end has taken nothing for a second.
func (s *WebSocketShell) Stall() {
	block := ClientMessage("\x00" + strings.Repeat("x", 1<<20))
	for err := error(nil); err == nil; {
		_ = s.Conn.SetWriteDeadline(time.Now().Add(time.Second))
		_, err = s.Conn.Write(block)
	}
}

// next reads a message.
func (s *WebSocketShell) next() error {
	opcode, payload, err := readMessage(s.reader)
	switch {
	case err != nil:
		return err
	case opcode == opClose:
		return io.EOF
	case strings.HasPrefix(payload, "\x03"):
		s.status += payload[1:]
	default:
		s.shown += payload[1:]
	}
	return nil
}

func (s *WebSocketShell) Hear(t testing.TB, want string) {
	t.Helper()
	for !strings.Contains(s.shown, want) {
		if err := s.next(); err != nil {
			t.Fatalf("%v, with %q shown and status %s", err, s.shown, s.status)
		}
	}
}

func (s *WebSocketShell) Skip(t testing.TB, n int) {
	t.Helper()
	for read := 0; read < n; {
		opcode, payload, err := readMessage(s.reader)
		if err != nil || opcode == opClose {
			t.Fatalf("after %d bytes: %v", read, err)
		}
		read += len(payload) - 1
	}
}

func (s *WebSocketShell) End(t testing.TB) (shown, status string) {
	t.Helper()
	for {
		if err := s.next(); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("there is no end, with %q shown", s.shown)
		} else if err != nil {
			s.Leave() // as kubectl does
			return s.shown, s.status
		}
	}
}

func (s *WebSocketShell) Leave() { _ = s.Conn.Close() }

// spdyShell is a shell over SPDY.
type spdyShell struct {
	conn                  *spdystream.Connection
	stdin, stdout, errors *spdystream.Stream
	shown                 string
}

// OpenSPDY opens a shell over SPDY.
func OpenSPDY(t testing.TB, s *Site, target string) (Shell, *http.Response) {
	t.Helper()
	conn := dialSession(t, s)
	if _, err := io.WriteString(conn, UpgradeRequest("POST", target, "SPDY/3.1", SPDYV4)); err != nil {
		t.Fatal(err)
	}
	resp := ReadResponse(t, bufio.NewReader(conn))
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return nil, resp
	}
	out := new(spdyShell)
	var err error
	if out.conn, err = spdystream.NewConnection(conn, false); err != nil {
		t.Fatal(err)
	}
	go out.conn.Serve(spdystream.NoOpStreamHandler)
	for _, stream := range []struct {
		what string
		to   **spdystream.Stream
	}{{"error", &out.errors}, {"stdin", &out.stdin}, {"stdout", &out.stdout}} {
		if *stream.to, err = out.conn.CreateStream(http.Header{"streamType": {stream.what}}, nil, false); err != nil {
			t.Fatal(err)
		}
		if err := (*stream.to).WaitTimeout(sessionTimeout); err != nil {
			t.Fatal(err)
		}
	}
	return out, nil
}

func (s *spdyShell) Say(t testing.TB, text string) {
	t.Helper()
	if _, err := s.stdin.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
}

func (s *spdyShell) TrySay(text string) bool {
	_, err := s.stdin.Write([]byte(text))
	return err == nil
}

func (s *spdyShell) Hear(t testing.TB, want string) {
	t.Helper()
	b := make([]byte, 64<<10)
	for !strings.Contains(s.shown, want) {
		n, err := s.stdout.Read(b)
		if s.shown += string(b[:n]); err != nil {
			t.Fatalf("%v, with %q shown", err, s.shown)
		}
	}
}

func (s *spdyShell) Skip(t testing.TB, n int) {
	t.Helper()
	if _, err := io.CopyN(io.Discard, s.stdout, int64(n)); err != nil {
		t.Fatal(err)
	}
}

func (s *spdyShell) End(t testing.TB) (shown, status string) {
	t.Helper()
	rest, _ := io.ReadAll(s.stdout)
	text, _ := io.ReadAll(s.errors)
	s.Leave() // as kubectl does
	return s.shown + string(rest), string(text)
}

func (s *spdyShell) Leave() { _ = s.conn.Close() }
