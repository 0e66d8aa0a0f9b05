// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
	"tailscale.com/sessionrecording"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordertest"
)

// The API server has to choose what it was asked for and offered, because its frames
// are parsed accordingly.
func TestSession_RejectsProtocolNotOffered(t *testing.T) {
	const v4, v5 = "v4.channel.k8s.io", "v5.channel.k8s.io"
	for _, tt := range []struct {
		name    string
		upgrade string
		h       http.Header
		mention string // in the error, empty if there is none
	}{
		{"SPDY", spdyUpgrade, http.Header{"Upgrade": {"SPDY/3.1"}, "X-Stream-Protocol-Version": {v4}}, ""},
		{"SPDY, first version", spdyUpgrade, http.Header{"Upgrade": {"SPDY/3.1"}}, ""},
		{"SPDY, unknown version", spdyUpgrade, http.Header{"Upgrade": {"SPDY/3.1"}, "X-Stream-Protocol-Version": {"v9.channel.k8s.io"}}, "v9"},
		{"SPDY in place of WebSocket", websocketUpgrade, http.Header{"Upgrade": {"SPDY/3.1"}, "Sec-Websocket-Protocol": {v5}}, "SPDY"},
		{"WebSocket in place of SPDY", spdyUpgrade, http.Header{"Upgrade": {"websocket"}}, "websocket"},
		{"WebSocket", websocketUpgrade, http.Header{"Upgrade": {"websocket"}, "Sec-WebSocket-Protocol": {v5}}, ""},
		{"WebSocket and SPDY", websocketUpgrade, http.Header{"Upgrade": {"websocket", "SPDY/3.1"}, "Sec-WebSocket-Protocol": {v5}}, "SPDY"},
		{"no protocol", websocketUpgrade, http.Header{"Sec-WebSocket-Protocol": {v5}}, "switched to"},
		{"WebSocket, without a version", websocketUpgrade, http.Header{"Upgrade": {"websocket"}}, "cannot be recorded"},
		{"WebSocket, unknown version", websocketUpgrade, http.Header{"Upgrade": {"websocket"}, "Sec-Websocket-Protocol": {"v9.channel.k8s.io"}}, "v9"},
		{"WebSocket, two versions", websocketUpgrade, http.Header{"Upgrade": {"websocket"}, "Sec-Websocket-Protocol": {v4, v5}}, "cannot be recorded"},
		{"WebSocket, extensions", websocketUpgrade, http.Header{"Upgrade": {"websocket"}, "Sec-WebSocket-Protocol": {v5}, "Sec-WebSocket-Extensions": {"permessage-deflate"}}, "extensions"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := &Session{kind: exec, upgrade: tt.upgrade, terminal: newTerminal(false, nil)}
			w := httptest.NewRecorder()
			for name, values := range tt.h {
				w.Header()[name] = values
			}
			if tt.mention == "" {
				if _, err := s.protocol(w.Header()); err != nil {
					t.Error(err)
				}
				return
			}
			if _, err := s.protocol(w.Header()); err == nil || !strings.Contains(err.Error(), tt.mention) {
				t.Errorf("got error %v; want one that mentions %q", err, tt.mention)
			}
			if _, _, err := s.Wrap(w).(http.Hijacker).Hijack(); err == nil || s.reason == nil {
				t.Errorf("Hijack: got error %v, and the reason %v; want errors", err, s.reason)
			}
		})
	}
}

// A file that cannot be written ends its session, and does not look complete.
func TestSession_EndsWhenFileFails(t *testing.T) {
	check := counted(t)
	dir := t.TempDir()
	s := begin(t, newRecorder(dir), execRequest(t))
	if err := s.file.Close(); err != nil { // as if the disk were gone
		t.Fatal(err)
	}
	p, err := s.protocol(upgraded)
	if err != nil {
		t.Fatal(err)
	}
	client, server := net.Pipe()
	read := make(chan string)
	go func() {
		b, _ := io.ReadAll(client) // until it is closed
		read <- string(b)
	}()
	c := newConn(server, nil, p, func() {})
	s.begin(c)
	eventually(t, "the session goes on although nothing more is written", func() bool { return c.failed() != nil })
	if _, err = c.Write([]byte(wsServer("\x01x"))); !errors.Is(err, errFileLost) {
		t.Errorf("got error %v; want %v", err, errFileLost)
	}
	_ = c.Close()
	s.Close()
	if got := <-read; !strings.Contains(got, errFileLost.Error()) {
		t.Errorf("the client reads %q", got)
	}
	check(Ended)
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || !strings.HasSuffix(entries[0].Name(), partial) {
		t.Errorf("the directory holds %v, %v; want the partial file", entries, err)
	}
}

// Once a required recording fails, nothing more that is printed is forwarded.
func TestSession_EndsWhenRequiredRecordingFails(t *testing.T) {
	// checkEnded checks that output is an error once the sink of s has failed.
	checkEnded := func(t *testing.T, s *Session, want error) {
		t.Helper()
		s.terminal.cast = newCast(s.header, s.sinks...)
		if err := s.terminal.cast.output(stdout, []byte("x")); err != nil && !errors.Is(err, want) {
			t.Error(err)
		}
		<-s.sinks[0].dead
		if err := s.terminal.cast.output(stdout, []byte("x")); !errors.Is(err, want) {
			t.Errorf("got error %v; want %v", err, want)
		}
	}
	reasonOf := func(s *Session) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.reason
	}
	t.Run("file", func(t *testing.T) {
		s := begin(t, newRecorder(t.TempDir()), execRequest(t))
		defer s.Close()
		if err := s.file.Close(); err != nil { // as if the disk were gone
			t.Fatal(err)
		}
		checkEnded(t, s, errFileLost)
	})
	for _, tt := range []struct {
		name string
		mode recordertest.Mode
		fail func(*recordertest.Recorder)
	}{
		{"recorder", recordertest.V2, (*recordertest.Recorder).Cut},
		// A recorder that ends a recording by itself does not have all of it.
		{"recorder that ends the recording", recordertest.Ending, func(*recordertest.Recorder) {}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, node := startRecorder(t)
			r.SetMode(tt.mode)
			s, err := newRecorder("").Begin(execRequest(t), callerAt(node, impersonate.Recording{Recorders: recorders, Enforce: true}))
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			tt.fail(r)
			eventually(t, "the session goes on", func() bool { return reasonOf(s) != nil })
			if err := reasonOf(s); !errors.Is(err, errRecorderLost) {
				t.Errorf("got the reason %v; want %v", err, errRecorderLost)
			}
			checkEnded(t, s, errRecorderLost)
		})
	}
}

// A session that prints nothing, and that of a terminal without a size, are on record
// while they last.
func TestSession_HeaderIsWrittenWithoutOutput(t *testing.T) {
	for _, query := range []string{"command=sh", "command=sh&tty=true"} {
		t.Run(query, func(t *testing.T) {
			r := execRequest(t)
			r.URL.RawQuery = query
			s := begin(t, newRecorder(t.TempDir()), r)
			defer s.Close()
			p, err := s.protocol(upgraded)
			if err != nil {
				t.Fatal(err)
			}
			_, server := net.Pipe()
			c := newConn(server, nil, p, func() {})
			defer c.Close()
			s.begin(c)
			eventually(t, "the file has no header", func() bool {
				b, err := os.ReadFile(s.file.Name())
				if err != nil {
					t.Fatal(err)
				}
				return strings.Contains(string(b), `"command":"sh"`) && strings.HasSuffix(string(b), "\n")
			})
		})
	}
}

// A session whose header cannot be written ends before anything is printed.
func TestSession_EndsWhenHeaderCannotBeWritten(t *testing.T) {
	fails := newSink(failing{}, errFileLost, func(error) {})
	if err := fails.write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	<-fails.dead
	s := &Session{terminal: &terminal{cast: newCast(sessionrecording.CastHeader{}, fails)}}
	s.writeHeader()
	if !errors.Is(s.reason, errFileLost) {
		t.Errorf("got the reason %v; want %v", s.reason, errFileLost)
	}
}

// A session may have to end before its connection is hijacked.
func TestSession_PendingReasonEndsConnection(t *testing.T) {
	s := &Session{kind: forward, forwarding: new(forwarding), log: zap.NewNop(), begun: make(chan struct{})}
	s.end(errRecorderLost)
	c := newConn(new(wire), []byte(wsClient("\x00ls\n")), binaryChannels(newNoted()), func() {})
	s.begin(c)
	if n, err := c.Read(make([]byte, 100)); n != 0 || !errors.Is(err, errRecorderLost) {
		t.Errorf("got %d bytes, %v; want %v", n, err, errRecorderLost)
	}
}

func TestSession_EndedBeforeUpgradeIsCounted(t *testing.T) {
	check := counted(t)
	dir := t.TempDir()
	s := begin(t, newRecorder(dir), execRequest(t))
	s.end(errRecorderLost)
	s.Close()
	check(Ended)
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("the directory holds %v, %v; want nothing", entries, err)
	}
}

// The command may have run although the client did not wait for the answer, so the
// recording says at least which command it was.
func TestSession_UnansweredRequestIsRecorded(t *testing.T) {
	for _, tt := range []struct {
		name     string
		out, in  int // requests sent to the API server, and answers that began to arrive
		code     int // of the answer to the client, 0 if there is none
		outcomes []Outcome
	}{
		{"not sent", 0, 0, 0, nil},
		{"not sent, and refused", 0, 0, http.StatusServiceUnavailable, nil},
		{"forbidden", 1, 1, http.StatusForbidden, nil},
		{"no answer", 1, 0, 0, []Outcome{Ended}},
		{"an error before the answer", 1, 0, http.StatusBadGateway, []Outcome{Ended}},
		{"half an answer", 1, 1, 0, []Outcome{Ended}},
		{"the client goes away as the answer arrives", 1, 1, clientGone, []Outcome{Ended}},
		{"switching protocols", 1, 1, http.StatusSwitchingProtocols, []Outcome{Ended}},
		{"no answer, and forbidden when it is sent again", 2, 1, http.StatusForbidden, []Outcome{Ended}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			check := counted(t)
			dir := t.TempDir()
			s := begin(t, newRecorder(dir), execRequest(t))
			trace := httptrace.ContextClientTrace(s.Watch(t.Context()))
			for range tt.out {
				trace.GotConn(httptrace.GotConnInfo{})
			}
			for range tt.in {
				trace.GotFirstResponseByte()
			}
			if tt.code != 0 {
				s.Wrap(httptest.NewRecorder()).WriteHeader(tt.code)
			}
			s.Close()
			check(tt.outcomes...)
			files, err := filepath.Glob(filepath.Join(dir, "*"))
			if err != nil || len(files) != len(tt.outcomes) {
				t.Fatalf("the directory holds %q, %v; want %d files", files, err, len(tt.outcomes))
			}
			for _, path := range files {
				text, err := os.ReadFile(path)
				if err != nil || !strings.HasSuffix(path, ".cast") || !strings.Contains(string(text), `"command":"sh"`) {
					t.Errorf("%s holds %q, %v; want a complete recording of the command", path, text, err)
				}
			}
		})
	}
}
