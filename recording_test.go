// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/moby/spdystream"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"tailscale.com/sessionrecording"
	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/revocation"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/sessionrecording"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordertest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// The recorders of these tests, by their addresses on the tailnet.
const (
	recorderAddr = "100.64.0.7:80"
	absentAddr   = "100.64.0.8:80"  // refuses connections
	emptyAddr    = "100.64.0.10:80" // nobody answers
)

const (
	enforced = `{"recorderAddrs":["` + recorderAddr + `"],"enforceRecorder":true}`
	wanted   = `{"recorderAddrs":["` + recorderAddr + `"]}`
)

// startRecorder starts a recorder, and returns it with a node that knows alice as a
// reader with further rules and reaches it.
func startRecorder(t *testing.T, rules ...string) (*recordertest.Recorder, *tailnet.Node) {
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
			t.Errorf("the recorder: %v", err)
		}
	})
	who := whoIs(append([]string{readers}, rules...)...)
	who.Node.StableID, who.UserProfile.ID = "nLaptop", 7
	node := newNode(who, nil)
	node.DialPeer = func(ctx context.Context, network, address string) (net.Conn, error) {
		switch address {
		case recorderAddr:
			return (&net.Dialer{}).DialContext(ctx, network, ln.Addr().String())
		case emptyAddr:
			<-ctx.Done()
			return nil, ctx.Err()
		}
		return nil, errors.New("connection refused")
	}
	return r, node
}

// taken returns the one recording that r has received, once it has ended.
func taken(t *testing.T, r *recordertest.Recorder) *recordertest.Recording {
	t.Helper()
	all := r.Take()
	if len(all) != 1 {
		t.Fatalf("the recorder has %d recordings; want 1", len(all))
	}
	select {
	case <-all[0].Ended():
	case <-time.After(10 * time.Second):
		t.Fatal("the recording does not end")
	}
	return all[0]
}

// events returns what a recording holds.
func events(t *testing.T, b []byte) (header sessionrecording.CastHeader, output string, sizes []string) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
	if err := json.Unmarshal([]byte(lines[0]), &header); err != nil {
		t.Fatalf("header: %v: %q", err, lines[0])
	}
	for _, line := range lines[1:] {
		var event []any
		if err := json.Unmarshal([]byte(line), &event); err != nil || len(event) != 3 {
			t.Fatalf("event: %v: %q", err, line)
		}
		switch event[1] {
		case "o":
			output += event[2].(string)
		case "r":
			sizes = append(sizes, event[2].(string))
		}
	}
	return header, output, sizes
}

// newPods returns an upstream on which every exec, attach and port-forward says
// "hello " and then what it is told.
func newPods(t *testing.T) *upstream {
	t.Helper()
	u := new(upstream)
	u.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u.mu.Lock()
		u.seen = append(u.seen, r)
		u.mu.Unlock()
		if r.Header.Get("Upgrade") == "" {
			return
		}
		conn, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Errorf("upstream: %v", err)
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
	u.StartTLS()
	t.Cleanup(u.Close)
	return u
}

// wsMessage returns a message on a channel, masked if a client sends it.
func wsMessage(fromClient bool, payload string) []byte {
	b := []byte{0x82}
	bit := byte(0)
	if fromClient {
		bit = 0x80
	}
	if len(payload) < 126 {
		b = append(b, bit|byte(len(payload)))
	} else {
		b = binary.BigEndian.AppendUint64(append(b, bit|127), uint64(len(payload)))
	}
	if fromClient {
		b = append(b, 0, 0, 0, 0) // a mask that changes nothing
	}
	return append(b, payload...)
}

// readWSMessage reads a message that is in one frame and masked with zeros.
func readWSMessage(r *bufio.Reader) (opcode byte, payload string, err error) {
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

func webSocketPod(conn net.Conn, r *bufio.Reader) {
	_, _ = conn.Write(wsMessage(false, "\x01hello "))
	for {
		opcode, payload, err := readWSMessage(r)
		if err != nil || opcode == 8 {
			return
		}
		if strings.HasPrefix(payload, "\x00") {
			if _, err := conn.Write(wsMessage(false, "\x01"+payload[1:])); err != nil {
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

// shell is a client of an exec.
type shell interface {
	// say types, hear reads until there is want.
	say(t *testing.T, text string)
	hear(t *testing.T, want string)
	// end reads to the end and returns what was shown and what came on the error
	// stream.
	end(t *testing.T) (shown, status string)
	// leave closes the connection.
	leave()
}

// webSocketShell is one over WebSocket.
type webSocketShell struct {
	conn   net.Conn
	reader *bufio.Reader
	shown  string
	status string
}

const execTarget = "/api/v1/namespaces/default/pods/web/exec?command=sh&command=-c&command=ls&container=main&stdin=true&stdout=true&tty=true"

// upgradeRequest returns a request that asks for an upgrade, with further headers.
func upgradeRequest(method, target, upgrade string, headers ...string) string {
	raw := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: k8s\r\nConnection: Upgrade\r\nUpgrade: %s\r\n", method, target, upgrade)
	return raw + strings.Join(append(headers, "", ""), "\r\n")
}

const wsV5 = "Sec-WebSocket-Protocol: v5.channel.k8s.io, v4.channel.k8s.io"

// sessionTimeout is how long a session of these tests may take: 200 at once, with the
// race detector, take their time.
const sessionTimeout = 2 * time.Minute

// dialSession connects to s for a session.
func dialSession(t *testing.T, s *site) net.Conn {
	t.Helper()
	conn := s.dial(t, aliceAddr, "http/1.1")
	if err := conn.SetDeadline(time.Now().Add(sessionTimeout)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// openWebSocket opens a shell, with early sent behind the request in the same
// write. It returns no shell but the answer, if that is another than 101.
func openWebSocket(t *testing.T, s *site, target, early string) (shell, *http.Response) {
	t.Helper()
	conn := dialSession(t, s)
	if _, err := io.WriteString(conn, upgradeRequest("GET", target, "websocket", wsV5)+early); err != nil {
		t.Fatal(err)
	}
	reader := bufio.NewReader(conn)
	resp := readResponse(t, reader)
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return nil, resp
	}
	return &webSocketShell{conn: conn, reader: reader}, nil
}

func (s *webSocketShell) say(t *testing.T, text string) {
	t.Helper()
	if _, err := s.conn.Write(wsMessage(true, "\x00"+text)); err != nil {
		t.Fatal(err)
	}
}

// next reads a message.
func (s *webSocketShell) next() error {
	opcode, payload, err := readWSMessage(s.reader)
	switch {
	case err != nil:
		return err
	case opcode == 8:
		return io.EOF
	case strings.HasPrefix(payload, "\x03"):
		s.status += payload[1:]
	default:
		s.shown += payload[1:]
	}
	return nil
}

func (s *webSocketShell) hear(t *testing.T, want string) {
	t.Helper()
	for !strings.Contains(s.shown, want) {
		if err := s.next(); err != nil {
			t.Fatalf("%v, with %q shown and status %s", err, s.shown, s.status)
		}
	}
}

func (s *webSocketShell) end(t *testing.T) (shown, status string) {
	t.Helper()
	for {
		if err := s.next(); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("there is no end, with %q shown", s.shown)
		} else if err != nil {
			return s.shown, s.status
		}
	}
}

func (s *webSocketShell) leave() { _ = s.conn.Close() }

// spdyShell is one over SPDY.
type spdyShell struct {
	conn                  *spdystream.Connection
	stdin, stdout, errors *spdystream.Stream
	shown                 string
}

func openSPDY(t *testing.T, s *site, target, _ string) (shell, *http.Response) {
	t.Helper()
	conn := dialSession(t, s)
	if _, err := io.WriteString(conn, upgradeRequest("POST", target, "SPDY/3.1", "X-Stream-Protocol-Version: v4.channel.k8s.io")); err != nil {
		t.Fatal(err)
	}
	reader := bufio.NewReader(conn)
	resp := readResponse(t, reader)
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

func (s *spdyShell) say(t *testing.T, text string) {
	t.Helper()
	if _, err := s.stdin.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
}

func (s *spdyShell) hear(t *testing.T, want string) {
	t.Helper()
	b := make([]byte, 64<<10)
	for !strings.Contains(s.shown, want) {
		n, err := s.stdout.Read(b)
		if s.shown += string(b[:n]); err != nil {
			t.Fatalf("%v, with %q shown", err, s.shown)
		}
	}
}

func (s *spdyShell) end(t *testing.T) (shown, status string) {
	t.Helper()
	rest, _ := io.ReadAll(s.stdout)
	text, _ := io.ReadAll(s.errors)
	return s.shown + string(rest), string(text)
}

func (s *spdyShell) leave() { _ = s.conn.Close() }

var shells = map[string]func(t *testing.T, s *site, target, early string) (shell, *http.Response){"WebSocket": openWebSocket, "SPDY": openSPDY}

// mustOpen opens a shell that is expected to open.
func mustOpen(t *testing.T, open func(*testing.T, *site, string, string) (shell, *http.Response), s *site) shell {
	t.Helper()
	sh, resp := open(t, s, execTarget, "")
	if sh == nil {
		body, _ := io.ReadAll(resp.Body)
		t.Fatalf("got status %d: %s", resp.StatusCode, body)
	}
	t.Cleanup(sh.leave)
	return sh
}

// outcomes returns how often recordings have ended in each way.
func outcomes() map[sessionrecording.Outcome]int {
	registry := prometheus.NewRegistry()
	registry.MustRegister(metrics.Recordings)
	families, err := registry.Gather()
	if err != nil {
		panic(err)
	}
	all := make(map[sessionrecording.Outcome]int)
	for _, family := range families {
		for _, m := range family.GetMetric() {
			all[sessionrecording.Outcome(m.GetLabel()[0].GetValue())] = int(m.GetCounter().GetValue())
		}
	}
	return all
}

// counted returns a function that returns how often recordings have ended in each
// way since the call.
func counted() func() map[sessionrecording.Outcome]int {
	before := outcomes()
	return func() map[sessionrecording.Outcome]int {
		since := outcomes()
		for o, n := range before {
			if since[o] -= n; since[o] == 0 {
				delete(since, o)
			}
		}
		return since
	}
}

// wantCounted waits until recordings have ended as wanted.
func wantCounted(t *testing.T, since func() map[sessionrecording.Outcome]int, want map[sessionrecording.Outcome]int) {
	t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for !cmp.Equal(since(), want) && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond) // between two looks
	}
	if diff := cmp.Diff(want, since()); diff != "" {
		t.Errorf("outcomes (-want +got):\n%s", diff)
	}
}

const toKubernetes = "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}"

func TestSessionIsRecorded(t *testing.T) {
	up := newPods(t)
	for _, mode := range []recordertest.Mode{recordertest.V2, recordertest.V1} {
		for _, transport := range []string{"$KUBERNETES", "$HTTP"} {
			recorder, node := startRecorder(t, enforced)
			recorder.SetMode(mode)
			s := startSite(t, up, true, "", "tailscale_impersonate\nreverse_proxy https://$UPSTREAM {\n"+transport+"\n}", node)
			for name, open := range shells {
				t.Run(fmt.Sprintf("%s/%s/%d", name, transport, mode), func(t *testing.T) {
					since := counted()
					sh := mustOpen(t, open, s)
					sh.hear(t, "hello ")
					sh.say(t, "alice")
					sh.hear(t, "hello alice")
					sh.leave()
					wantCounted(t, since, map[sessionrecording.Outcome]int{sessionrecording.Recorded: 1})
					got := taken(t, recorder)
					if got.Err() != nil {
						t.Errorf("the recording was cut off: %v", got.Err())
					}
					header, output, _ := events(t, got.Bytes())
					if output != "hello alice" {
						t.Errorf("recorded was %q", output)
					}
					want := sessionrecording.CastHeader{
						Version: 2, Width: 80, Height: 24, Timestamp: header.Timestamp, Command: "sh -c ls",
						SrcNode: "laptop.example.ts.net", SrcNodeID: "nLaptop", SrcNodeUser: "alice@example.com", SrcNodeUserID: 7,
						Env:        map[string]string{},
						Kubernetes: &sessionrecording.Kubernetes{PodName: "web", Namespace: "default", Container: "main", SessionType: "exec"},
					}
					if diff := cmp.Diff(want, header); diff != "" {
						t.Errorf("header (-want +got):\n%s", diff)
					}
				})
			}
		}
	}
}

func TestTaggedDevicesAreNamedByTheirTags(t *testing.T) {
	recorder, node := startRecorder(t)
	who := whoIs(readers, enforced)
	who.Node = &tailcfg.Node{Name: "ci.example.ts.net.", StableID: "nCI", User: 9, Tags: []string{"tag:ci"}}
	dial := node.DialPeer
	node = newNode(who, nil)
	node.DialPeer = dial
	s := startSite(t, newPods(t), false, "", toKubernetes, node)
	sh := mustOpen(t, openWebSocket, s)
	sh.hear(t, "hello ")
	sh.leave()
	header, _, _ := events(t, taken(t, recorder).Bytes())
	if diff := cmp.Diff([]string{"tag:ci"}, header.SrcNodeTags); diff != "" || header.SrcNodeUser != "" || header.SrcNodeUserID != 0 {
		t.Errorf("got header %+v; want the tags and no user", header)
	}
}

// What a client sends behind its request, without waiting for the answer, passes the
// recording as all else does.
func TestBytesAheadOfTheSwitch(t *testing.T) {
	recorder, node := startRecorder(t, enforced)
	s := startSite(t, newPods(t), false, "", toKubernetes, node)
	early := string(wsMessage(true, "\x04"+`{"Width":132,"Height":43}`)) + string(wsMessage(true, "\x00early")) + string(wsMessage(true, "\x00 bird")[:3])
	sh, resp := openWebSocket(t, s, execTarget, early)
	if sh == nil {
		t.Fatalf("got status %d", resp.StatusCode)
	}
	if _, err := sh.(*webSocketShell).conn.Write(wsMessage(true, "\x00 bird")[3:]); err != nil {
		t.Fatal(err)
	}
	sh.hear(t, "hello early bird")
	sh.leave()
	header, output, _ := events(t, taken(t, recorder).Bytes())
	if header.Width != 132 || header.Height != 43 || output != "hello early bird" {
		t.Errorf("recorded was %q on %dx%d", output, header.Width, header.Height)
	}

	// And what cannot be understood does not reach the pod.
	sh, resp = openWebSocket(t, s, execTarget, string(wsMessage(true, "\x09unknown"))+string(wsMessage(true, "\x00too late")))
	if sh == nil {
		t.Fatalf("got status %d", resp.StatusCode)
	}
	if shown, status := sh.end(t); strings.Contains(shown, "too late") || !strings.Contains(status, "unknown channel 9") {
		t.Errorf("shown was %q, with status %s", shown, status)
	}
}

// Whatever a client does with paths, headers and protocols, a session of its that
// has to be recorded is recorded, or is none.
func TestNothingThatAClientSendsSwitchesRecordingOff(t *testing.T) {
	recorder, node := startRecorder(t, enforced)
	up := newPods(t)
	s := startSite(t, up, false, "", toKubernetes, node)
	const pod = "/api/v1/namespaces/default/pods/web"
	const spdyV4 = "X-Stream-Protocol-Version: v4.channel.k8s.io"

	for name, raw := range map[string]string{
		// Spellings that are ordinary to the API server.
		"as it is":            upgradeRequest("GET", pod+"/exec?command=sh", "websocket", wsV5),
		"POST":                upgradeRequest("POST", pod+"/exec?command=sh", "websocket", wsV5),
		"attach":              upgradeRequest("GET", pod+"/attach", "websocket", wsV5),
		"percent-encoded":     upgradeRequest("GET", "/api/v1/namespaces/default/pods/web/%65xec", "websocket", wsV5),
		"all percent-encoded": upgradeRequest("GET", "/%61pi/v1/n%61mespaces/default/p%6fds/w%65b/e%78ec", "websocket", wsV5),
		"trailing slash":      upgradeRequest("GET", pod+"/exec/", "websocket", wsV5),
		"trailing slashes":    upgradeRequest("GET", pod+"/exec///", "websocket", wsV5),
		"more behind it":      upgradeRequest("GET", pod+"/exec/more", "websocket", wsV5),
		"watch":               upgradeRequest("GET", pod+"/exec?watch=true&command=sh", "websocket", wsV5),
		"dry run":             upgradeRequest("GET", pod+"/exec?dryRun=All&record=false&recorder=none", "websocket", wsV5),
		"upgrade in capitals": upgradeRequest("GET", pod+"/exec", "WEBSOCKET", wsV5),
		"headers":             upgradeRequest("GET", pod+"/exec", "websocket", wsV5, "X-Recording: off", "Audit-Id: x", "X-Forwarded-Uri: /healthz", "X-Original-Url: /healthz", "X-Http-Method-Override: PUT"),
		"extensions":          upgradeRequest("GET", pod+"/exec", "websocket", wsV5, "Sec-WebSocket-Extensions: permessage-deflate", "Sec_WebSocket_Extensions: permessage-deflate"),
		"Connection":          strings.Replace(upgradeRequest("GET", pod+"/exec", "websocket", wsV5), "Connection: Upgrade", "Connection: keep-alive, X-Recording\r\nconnection: uPgRaDe", 1),
		"older watch":         upgradeRequest("GET", "/api/v1/watch/namespaces/default/pods/web/exec", "websocket", wsV5),
		"absolute URL":        upgradeRequest("GET", "http://k8s"+pod+"/exec", "websocket", wsV5),
	} {
		t.Run("recorded/"+name, func(t *testing.T) {
			since := counted()
			conn := s.dial(t, aliceAddr)
			if _, err := io.WriteString(conn, raw); err != nil {
				t.Fatal(err)
			}
			reader := bufio.NewReader(conn)
			if resp := readResponse(t, reader); resp.StatusCode != http.StatusSwitchingProtocols {
				body, _ := io.ReadAll(resp.Body)
				t.Fatalf("got status %d: %s", resp.StatusCode, body)
			}
			sh := &webSocketShell{conn: conn, reader: reader}
			sh.hear(t, "hello ")
			sh.leave()
			wantCounted(t, since, map[sessionrecording.Outcome]int{sessionrecording.Recorded: 1})
			if _, output, _ := events(t, taken(t, recorder).Bytes()); output != "hello " {
				t.Errorf("recorded was %q", output)
			}
			for _, r := range up.take() {
				if len(r.Header["Sec-Websocket-Extensions"]) > 0 {
					t.Errorf("the API server is offered the extensions %q", r.Header["Sec-Websocket-Extensions"])
				}
			}
		})
	}

	for name, raw := range map[string]string{
		// Spellings that somebody might read in another way.
		"encoded slash":               upgradeRequest("GET", "/api/v1/namespaces/default/pods/web%2Fexec", "websocket", wsV5),
		"encoded slash, lower case":   upgradeRequest("GET", "/api/v1/namespaces/default/pods/web%2fexec", "websocket", wsV5),
		"double slash":                upgradeRequest("GET", "//api/v1/namespaces/default/pods/web/exec", "websocket", wsV5),
		"double slash inside":         upgradeRequest("GET", "/api/v1/namespaces/default/pods//web/exec", "websocket", wsV5),
		"dot":                         upgradeRequest("GET", "/api/v1/namespaces/default/pods/./web/exec", "websocket", wsV5),
		"dots":                        upgradeRequest("GET", "/api/v1/namespaces/default/pods/web/log/../exec", "websocket", wsV5),
		"encoded dots":                upgradeRequest("GET", "/api/v1/namespaces/default/pods/web/log/%2e%2e/exec", "websocket", wsV5),
		"without upgrading, odd path": "GET /api/v1//namespaces HTTP/1.1\r\nHost: k8s\r\n\r\n",
		// Other doors to a shell.
		"node proxy":             upgradeRequest("GET", "/api/v1/nodes/n/proxy/exec/default/web/main?command=sh", "websocket", wsV5),
		"node proxy, POST":       "POST /api/v1/nodes/n/proxy/run/default/web/main?cmd=id HTTP/1.1\r\nHost: k8s\r\nContent-Length: 0\r\n\r\n",
		"node proxy, encoded":    upgradeRequest("GET", "/api/v1/nodes/n/%70roxy/exec%2Fdefault/../web", "websocket", wsV5),
		"pod proxy":              "GET " + pod + "/proxy/ HTTP/1.1\r\nHost: k8s\r\n\r\n",
		"service proxy":          "GET /api/v1/namespaces/default/services/s/proxy/ HTTP/1.1\r\nHost: k8s\r\n\r\n",
		"older proxy":            "GET /api/v1/proxy/nodes/n/run HTTP/1.1\r\nHost: k8s\r\n\r\n",
		"console of an addition": upgradeRequest("GET", "/apis/subresources.kubevirt.io/v1/namespaces/default/virtualmachineinstances/vm/console", "websocket", wsV5),
		"exec of an addition":    upgradeRequest("GET", "/apis/example.com/v1/namespaces/default/pods/web/exec", "websocket", wsV5),
		"exec in capitals":       upgradeRequest("GET", pod+"/EXEC", "websocket", wsV5),
		"not of the API":         upgradeRequest("GET", "/shell", "websocket", wsV5),
		"under a prefix":         upgradeRequest("GET", "/k8s"+pod+"/exec", "websocket", wsV5),
		// Protocols that are not understood.
		"no upgrade":                       "POST " + pod + "/exec?command=sh HTTP/1.1\r\nHost: k8s\r\nContent-Length: 0\r\n\r\n",
		"Upgrade without Connection":       "GET " + pod + "/exec HTTP/1.1\r\nHost: k8s\r\nUpgrade: websocket\r\n" + wsV5 + "\r\n\r\n",
		"another upgrade":                  upgradeRequest("GET", pod+"/exec", "h2c"),
		"two upgrades":                     upgradeRequest("GET", pod+"/exec", "websocket", "Upgrade: SPDY/3.1", wsV5),
		"two upgrades in one":              upgradeRequest("GET", pod+"/exec", "websocket, SPDY/3.1", wsV5),
		"another SPDY":                     upgradeRequest("POST", pod+"/exec", "SPDY/3", spdyV4),
		"WebSocket without a subprotocol":  upgradeRequest("GET", pod+"/exec", "websocket"),
		"an unknown subprotocol":           upgradeRequest("GET", pod+"/exec", "websocket", "Sec-WebSocket-Protocol: v9.channel.k8s.io"),
		"an unknown subprotocol behind v5": upgradeRequest("GET", pod+"/exec", "websocket", wsV5, "Sec-WebSocket-Protocol: v9.channel.k8s.io"),
		"a tunnel":                         upgradeRequest("GET", pod+"/exec", "websocket", "Sec-WebSocket-Protocol: SPDY/3.1+portforward.k8s.io"),
		"an unknown version of SPDY's":     upgradeRequest("POST", pod+"/exec", "SPDY/3.1", spdyV4+", v9.channel.k8s.io"),
	} {
		t.Run("refused/"+name, func(t *testing.T) {
			since := counted()
			resp := s.http1(t, aliceAddr, raw)
			var status metav1.Status
			if err := json.NewDecoder(resp.Body).Decode(&status); err != nil || status.Kind != "Status" || !strings.HasPrefix(status.Message, "tailscale_impersonate: ") {
				t.Errorf("got status %d: %+v, %v", resp.StatusCode, status, err)
			}
			if resp.StatusCode != http.StatusBadRequest && resp.StatusCode != http.StatusForbidden {
				t.Errorf("got status %d", resp.StatusCode)
			}
			up.checkSeen(t, nil)
			wantCounted(t, since, map[sessionrecording.Outcome]int{sessionrecording.Refused: 1})
			if n := len(recorder.Take()); n != 0 {
				t.Errorf("the recorder was given %d recordings", n)
			}
		})
	}

	// What is no session is not concerned.
	for name, raw := range map[string]string{
		"list":                 "GET /api/v1/namespaces/default/pods/ HTTP/1.1\r\nHost: k8s\r\n\r\n",
		"log":                  "GET " + pod + "/log?follow=true HTTP/1.1\r\nHost: k8s\r\n\r\n",
		"watch":                upgradeRequest("GET", "/api/v1/pods?watch=true", "websocket"),
		"log over a WebSocket": upgradeRequest("GET", pod+"/log?follow=true", "websocket", "Sec-WebSocket-Protocol: binary.k8s.io"),
		"version":              "GET /version HTTP/1.1\r\nHost: k8s\r\n\r\n",
		"ephemeral container":  "PATCH " + pod + "/ephemeralcontainers HTTP/1.1\r\nHost: k8s\r\nContent-Length: 0\r\n\r\n",
	} {
		t.Run("no session/"+name, func(t *testing.T) {
			since := counted()
			resp := s.http1(t, aliceAddr, raw)
			if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusSwitchingProtocols {
				body, _ := io.ReadAll(resp.Body)
				t.Errorf("got status %d: %s", resp.StatusCode, body)
			}
			up.checkSeen(t, aliceAsProxy)
			wantCounted(t, since, map[sessionrecording.Outcome]int{})
		})
	}
}

// What is decided about one path does not count for another.
func TestAPathThatChangesOnItsWayIsRefused(t *testing.T) {
	for name, tt := range map[string]struct{ rule, body, path string }{
		"enforced":    {enforced, "uri strip_prefix /k8s\n", "/k8s/api/v1/namespaces/default/pods/web/exec"},
		"wanted":      {wanted, "uri strip_prefix /k8s\n", "/k8s/api/v1/namespaces/default/pods/web/exec"},
		"another pod": {wanted, "uri replace web secret\n", "/api/v1/namespaces/default/pods/web/exec"},
		"no session":  {wanted, "uri replace log exec\n", "/api/v1/namespaces/default/pods/web/log"},
	} {
		t.Run(name, func(t *testing.T) {
			up := newPods(t)
			_, node := startRecorder(t, tt.rule)
			s := startSite(t, up, false, "", "route {\ntailscale_impersonate\n"+tt.body+"reverse_proxy $UPSTREAM {\n$KUBERNETES\n}\n}", node)
			if resp := s.http1(t, aliceAddr, upgradeRequest("GET", tt.path, "websocket", wsV5)); resp.StatusCode != http.StatusForbidden {
				t.Errorf("got status %d; want 403", resp.StatusCode)
			}
			up.checkSeen(t, nil)
		})
	}
}

// Every way in which a recorder can fail, for callers that have to be recorded and
// for those that need not be.
func TestRecordersThatFail(t *testing.T) {
	addrs := func(addresses ...string) string {
		b, err := json.Marshal(addresses)
		if err != nil {
			t.Fatal(err)
		}
		return `{"recorderAddrs":` + string(b)
	}
	up := newPods(t)
	for _, tt := range []struct {
		name  string
		rule  string // up to what enforces
		mode  recordertest.Mode
		works bool
	}{
		{"refuses connections", addrs(absentAddr), recordertest.V2, false},
		{"does not answer", addrs(emptyAddr), recordertest.V2, false},
		{"accepts and is silent", addrs(recorderAddr), recordertest.Silent, false},
		{"answers with an error", addrs(recorderAddr), recordertest.Failing, false},
		{"is no peer's address", addrs("192.0.2.1:80"), recordertest.V2, false},
		{"is the proxy's own address", addrs(nodeAddr + ":80"), recordertest.V2, false},
		{"is known by its tag only", `{"recorder":["tag:recorder"]`, recordertest.V2, false},
		{"others before and behind it fail", addrs(emptyAddr, absentAddr, recorderAddr, emptyAddr, "192.0.2.1:80"), recordertest.V2, true},
		{"slow", addrs(recorderAddr), recordertest.Slow, true},
	} {
		for _, enforce := range []bool{true, false} {
			for name, open := range shells {
				t.Run(fmt.Sprintf("%s/enforced %t/%s", tt.name, enforce, name), func(t *testing.T) {
					recorder, node := startRecorder(t, fmt.Sprintf(`%s,"enforceRecorder":%t}`, tt.rule, enforce))
					recorder.SetMode(tt.mode)
					s := startSite(t, up, false, "", toKubernetes, node)
					since := counted()
					up.take()
					began := time.Now()
					sh, resp := open(t, s, execTarget, "")
					took := time.Since(began)
					if took > 6*time.Second {
						t.Errorf("it took %v", took)
					}
					if tt.works && took > 2*time.Second {
						t.Errorf("it took %v, with one recorder that answers", took)
					}
					if enforce && !tt.works {
						if sh != nil {
							t.Fatal("the session began")
						}
						checkRefused(t, resp, forbidden, "the session has to be recorded, and no recorder can be reached")
						up.checkSeen(t, nil)
						wantCounted(t, since, map[sessionrecording.Outcome]int{sessionrecording.Refused: 1})
						// kubectl tries again over the other protocol.
						began := time.Now()
						if sh, _ := open(t, s, execTarget, ""); sh != nil || time.Since(began) > time.Second {
							t.Errorf("the next try took %v", time.Since(began))
						}
						return
					}
					if sh == nil {
						t.Fatalf("got status %d", resp.StatusCode)
					}
					sh.hear(t, "hello ")
					sh.say(t, "alice")
					sh.hear(t, "hello alice")
					sh.leave()
					if !tt.works {
						wantCounted(t, since, map[sessionrecording.Outcome]int{sessionrecording.Unrecorded: 1})
						return
					}
					wantCounted(t, since, map[sessionrecording.Outcome]int{sessionrecording.Recorded: 1})
					if _, output, _ := events(t, taken(t, recorder).Bytes()); output != "hello alice" {
						t.Errorf("recorded was %q", output)
					}
				})
			}
		}
	}
}

// A recorder that dies or stalls in the midst of a session ends it if it has to be
// recorded, and its user is told; another goes on.
func TestRecorderIsLostInTheMidst(t *testing.T) {
	up := newPods(t)
	for _, version := range []recordertest.Mode{recordertest.V1, recordertest.V2} {
		for _, way := range []string{"dies", "stalls"} {
			for _, enforce := range []bool{true, false} {
				for name, open := range shells {
					t.Run(fmt.Sprintf("%s/version %d/enforced %t/%s", way, version, enforce, name), func(t *testing.T) {
						recorder, node := startRecorder(t, fmt.Sprintf(`{"recorderAddrs":[%q],"enforceRecorder":%t}`, recorderAddr, enforce))
						recorder.SetMode(version)
						if way == "stalls" {
							if version == recordertest.V1 {
								t.Skip("the same as in version 2, where the bound is the sink's")
							}
							recorder.SetMode(recordertest.Stalling)
						}
						s := startSite(t, up, false, "", toKubernetes, node)
						since := counted()
						sh := mustOpen(t, open, s)
						sh.hear(t, "hello ")
						began := time.Now()
						var more sync.WaitGroup
						if way == "dies" {
							recorder.Cut()
						} else {
							more.Go(func() {
								// More than there is room for on the way.
								block := strings.Repeat("x", 32<<10)
								for range 400 {
									if !trySay(sh, block) {
										return
									}
								}
							})
						}
						if !enforce {
							if way == "dies" {
								sh.say(t, "bob")
								sh.hear(t, "hello bob")
							} else {
								readN(t, sh, 400*32<<10)
							}
							more.Wait()
							sh.leave()
							wantCounted(t, since, map[sessionrecording.Outcome]int{sessionrecording.Lost: 1})
							return
						}
						shown, status := sh.end(t)
						if took := time.Since(began); took > 12*time.Second {
							t.Errorf("it ended after %v", took)
						}
						const reason = "The session was ended by the proxy: this session has to be recorded, and its recorder was lost"
						if !strings.HasSuffix(shown, "\r\n"+reason+"\r\n") {
							t.Errorf("on the terminal was %q at last", shown[max(0, len(shown)-200):])
						}
						var got metav1.Status
						if err := json.Unmarshal([]byte(status), &got); err != nil || got.Status != metav1.StatusFailure || got.Message != reason {
							t.Errorf("on the error stream was %s", status)
						}
						sh.leave()
						more.Wait()
						wantCounted(t, since, map[sessionrecording.Outcome]int{sessionrecording.Ended: 1})
					})
				}
			}
		}
	}
}

// A pod that neither reads nor prints does not keep a session that has to end.
func TestRecorderIsLostWhileThePodIsBusy(t *testing.T) {
	up := newTunnel(t, func(conn net.Conn) {
		defer conn.Close()
		_, _ = io.WriteString(conn, switchedToV5+string(wsMessage(false, "\x01hello ")))
		<-t.Context().Done()
	})
	recorder, node := startRecorder(t, enforced)
	s := startSite(t, up, false, "", toKubernetes, node)
	since := counted()
	sh := mustOpen(t, openWebSocket, s).(*webSocketShell)
	sh.hear(t, "hello ")
	// What is typed is taken until there is no room for it on the way.
	block := wsMessage(true, "\x00"+strings.Repeat("x", 1<<20))
	for err := error(nil); err == nil; {
		_ = sh.conn.SetWriteDeadline(time.Now().Add(time.Second))
		_, err = sh.conn.Write(block)
	}
	recorder.Cut()
	wantCounted(t, since, map[sessionrecording.Outcome]int{sessionrecording.Ended: 1})
}

// Caddy says over a WebSocket that it closes it, and waits until that is written,
// also when a config is reloaded. A client that does not read does not stop it.
func TestAClientThatDoesNotReadDoesNotHoldUpCaddy(t *testing.T) {
	for _, rules := range [][]string{{}, {enforced}} {
		full := make(chan struct{})
		up := newTunnel(t, func(conn net.Conn) {
			defer conn.Close()
			_, err := io.WriteString(conn, switchedToV5)
			for block := wsMessage(false, "\x01"+strings.Repeat("x", 1<<20)); err == nil; {
				_ = conn.SetWriteDeadline(time.Now().Add(time.Second))
				_, err = conn.Write(block)
			}
			close(full)
			<-t.Context().Done()
		})
		_, node := startRecorder(t, rules...)
		mustOpen(t, openWebSocket, startSite(t, up, false, "", toKubernetes, node))
		<-full
		mustStop(t)
	}
}

// And a pod that does not read does neither, recorded or not.
func TestAPodThatDoesNotReadDoesNotHoldUpCaddy(t *testing.T) {
	for _, rules := range [][]string{{}, {enforced}} {
		up := newTunnel(t, func(conn net.Conn) {
			defer conn.Close()
			if _, err := io.WriteString(conn, switchedToV5); err != nil {
				t.Error(err)
			}
			<-t.Context().Done()
		})
		_, node := startRecorder(t, rules...)
		client, ok := mustOpen(t, openWebSocket, startSite(t, up, false, "", toKubernetes, node)).(*webSocketShell)
		if !ok {
			t.Fatal("no WebSocket")
		}
		block := wsMessage(true, "\x00"+strings.Repeat("x", 1<<20))
		for err := error(nil); err == nil; { // until it stalls
			_ = client.conn.SetWriteDeadline(time.Now().Add(time.Second))
			_, err = client.conn.Write(block)
		}
		mustStop(t)
	}
}

// mustStop stops Caddy, which is not to take long.
func mustStop(t *testing.T) {
	t.Helper()
	stopped := make(chan error, 1)
	go func() { stopped <- caddy.Stop() }()
	select {
	case err := <-stopped:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(15 * time.Second):
		t.Fatal("Caddy does not stop")
	}
}

// newTunnel returns an upstream that leaves the connection of every request to serve.
func newTunnel(t *testing.T, serve func(net.Conn)) *upstream {
	t.Helper()
	u := newUpstream(t)
	u.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		serve(conn)
	})
	return u
}

// switchedToV5 is the answer to who offers the newest protocol over a WebSocket.
const switchedToV5 = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n"

// trySay types, and reports whether that went through.
func trySay(sh shell, text string) bool {
	switch sh := sh.(type) {
	case *webSocketShell:
		_, err := sh.conn.Write(wsMessage(true, "\x00"+text))
		return err == nil
	case *spdyShell:
		_, err := sh.stdin.Write([]byte(text))
		return err == nil
	}
	return false
}

// readN reads until n bytes have been shown.
func readN(t *testing.T, sh shell, n int) {
	t.Helper()
	switch sh := sh.(type) {
	case *webSocketShell:
		for read := 0; read < n; {
			opcode, payload, err := readWSMessage(sh.reader)
			if err != nil || opcode == 8 {
				t.Fatalf("after %d bytes: %v", read, err)
			}
			read += len(payload) - 1
		}
	case *spdyShell:
		if _, err := io.CopyN(io.Discard, sh.stdout, int64(n)); err != nil {
			t.Fatal(err)
		}
	}
}

// Data on a stream of which it is not known what it carries ends any session.
func TestDataOnAnUnknownStreamEndsTheSession(t *testing.T) {
	for _, rule := range []string{enforced, wanted} {
		recorder, node := startRecorder(t, rule)
		s := startSite(t, newPods(t), false, "", toKubernetes, node)
		sh := mustOpen(t, openWebSocket, s)
		sh.hear(t, "hello ")
		since := counted()
		if _, err := sh.(*webSocketShell).conn.Write(wsMessage(true, "\x07x")); err != nil {
			t.Fatal(err)
		}
		if shown, status := sh.end(t); !strings.Contains(shown, "unknown channel 7") || !strings.Contains(status, "unknown channel 7") {
			t.Errorf("shown was %q, with status %s", shown, status)
		}
		wantCounted(t, since, map[sessionrecording.Outcome]int{sessionrecording.Ended: 1})
		taken(t, recorder)
	}
}

// Recordings are kept in files as well, with or without a recorder.
func TestFilesAreKept(t *testing.T) {
	up := newPods(t)
	for _, rules := range [][]string{nil, {enforced}} {
		dir := filepath.Join(t.TempDir(), "a", "b")
		recorder, node := startRecorder(t, rules...)
		s := startSite(t, up, false, "", "tailscale_impersonate {\nrecord "+dir+"\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", node)
		since := counted()
		sh := mustOpen(t, openSPDY, s)
		sh.hear(t, "hello ")
		sh.say(t, "alice")
		sh.hear(t, "hello alice")

		// Were the proxy killed now, this would be left.
		partial := onlyFile(t, dir, ".cast.partial")
		deadline := time.Now().Add(time.Second)
		for {
			b, err := os.ReadFile(partial)
			if err != nil {
				t.Fatal(err)
			}
			if strings.HasSuffix(string(b), "\n") {
				if _, output, _ := events(t, b); output == "hello alice" {
					break
				}
			}
			if time.Now().After(deadline) {
				t.Fatalf("a second later, the file holds %q", b)
			}
			time.Sleep(10 * time.Millisecond) // between two looks
		}
		sh.leave()
		wantCounted(t, since, map[sessionrecording.Outcome]int{sessionrecording.Recorded: 1})
		file := onlyFile(t, dir, ".cast")
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		if mode := info.Mode().Perm(); mode != 0o600 {
			t.Errorf("the file has mode %v", mode)
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if _, output, _ := events(t, b); output != "hello alice" {
			t.Errorf("the file holds %q", output)
		}
		if len(rules) > 0 {
			if diff := cmp.Diff(string(b), string(taken(t, recorder).Bytes())); diff != "" {
				t.Errorf("the recorder has another recording (-file +recorder):\n%s", diff)
			}
		}
	}
}

// onlyFile returns the one file in dir, which has to end with suffix.
func onlyFile(t *testing.T, dir, suffix string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 1 || !strings.HasSuffix(entries[0].Name(), suffix) {
		t.Fatalf("the directory holds %v; want one file ending with %s", entries, suffix)
	}
	return filepath.Join(dir, entries[0].Name())
}

// A directory that is given by what is not set would be none, and nothing recorded.
func TestADirectoryThatIsNotSetIsAConfigError(t *testing.T) {
	h := &Handler{Config: caddyfile.Config{Record: "{env.NO_SUCH_VARIABLE}"}, logger: zap.NewNop()}
	if err := h.setUp(new(revocation.Config), nil); err == nil || !strings.Contains(err.Error(), "NO_SUCH_VARIABLE") {
		t.Errorf("got error %v; want one that names the variable", err)
	}
}

// A session whose file cannot be written does not begin.
func TestNoFileNoSession(t *testing.T) {
	up := newPods(t)
	notADir := filepath.Join(t.TempDir(), "file")
	writeFile(t, notADir, "")
	_, node := startRecorder(t)
	s := startSite(t, up, false, "", "tailscale_impersonate {\nrecord "+notADir+"\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", node)
	_, resp := openWebSocket(t, s, execTarget, "")
	checkRefused(t, resp, refusedWith{http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, ""}, "the session cannot be recorded")
	up.checkSeen(t, nil)
}

// Of a session that the API server refuses, nothing is left.
func TestARefusedSessionLeavesNothing(t *testing.T) {
	up := newUpstream(t)
	up.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusForbidden) })
	dir := t.TempDir()
	recorder, node := startRecorder(t, enforced)
	s := startSite(t, up, false, "", "tailscale_impersonate {\nrecord "+dir+"\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", node)
	since := counted()
	if resp := s.http1(t, aliceAddr, upgradeRequest("GET", execTarget, "websocket", wsV5)); resp.StatusCode != http.StatusForbidden {
		t.Errorf("got status %d", resp.StatusCode)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("the directory holds %v, %v", entries, err)
	}
	if b := taken(t, recorder).Bytes(); len(b) > 0 {
		t.Errorf("the recorder holds %q", b)
	}
	wantCounted(t, since, map[sessionrecording.Outcome]int{})
}

// A session that the API server has been asked for, and has not answered, may have
// run, whoever is the cause: what it was is kept.
func TestASessionThatIsNotAnsweredIsKept(t *testing.T) {
	for _, tt := range []struct {
		name string
		// cause is what happens once the API server has the request.
		cause func(client, upstream net.Conn)
	}{
		{"the client goes away", func(client, _ net.Conn) { _ = client.Close() }},
		{"the API server goes away", func(_, upstream net.Conn) { _ = upstream.Close() }},
		{"the API server goes away in the midst of its answer", func(_, upstream net.Conn) {
			_, _ = io.WriteString(upstream, "HTTP/1.1 101 Switching")
			_ = upstream.Close()
		}},
		{"the access is withdrawn", func(net.Conn, net.Conn) {
			for _, c := range revocation.Callers() {
				revocation.Drop(c.Remote, c.Local, c.Identity.Node, "operator")
			}
		}},
	} {
		for transport, config := range map[string]string{"kubernetes": "$KUBERNETES", "http": "$HTTP"} {
			t.Run(tt.name+", transport "+transport, func(t *testing.T) {
				running := make(chan net.Conn, 1)
				up := newTunnel(t, func(conn net.Conn) { running <- conn })
				recorder, node := startRecorder(t, enforced)
				dir := t.TempDir()
				s := startSite(t, up, false, "", "tailscale_impersonate {\nrecord "+dir+"\n}\nreverse_proxy $UPSTREAM {\n"+config+"\n}", node)
				since := counted()
				client := s.dial(t, aliceAddr)
				if _, err := io.WriteString(client, upgradeRequest("GET", execTarget, "websocket", wsV5)); err != nil {
					t.Fatal(err)
				}
				var upstream net.Conn
				select {
				case upstream = <-running:
				case <-time.After(10 * time.Second):
					t.Fatal("the API server is not asked")
				}
				defer upstream.Close()
				tt.cause(client, upstream)
				wantCounted(t, since, map[sessionrecording.Outcome]int{sessionrecording.Ended: 1})
				files, err := filepath.Glob(filepath.Join(dir, "*.cast"))
				if err != nil || len(files) != 1 {
					t.Fatalf("the directory holds %q, %v; want a recording", files, err)
				}
				kept, err := os.ReadFile(files[0])
				if err != nil {
					t.Fatal(err)
				}
				for who, b := range map[string][]byte{"the file": kept, "the recorder": taken(t, recorder).Bytes()} {
					if header, _, _ := events(t, b); header.Command != "sh -c ls" {
						t.Errorf("%s holds %q; want what was asked for", who, b)
					}
				}
			})
		}
	}
}

// Where no API server could be reached, nothing has run.
func TestASessionThatCannotBeSentLeavesNothing(t *testing.T) {
	up := newUpstream(t)
	dir := t.TempDir()
	s := startSite(t, up, false, "", "tailscale_impersonate {\nrecord "+dir+"\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", aliceNode())
	up.Close()
	since := counted()
	if resp := s.http1(t, aliceAddr, upgradeRequest("GET", execTarget, "websocket", wsV5)); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("got status %d", resp.StatusCode)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("the directory holds %v, %v", entries, err)
	}
	wantCounted(t, since, map[sessionrecording.Outcome]int{})
}

// 200 sessions at once, in the course of which the recorder is lost to the half.
func TestManySessionsLeaveNothingBehind(t *testing.T) {
	const sessions = 200
	up := newPods(t)
	recorder, node := startRecorder(t, wanted)
	dir := t.TempDir()
	s := startSite(t, up, false, "", "tailscale_impersonate {\nrecord "+dir+"\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", node)
	warm := mustOpen(t, openWebSocket, s)
	warm.hear(t, "hello ")
	warm.leave()
	taken(t, recorder)
	settle := func() int {
		up.CloseClientConnections()
		runtime.GC()
		return runtime.NumGoroutine()
	}
	before := settle()

	since := counted()
	var all [sessions]shell
	var opening sync.WaitGroup
	atOnce := make(chan struct{}, 20) // are opened; in the end, all are open
	for i := range all {
		opening.Go(func() {
			atOnce <- struct{}{}
			defer func() { <-atOnce }()
			open := openWebSocket
			if i%2 == 0 {
				open = openSPDY
			}
			sh, _ := open(t, s, execTarget, "")
			if sh == nil {
				t.Error("a session was refused")
				return
			}
			sh.hear(t, "hello ")
			sh.say(t, fmt.Sprint("session ", i, "."))
			sh.hear(t, fmt.Sprint("session ", i, "."))
			all[i] = sh
		})
	}
	opening.Wait()
	if t.Failed() {
		return
	}
	for _, sh := range all[:sessions/2] {
		sh.leave()
	}
	wantCounted(t, since, map[sessionrecording.Outcome]int{sessionrecording.Recorded: sessions / 2})
	recorder.Cut()
	for _, sh := range all[sessions/2:] {
		sh.say(t, "after")
		sh.hear(t, "after")
		sh.leave()
	}
	wantCounted(t, since, map[sessionrecording.Outcome]int{sessionrecording.Recorded: sessions / 2, sessionrecording.Lost: sessions / 2})

	seen := make(map[string]bool)
	for _, r := range recorder.Take() {
		<-r.Ended()
		if _, output, _ := events(t, r.Bytes()); seen[output] {
			t.Errorf("two recordings hold %q", output)
		} else {
			seen[output] = true
		}
	}
	if len(seen) != sessions {
		t.Errorf("the recorder has %d recordings; want %d", len(seen), sessions)
	}
	deadline := time.Now().Add(15 * time.Second)
	for (recorder.Conns() > 0 || settle() > before+5) && time.Now().Before(deadline) {
		time.Sleep(20 * time.Millisecond) // between two looks
	}
	if n := recorder.Conns(); n > 0 {
		t.Errorf("%d connections to the recorder are left", n)
	}
	if n := settle(); n > before+5 {
		b := make([]byte, 1<<20)
		t.Errorf("%d goroutines are left; %d there were before\n%s", n, before, b[:runtime.Stack(b, true)])
	}
}

// A client that does not read cannot keep a session that has to end.
func TestAClientThatDoesNotReadIsNotWaitedFor(t *testing.T) {
	recorder, node := startRecorder(t, enforced)
	s := startSite(t, newPods(t), false, "", toKubernetes, node)
	since := counted()
	sh := mustOpen(t, openWebSocket, s).(*webSocketShell)
	var typing sync.WaitGroup
	typing.Go(func() {
		for trySay(sh, strings.Repeat("x", 32<<10)) {
		}
	})
	// Until nothing moves any more: what comes back is not read.
	recorded := func() int {
		total := 0
		for _, r := range recorder.Peek() {
			total += len(r.Bytes())
		}
		return total
	}
	for before := -1; recorded() != before; {
		before = recorded()
		time.Sleep(300 * time.Millisecond) // in which more would have arrived
	}
	recorder.Cut()
	wantCounted(t, since, map[sessionrecording.Outcome]int{sessionrecording.Ended: 1})
	sh.leave()
	typing.Wait()
}

// A caller that goes away while recorders are asked is not one that cannot be
// recorded: its next session is.
func TestGoingAwayDoesNotSwitchRecordingOff(t *testing.T) {
	for _, rule := range []string{enforced, wanted} {
		recorder, node := startRecorder(t, rule)
		dial := node.DialPeer
		asked := make(chan struct{}, 10)
		node.DialPeer = func(ctx context.Context, network, address string) (net.Conn, error) {
			asked <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		}
		s := startSite(t, newPods(t), false, "", toKubernetes, node)
		since := counted()
		conn := s.dial(t, aliceAddr)
		if _, err := io.WriteString(conn, upgradeRequest("GET", execTarget, "websocket", wsV5)); err != nil {
			t.Fatal(err)
		}
		<-asked
		_ = conn.Close()
		outcome := sessionrecording.Unrecorded
		if rule == enforced {
			outcome = sessionrecording.Refused
		}
		wantCounted(t, since, map[sessionrecording.Outcome]int{outcome: 1})
		node.DialPeer = dial
		since = counted()
		sh := mustOpen(t, openWebSocket, s)
		sh.hear(t, "hello ")
		sh.leave()
		wantCounted(t, since, map[sessionrecording.Outcome]int{sessionrecording.Recorded: 1})
		taken(t, recorder)
	}
}

// What the API server chooses has to be what it was offered.
func TestAProtocolThatWasNotOfferedIsNotSpoken(t *testing.T) {
	for name, chosen := range map[string]string{
		"another subprotocol": "Upgrade: websocket\r\nSec-WebSocket-Protocol: v9.channel.k8s.io\r\n",
		"no subprotocol":      "Upgrade: websocket\r\n",
		"compression":         "Upgrade: websocket\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\nSec-WebSocket-Extensions: permessage-deflate\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			up := newTunnel(t, func(conn net.Conn) {
				defer conn.Close()
				_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"+chosen+"\r\n"+string(wsMessage(false, "\x01secret")))
				_, _ = io.Copy(io.Discard, conn)
			})
			_, node := startRecorder(t, enforced)
			s := startSite(t, up, false, "", toKubernetes, node)
			since := counted()
			conn := s.dial(t, aliceAddr)
			if _, err := io.WriteString(conn, upgradeRequest("GET", execTarget, "websocket", wsV5)); err != nil {
				t.Fatal(err)
			}
			wantCounted(t, since, map[sessionrecording.Outcome]int{sessionrecording.Ended: 1})
			_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			if b, _ := io.ReadAll(conn); strings.Contains(string(b), "secret") {
				t.Errorf("the client has read %q", b)
			}
		})
	}
}

// A recorder that is wanted and cannot be reached is missed, whatever is kept in
// files.
func TestAFileIsNoRecorder(t *testing.T) {
	up := newPods(t)
	for _, rule := range []string{`{"recorderAddrs":["` + absentAddr + `"]}`, `{"recorderAddrs":["` + absentAddr + `"],"enforceRecorder":true}`} {
		dir := t.TempDir()
		_, node := startRecorder(t, rule)
		s := startSite(t, up, false, "", "tailscale_impersonate {\nrecord "+dir+"\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", node)
		since := counted()
		up.take()
		sh, resp := openWebSocket(t, s, execTarget, "")
		if strings.Contains(rule, "enforce") {
			checkRefused(t, resp, forbidden, "no recorder can be reached")
			up.checkSeen(t, nil)
			if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
				t.Errorf("the directory holds %v, %v", entries, err)
			}
			continue
		}
		if sh == nil {
			t.Fatalf("got status %d", resp.StatusCode)
		}
		sh.hear(t, "hello ")
		sh.leave()
		wantCounted(t, since, map[sessionrecording.Outcome]int{sessionrecording.Lost: 1})
		onlyFile(t, dir, ".cast")
	}
}
