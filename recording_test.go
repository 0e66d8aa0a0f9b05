// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// longExec is the target of an exec with a command of 300,000 bytes, which are six times
// as many in the JSON of encoding/json.
var longExec = "/api/v1/namespaces/default/pods/web/exec?command=" + strings.Repeat("<", 300_000)

// startRecordingSite runs a site that records to dir, and accepts as much in the header of
// a request as the API server does.
func startRecordingSite(t *testing.T, up *proxytest.APIServer, dir string, node *tailnet.Node, options ...string) *proxytest.Site {
	t.Helper()
	return proxytest.Config{
		API:    up,
		Server: "max_header_size 1MiB",
		Body:   "tailscale_impersonate {\nrecord " + dir + "\n" + strings.Join(options, "\n") + "\n}\nreverse_proxy https://$UPSTREAM {\n$HTTP\n}",
		Nodes:  []*tailnet.Node{node},
	}.Start(t)
}

// A caller that the API server refuses leaves nothing on the disk, however soon it goes.
func TestRecording_OfRefusedCallerThatLeavesIsNotKept(t *testing.T) {
	asked := make(chan struct{}, 1)
	up := proxytest.NewAPIServer(t)
	up.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		select {
		case <-r.Context().Done(): // the proxy has gone away with its client
		case <-time.After(time.Second):
		}
		http.Error(w, "no", http.StatusForbidden)
	})
	dir := t.TempDir()
	recorder, node := proxytest.StartRecorder(t, proxytest.SessionsWanted)
	s := startRecordingSite(t, up, dir, node)
	since := proxytest.CountsSince(t, "recordings_total")
	client := s.Dial(t, proxytest.AliceAddr)
	if _, err := io.WriteString(client, proxytest.UpgradeRequest("GET", longExec, "websocket", proxytest.WebSocketV5)); err != nil {
		t.Fatal(err)
	}
	select {
	case <-asked:
	case <-time.After(10 * time.Second):
		t.Fatal("the API server is not asked")
	}
	_ = client.Close()
	if b := proxytest.OneRecording(t, recorder).Bytes(); len(b) > 0 {
		t.Errorf("the recorder holds %d bytes; want none", len(b))
	}
	deadline := time.Now().Add(10 * time.Second)
	for entries := 1; entries > 0; {
		all, err := os.ReadDir(dir)
		if entries = len(all); err != nil || time.Now().After(deadline) {
			t.Fatalf("the directory holds %v, %v", all, err)
		}
	}
	proxytest.WaitForCounts(t, since, map[string]float64{})
}

// Where the API server gives no answer, the command may have run: what is kept is small.
func TestRecording_OfUnansweredRequestIsSmall(t *testing.T) {
	up := proxytest.NewPods(t)
	up.Config.Handler = http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	dir := t.TempDir()
	s := startRecordingSite(t, up, dir, proxytest.AliceNode())
	since := proxytest.CountsSince(t, "recordings_total")
	_ = s.HTTP1(t, proxytest.AliceAddr, proxytest.UpgradeRequest("GET", longExec, "websocket", proxytest.WebSocketV5))
	proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total ended": 1})
	b, err := os.ReadFile(onlyFile(t, dir, ".cast"))
	if err != nil {
		t.Fatal(err)
	}
	header, _ := proxytest.ParseCast(t, b)
	if len(b) > 2<<10 || !strings.HasSuffix(header.Command, "<[cut, 300000 bytes]") {
		t.Errorf("the file has %d bytes and the command %q", len(b), header.Command)
	}
}

// A session that began has its whole command on record.
func TestRecording_HasWholeCommand(t *testing.T) {
	up := proxytest.NewPods(t)
	dir := t.TempDir()
	s := startRecordingSite(t, up, dir, proxytest.AliceNode())
	since := proxytest.CountsSince(t, "recordings_total")
	sh, resp := proxytest.OpenWebSocket(t, s, longExec)
	if sh == nil {
		t.Fatalf("got %s", resp.Status)
	}
	sh.Hear(t, "hello ")
	sh.Leave()
	proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total recorded": 1})
	b, err := os.ReadFile(onlyFile(t, dir, ".cast"))
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Count(string(b), "<"); got != 300_000+256 {
		t.Errorf("the command has %d characters; want 300000, and 256 in the header", got)
	}
}

// The options of a site are those of its recordings.
func TestRecording_Options(t *testing.T) {
	attach := strings.Replace(proxytest.ExecTarget, "/exec?", "/attach?", 1)
	for _, tt := range []struct {
		name, target string
		options      []string
		outcome      string // of a session that begins
		refusal      string // of any other
	}{
		{"required", proxytest.ExecTarget, []string{"record_required"}, "recorded", ""},
		{"required, and without a recording", "/api/v1/nodes/n/proxy/run", []string{"record_required"}, "", "what goes through /api/v1/nodes/n/proxy/run cannot be"},
		{"a kind that is not allowed", attach, []string{"record_required", "enforced_sessions exec"}, "", "enforced_sessions does not allow attach"},
		{"a kind that is not allowed, where nothing is enforced", attach, []string{"enforced_sessions exec"}, "recorded", ""},
		{"no room", proxytest.ExecTarget, []string{"record_required", "record_max_size 1KiB"}, "", "the recordings of the proxy have reached record_max_size"},
		{"no room, where nothing is enforced", proxytest.ExecTarget, []string{"record_max_size 1KiB"}, "unrecorded", ""},
		{"no limit", proxytest.ExecTarget, []string{"record_required", "record_max_size 0"}, "recorded", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			up := proxytest.NewPods(t)
			dir := t.TempDir()
			s := startRecordingSite(t, up, dir, proxytest.AliceNode(), tt.options...)
			since := proxytest.CountsSince(t, "recordings_total")
			sh, resp := proxytest.OpenWebSocket(t, s, tt.target)
			if tt.outcome != "" {
				if sh == nil {
					t.Fatalf("got %s", resp.Status)
				}
				sh.Hear(t, "hello ")
				sh.Leave()
				proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total " + tt.outcome: 1})
				return
			}
			if sh != nil {
				t.Fatal("the session begins")
			}
			body, _ := io.ReadAll(resp.Body)
			if !strings.Contains(string(body), tt.refusal) {
				t.Errorf("got %s: %s; want that %s", resp.Status, body, tt.refusal)
			}
			up.CheckNone(t)
			if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
				t.Errorf("the directory holds %v, %v", entries, err)
			}
		})
	}
}

// What is typed is recorded if the site says so.
func TestRecording_HasInput(t *testing.T) {
	for _, open := range proxytest.Shells {
		dir := t.TempDir()
		s := startRecordingSite(t, proxytest.NewPods(t), dir, proxytest.AliceNode(), "record_input all")
		since := proxytest.CountsSince(t, "recordings_total")
		sh := proxytest.MustOpen(t, open, s)
		sh.Hear(t, "hello ")
		sh.Say(t, "alice")
		sh.Hear(t, "hello alice")
		sh.Leave()
		proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total recorded": 1})
		b, err := os.ReadFile(onlyFile(t, dir, ".cast"))
		if err != nil || !strings.Contains(string(b), `, "i", "alice"]`) {
			t.Errorf("the file holds %s, %v; want what was typed", b, err)
		}
	}
}

// Old recordings are deleted while a config runs, and what they take is free again.
func TestRecording_RetentionMakesRoom(t *testing.T) {
	dir := t.TempDir()
	old := filepath.Join(dir, "20261128T093000Z-4jkq2rxcvb7mzhn5tw3dlfg6ye.cast")
	proxytest.WriteFile(t, old, strings.Repeat("x", 8<<10))
	at := time.Now().Add(-2 * time.Hour)
	if err := os.Chtimes(old, at, at); err != nil {
		t.Fatal(err)
	}
	s := startRecordingSite(t, proxytest.NewPods(t), dir, proxytest.AliceNode(), "record_required", "record_retention 1h", "record_max_size 8KiB")
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		since := proxytest.CountsSince(t, "recordings_total")
		if sh, _ := proxytest.OpenWebSocket(t, s, proxytest.ExecTarget); sh != nil {
			sh.Leave()
			proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total recorded": 1})
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("there is no room")
		}
	}
	if _, err := os.Stat(old); err == nil {
		t.Error("the old recording is still there")
	}
}
