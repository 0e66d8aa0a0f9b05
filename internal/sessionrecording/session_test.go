// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	logged "go.uber.org/zap/zaptest/observer"
	"tailscale.com/sessionrecording"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

// execRequest is one over WebSocket.
func execRequest(t *testing.T) *http.Request {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/api/v1/namespaces/default/pods/web/exec?command=sh", nil)
	r.Header.Set("Connection", "Upgrade")
	r.Header.Set("Upgrade", "websocket")
	r.Header.Set("Sec-Websocket-Protocol", "v5.channel.k8s.io")
	return r
}

func caller(rules impersonate.Recording, dial DialFunc) Caller {
	return Caller{
		Peer:      &impersonate.Peer{Node: "laptop.example.ts.net", Login: "alice@example.com"},
		Recording: &rules,
		Remote:    netip.MustParseAddrPort("100.64.0.2:1"),
		Dial:      dial,
	}
}

// A file that cannot be written any more ends its session, and does not look like a
// complete one.
func TestAFileThatFailsEndsTheSession(t *testing.T) {
	var outcomes []Outcome
	site := &Site{Dir: t.TempDir(), Logger: zap.NewNop(), Count: func(o Outcome) { outcomes = append(outcomes, o) }}
	_, s, refused := site.Begin(execRequest(t), caller(impersonate.Recording{}, nobody))
	if refused != nil {
		t.Fatal(refused)
	}
	if err := s.file.Close(); err != nil { // as if the disk were gone
		t.Fatal(err)
	}
	p, err := s.protocol(http.Header{"Upgrade": {"websocket"}, "Sec-WebSocket-Protocol": {"v5.channel.k8s.io"}})
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
	// It ends without anything more being written to it.
	for deadline := time.Now().Add(10 * time.Second); c.failed() == nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the session goes on")
		}
	}
	if _, err = c.Write([]byte(wsServer("\x01x"))); !errors.Is(err, errFileLost) {
		t.Errorf("got error %v; want %v", err, errFileLost)
	}
	_ = c.Close()
	s.Close()
	if got := <-read; !strings.Contains(got, errFileLost.Error()) {
		t.Errorf("the client reads %q", got)
	}
	if len(outcomes) != 1 || outcomes[0] != Ended {
		t.Errorf("got outcomes %q; want ended", outcomes)
	}
	entries, err := os.ReadDir(site.Dir)
	if err != nil || len(entries) != 1 || !strings.HasSuffix(entries[0].Name(), partial) {
		t.Errorf("the directory holds %v, %v; want the partial file", entries, err)
	}
}

// A session that prints nothing, and that of a terminal that does not say its size, are
// on record while they last.
func TestWhatPrintsNothingIsOnRecordFromItsBeginning(t *testing.T) {
	for _, query := range []string{"?command=sh", "?command=sh&tty=true"} {
		t.Run(query, func(t *testing.T) {
			site := &Site{Dir: t.TempDir(), Logger: zap.NewNop(), Count: func(Outcome) {}}
			r := execRequest(t)
			r.URL.RawQuery = query[1:]
			_, s, refused := site.Begin(r, caller(impersonate.Recording{}, nobody))
			if refused != nil {
				t.Fatal(refused)
			}
			defer s.Close()
			p, err := s.protocol(http.Header{"Upgrade": {"websocket"}, "Sec-WebSocket-Protocol": {"v5.channel.k8s.io"}})
			if err != nil {
				t.Fatal(err)
			}
			_, server := net.Pipe()
			c := newConn(server, nil, p, func() {})
			defer c.Close()
			s.begin(c)
			for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
				b, err := os.ReadFile(s.file.Name())
				if err != nil {
					t.Fatal(err)
				}
				if strings.Contains(string(b), `"command":"sh"`) && strings.HasSuffix(string(b), "\n") {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("the file holds %q; want the header", b)
				}
			}
		})
	}
}

// A session whose header cannot be written ends before anything is printed.
func TestASessionThatCannotBeNamedEnds(t *testing.T) {
	fails := newSink(failing{}, errFileLost, func(error) {})
	if err := fails.write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	<-fails.dead
	s := &Session{cast: newCast(sessionrecording.CastHeader{}, fails)}
	s.writeHeader()
	if !errors.Is(s.reason, errFileLost) {
		t.Errorf("got the reason %v; want %v", s.reason, errFileLost)
	}
}

// The command may have run although its client has not waited for the answer, so the
// recording says at least what it was.
func TestASessionThatIsNotAnsweredIsNotForgotten(t *testing.T) {
	for _, tt := range []struct {
		name     string
		out, in  int // requests sent on, and answers that have begun to come
		code     int // what the client is told, if it is
		outcomes []Outcome
	}{
		{"not sent", 0, 0, 0, nil},
		{"not sent, and refused", 0, 0, http.StatusServiceUnavailable, nil},
		{"forbidden", 1, 1, http.StatusForbidden, nil},
		{"no answer", 1, 0, 0, []Outcome{Ended}},
		{"an error before the answer", 1, 0, http.StatusBadGateway, []Outcome{Ended}},
		{"half an answer", 1, 1, 0, []Outcome{Ended}},
		{"the client goes as the answer comes", 1, 1, clientGone, []Outcome{Ended}},
		{"switching", 1, 1, http.StatusSwitchingProtocols, []Outcome{Ended}},
		{"no answer, and forbidden when it is sent again", 2, 1, http.StatusForbidden, []Outcome{Ended}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var outcomes []Outcome
			site := &Site{Dir: t.TempDir(), Logger: zap.NewNop(), Count: func(o Outcome) { outcomes = append(outcomes, o) }}
			_, s, refused := site.Begin(execRequest(t), caller(impersonate.Recording{}, nobody))
			if refused != nil {
				t.Fatal(refused)
			}
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
			if !slices.Equal(outcomes, tt.outcomes) {
				t.Errorf("got outcomes %q; want %q", outcomes, tt.outcomes)
			}
			files, err := filepath.Glob(filepath.Join(site.Dir, "*"))
			if err != nil || len(files) != len(tt.outcomes) {
				t.Fatalf("the directory holds %q, %v; want %d", files, err, len(tt.outcomes))
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

// What has a body is answered when that has been sent, and runs before.
func TestASessionWithABodyIsRefused(t *testing.T) {
	for _, length := range []int64{1, -1} {
		r := execRequest(t)
		r.ContentLength = length
		site := &Site{Dir: t.TempDir(), Logger: zap.NewNop(), Count: func(Outcome) {}}
		if _, s, refused := site.Begin(r, caller(impersonate.Recording{}, nobody)); refused == nil {
			s.Close()
			t.Errorf("with a body of length %d the session begins", length)
		}
	}
}

// A recorder of a session that is refused for another reason is let go of without a
// word.
func TestARefusalIsNotALostRecorder(t *testing.T) {
	core, logs := logged.New(zap.InfoLevel)
	notADir := t.TempDir() + "/file"
	if err := os.WriteFile(notADir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r, dial := startRecorder(t)
	site := &Site{Dir: notADir, Logger: zap.New(core), Count: func(Outcome) {}}
	if _, _, refused := site.Begin(execRequest(t), caller(impersonate.Recording{Recorders: []netip.AddrPort{first}, Enforce: true}, dial)); refused == nil {
		t.Fatal("the session was not refused")
	}
	deadline := time.Now().Add(10 * time.Second)
	for r.Conns() > 0 && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond) // between two looks
	}
	if n := r.Conns(); n > 0 {
		t.Errorf("%d connections to the recorder are left", n)
	}
	if lost := logs.FilterMessageSnippet("lost").All(); len(lost) > 0 {
		t.Errorf("logged is %v", lost)
	}
}
