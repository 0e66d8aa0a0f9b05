// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// auditors is a grant that makes a caller a reader of recordings, on sites with showing.
const (
	auditors = `{"impersonate":{"groups":["auditors"]}}`
	showing  = "recordings\nrecordings_readers auditors security-*\nrecheck_interval 100ms"
)

const castHeader = `{"version":2,"width":40,"height":5,"timestamp":1767323045,"env":{},"command":"sh","srcNode":"laptop.example.ts.net","srcNodeUser":"alice@example.com","kubernetes":{"PodName":"web","Namespace":"default","SessionType":"exec"}}` + "\n"

// writeCast writes a recording to dir and returns its ID.
func writeCast(t *testing.T, dir, suffix string, events ...string) string {
	t.Helper()
	const id = "20260102T030405Z-abcdefghijklmnopqrstuvwxyz"
	proxytest.WriteFile(t, filepath.Join(dir, id+".cast"+suffix), castHeader+strings.Join(events, ""))
	return id
}

// newReader returns the node of a reader.
func newReader() *proxytest.ChangingNode {
	node := proxytest.NewChangingNode()
	node.Says(proxytest.WhoIs(auditors), nil)
	return node
}

// body returns the body of an answer, which has the given status.
func body(t *testing.T, resp *http.Response, status int) string {
	t.Helper()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != status {
		t.Fatalf("answered %s, %v; want %d:\n%s", resp.Status, err, status, b)
	}
	return string(b)
}

// What a session shows can be found, read, watched and downloaded.
func TestRecordings_OfSessionAreShown(t *testing.T) {
	dir := t.TempDir()
	s := startRecordingSite(t, proxytest.NewPods(t), dir, newReader().Node, showing)
	since := proxytest.CountsSince(t, "recordings_total")
	sh := proxytest.MustOpenWebSocket(t, s)
	sh.Hear(t, "hello ")
	sh.Say(t, "whoami <script>")
	sh.Leave()
	proxytest.WaitForCounts(t, since, map[string]float64{"recordings_total recorded": 1})
	var found []string
	deadline := time.Now().Add(time.Minute)
	for len(found) == 0 {
		list := body(t, s.Get(t, "/recordings?text=HELLO", ""), http.StatusOK)
		found = regexp.MustCompile(`<a class="what" href="(/recordings/([^"?]+))`).FindStringSubmatch(list)
		if time.Now().After(deadline) {
			t.Fatalf("the session is not found:\n%s", list)
		}
		time.Sleep(10 * time.Millisecond)
	}
	path, id := found[1], found[2]
	if page := body(t, s.Get(t, path, ""), http.StatusOK); !strings.Contains(page, "alice@example.com") || !strings.Contains(page, "hello") {
		t.Errorf("the page has no user or no text:\n%s", page)
	}
	resp := s.Get(t, path+".cast", "")
	file, err := os.ReadFile(filepath.Join(dir, id+".cast"))
	if got := body(t, resp, http.StatusOK); err != nil || got != string(file) {
		t.Errorf("got %q, %v; want the file", got, err)
	}
	if got := resp.Header.Get("Content-Disposition"); got != `attachment; filename="`+id+`.cast"` {
		t.Errorf("the recording comes as %q", got)
	}
	if got := body(t, s.Get(t, path+".txt", ""), http.StatusOK); !strings.Contains(got, "hello") {
		t.Errorf("the text is %q", got)
	}
	if got := body(t, s.Get(t, path+"/play", ""), http.StatusOK); !strings.Contains(got, `"rows"`) || !strings.Contains(got, `{"end":`) {
		t.Errorf("it is played as\n%s", got)
	}
	for _, path := range []string{"/recordings/20260102T030405Z-abcdefghijklmnopqrstuvwxyz", "/recordings/../api", "/recordings/.recordings-index.db", "/recordings/x.txt", "/recordings/20260102T030405Z-abcdefghijklmnopqrstuvwxyz.cast", "/recordings/20260102T030405Z-abcdefghijklmnopqrstuvwxyz/play"} {
		proxytest.CheckRefused(t, s.Get(t, path, ""), proxytest.NotFound)
	}
}

// Only members of the named groups read recordings, and only as themselves. Nothing of it
// reaches the API server.
func TestRecordings_OnlyForReaders(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	dir := t.TempDir()
	id := writeCast(t, dir, "")
	node := newReader()
	s := startRecordingSite(t, up, dir, node.Node, showing, "cache_ttl 0", "optional_groups security-*", "client_impersonation strip")
	targets := []string{"/recordings", "/recordings/", "/recordings/" + id, "/recordings/" + id + ".cast", "/recordings/" + id + ".txt", "/recordings/" + id + "/play"}
	node.Says(proxytest.WhoIs(proxytest.Readers), nil)
	for _, target := range targets {
		proxytest.CheckRefused(t, s.Get(t, target, ""), proxytest.Forbidden, "alice@example.com may not read recordings")
	}
	node.Says(proxytest.WhoIs(), nil)
	proxytest.CheckRefused(t, s.Get(t, "/recordings", ""), proxytest.Forbidden)
	// A group that is on request counts only if it is asked for.
	node.Says(proxytest.WhoIs(`{"impersonate":{"groups":["security-eu"]}}`), nil)
	proxytest.CheckRefused(t, s.Get(t, "/recordings", ""), proxytest.Forbidden)
	node.Says(nil, tailnet.ErrPeerNotFound)
	proxytest.CheckRefused(t, s.Get(t, "/recordings", ""), proxytest.Forbidden)
	node.Says(proxytest.WhoIs(auditors), nil)
	for _, target := range targets {
		body(t, s.Get(t, target, ""), http.StatusOK)
	}
	proxytest.CheckRefused(t, s.HTTP1(t, proxytest.AliceAddr, "POST /recordings HTTP/1.1\r\nHost: k8s\r\nContent-Length: 0\r\n\r\n"), proxytest.MethodNotAllowed)
	up.CheckNone(t)
	for _, path := range []string{"/recordingsx", "/api/recordings"} {
		s.Get(t, path, "")
		up.One(t)
	}
}

func TestRecordings_AreReadAsOneself(t *testing.T) {
	s := proxytest.Config{
		API: proxytest.NewAPIServer(t), Nodes: []*tailnet.Node{newReader().Node},
		Body: "tailscale_impersonate {\nrecord " + t.TempDir() + "\n" + showing + "\nclient_impersonation authorize\n}\nreverse_proxy https://$UPSTREAM {\n$KUBERNETES\n}",
	}.Start(t)
	for _, lines := range []string{"Impersonate-User: bob\r\n", "Impersonate-User: bob\r\nImpersonate-Group: auditors\r\n"} {
		proxytest.CheckRefused(t, s.Get(t, "/recordings", lines), proxytest.Forbidden, "recordings are read as oneself")
	}
	body(t, s.Get(t, "/recordings", "Impersonate-User: alice@example.com\r\nImpersonate-Group: auditors\r\n"), http.StatusOK)
}

// A page that a pod serves has the same origin, and must not read recordings as whoever
// opens it. The page's own script can, for what the page shows.
func TestRecordings_WebPages(t *testing.T) {
	dir := t.TempDir()
	id := writeCast(t, dir, "", `[0.1, "o", "secret"]`+"\n")
	s := proxytest.Config{
		API: proxytest.NewAPIServer(t), TLS: true, Nodes: []*tailnet.Node{newReader().Node},
		Body: "tailscale_impersonate {\nrecord " + dir + "\n" + showing + "\n}\nreverse_proxy https://$UPSTREAM {\n$HTTP\n}",
	}.Start(t)
	const browser = "User-Agent: Mozilla/5.0\r\n"
	const opened = browser + "Sec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: document\r\nSec-Fetch-Site: "
	path := "/recordings/" + id
	page := s.Get(t, path, opened+"none\r\n")
	for name, want := range map[string]string{"X-Frame-Options": "DENY", "Cross-Origin-Opener-Policy": "same-origin", "Cache-Control": "no-store"} {
		if got := page.Header.Get(name); got != want {
			t.Errorf("%s is %q; want %q", name, got, want)
		}
	}
	policy := page.Header.Get("Content-Security-Policy")
	if !strings.HasPrefix(policy, "default-src 'none'") || !strings.Contains(policy, "; sandbox allow-scripts allow-forms allow-downloads") || strings.Contains(policy, "unsafe") || strings.Contains(policy, "allow-same-origin") {
		t.Errorf("the policy is %q", policy)
	}
	token := regexp.MustCompile(`data-token="([^"]+)"`).FindStringSubmatch(body(t, page, http.StatusOK))
	if token == nil {
		t.Fatal("the page has no token")
	}
	withToken := "Accept: application/x-ndjson;token=" + token[1] + "\r\n"
	script := browser + "Sec-Fetch-Mode: cors\r\nSec-Fetch-Dest: empty\r\nSec-Fetch-Site: "
	for _, tt := range []struct {
		name, path, lines string
		allowed           bool
	}{
		{"a link on this site", path, opened + "same-origin\r\n", true},
		{"a link on another site", path, opened + "cross-site\r\n", true},
		{"a download", path + ".cast", opened + "cross-site\r\n", true},
		{"a program", path + "/play", "User-Agent: curl/8\r\n", true},
		{"the page's script", path + "/play", withToken + script + "cross-site\r\nOrigin: null\r\n", true},
		{"the page's script, without a token", path + "/play", script + "cross-site\r\nOrigin: null\r\n", false},
		{"the page's script, with another token", path + "/play", "Accept: application/x-ndjson;token=" + token[1] + "x\r\n" + script + "cross-site\r\nOrigin: null\r\n", false},
		{"the page's script, with a token that lasts longer", path + "/play", "Accept: application/x-ndjson;token=9" + token[1] + "\r\n" + script + "cross-site\r\nOrigin: null\r\n", false},
		{"the page's script, with the token in the URL", path + "/play?token=" + token[1], script + "cross-site\r\nOrigin: null\r\n", false},
		{"the page's script, for the list", "/recordings", withToken + script + "cross-site\r\nOrigin: null\r\n", false},
		{"the page's script, for the page", path, withToken + script + "cross-site\r\nOrigin: null\r\n", false},
		{"the page's script, for another recording", "/recordings/20270102T030405Z-abcdefghijklmnopqrstuvwxyz/play", withToken + script + "cross-site\r\nOrigin: null\r\n", false},
		{"a page that is fetched ahead", path, opened + "same-origin\r\nSec-Purpose: prefetch\r\n", false},
		{"a script of a pod's page", "/recordings", script + "same-origin\r\n", false},
		{"a script of a pod's page, the page", path, script + "same-origin\r\n", false},
		{"a script of a pod's page, a recording", path + ".cast", script + "same-origin\r\nReferer: https://k8s" + path + "\r\n", false},
		{"a frame of a pod's page", path, browser + "Sec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: iframe\r\nSec-Fetch-Site: same-origin\r\n", false},
		{"an object of a pod's page", path, browser + "Sec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: object\r\nSec-Fetch-Site: same-origin\r\n", false},
		{"a service worker of a pod's page", path, opened + "same-origin\r\nService-Worker: script\r\n", false},
		{"a script of another site", path + ".cast", script + "cross-site\r\nOrigin: https://evil\r\n", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp := s.Get(t, tt.path, tt.lines)
			if tt.allowed {
				body(t, resp, http.StatusOK)
				return
			}
			proxytest.CheckRefused(t, resp, proxytest.Forbidden)
		})
	}
	t.Run("another device", func(t *testing.T) {
		resp := s.HTTP1(t, proxytest.MalloryAddr, "GET "+path+"/play HTTP/1.1\r\nHost: k8s\r\n"+withToken+script+"cross-site\r\nOrigin: null\r\n\r\n")
		proxytest.CheckRefused(t, resp, proxytest.Forbidden)
	})
}

// Nothing in a recording becomes markup.
func TestRecordings_NothingBecomesMarkup(t *testing.T) {
	const evil = `</title></script><script>alert(1)</script><img src=x onerror=alert(1)>"'`
	dir := t.TempDir()
	quoted, err := json.Marshal(evil)
	if err != nil {
		t.Fatal(err)
	}
	const id = "20260102T030405Z-abcdefghijklmnopqrstuvwxyz"
	proxytest.WriteFile(t, filepath.Join(dir, id+".cast"), strings.NewReplacer(`"sh"`, string(quoted), `"laptop.example.ts.net"`, string(quoted), `"alice@example.com"`, string(quoted),
		`"web"`, string(quoted), `"default"`, string(quoted), `"exec"`, string(quoted)).Replace(castHeader)+
		fmt.Sprintf("[0.1, \"o\", %s]\n[0.2, \"o\", \"\\u001b]0;%s\\u0007\\u001b]8;;javascript:alert(1)\\u0007link\"]\n[0.3, \"m\", %s]\n", quoted, strings.Trim(string(quoted), `"`), quoted))
	s := startRecordingSite(t, proxytest.NewAPIServer(t), dir, newReader().Node, showing)
	deadline := time.Now().Add(time.Minute)
	for !strings.Contains(body(t, s.Get(t, "/recordings?text=onerror", ""), http.StatusOK), `<q class="line">`) {
		if time.Now().After(deadline) {
			t.Fatal("the recording is not found")
		}
		time.Sleep(10 * time.Millisecond)
	}
	for _, path := range []string{"/recordings", "/recordings?text=%3Cscript%3Ealert(1)&user=%22%3E%3Cscript%3Ealert(1)&from=2026-01-01", "/recordings/" + id, "/recordings/" + id + "?text=%22%3E%3Cscript%3Ealert(1)"} {
		page := body(t, s.Get(t, path, ""), http.StatusOK)
		if strings.Contains(page, "<script>alert") || strings.Contains(page, "<img") || strings.Contains(page, `"javascript:`) {
			t.Errorf("%s has markup of the recording:\n%s", path, page)
		}
	}
	resp := s.Get(t, "/recordings/"+id+"/play", "")
	if got := body(t, resp, http.StatusOK); strings.Contains(got, "javascript:") || resp.Header.Get("Content-Type") != "application/x-ndjson" || resp.Header.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("it is played with the headers %v as\n%s", resp.Header, got)
	}
}

// A playback ends when its reader loses access.
func TestRecordings_PlaybackEndsWithAccess(t *testing.T) {
	for _, tt := range []struct {
		name     string
		withdraw func(node *proxytest.ChangingNode)
	}{
		{"the group", func(node *proxytest.ChangingNode) { node.Says(proxytest.WhoIs(proxytest.Readers), nil) }},
		{"all access", func(node *proxytest.ChangingNode) { node.Says(nil, tailnet.ErrPeerNotFound) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			id := writeCast(t, dir, ".partial", `[0.1, "o", "running"]`+"\n")
			node := newReader()
			s := startRecordingSite(t, proxytest.NewAPIServer(t), dir, node.Node, showing)
			conn := s.Dial(t, proxytest.AliceAddr)
			if _, err := io.WriteString(conn, "GET /recordings/"+id+"/play?at=end HTTP/1.1\r\nHost: k8s\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			if err := conn.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
				t.Fatal(err)
			}
			lines, plays := bufio.NewScanner(conn), false
			for !plays && lines.Scan() {
				plays = strings.Contains(lines.Text(), "running")
			}
			if !plays {
				t.Fatalf("it is not played: %v", lines.Err())
			}
			tt.withdraw(node)
			withdrawn := time.Now()
			for lines.Scan() {
			}
			if took := time.Since(withdrawn); took > time.Minute {
				t.Errorf("it took %v", took)
			}
		})
	}
}

// Who reads what is in the log, and is an event.
func TestRecordings_ReadingIsRecorded(t *testing.T) {
	dir, log := t.TempDir(), filepath.Join(t.TempDir(), "log")
	id := writeCast(t, dir, "", `[0.1, "o", "x"]`+"\n")
	recorder, node := proxytest.StartRecorder(t, auditors, proxytest.EventsWanted)
	s := proxytest.Config{
		API: proxytest.NewAPIServer(t), Nodes: []*tailnet.Node{node}, Log: log,
		Body: "tailscale_impersonate {\nrecord " + dir + "\nevents log\n" + showing + "\n}\nreverse_proxy https://$UPSTREAM {\n$HTTP\n}",
	}.Start(t)
	body(t, s.Get(t, "/recordings?text=password", ""), http.StatusOK)
	body(t, s.Get(t, "/recordings/"+id+"/play?at=2", "Accept: application/x-ndjson;token=1.secret\r\n"), http.StatusOK)
	var events []string
	for _, event := range recorder.TakeEvents() {
		events = append(events, event.Request.Path)
	}
	if want := []string{"/recordings?text=password", "/recordings/" + id + "/play?at=2"}; !slices.Equal(events, want) {
		t.Errorf("the recorder has events of %q; want %q", events, want)
	}
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(b), "1.secret") {
		t.Errorf("the log has the page's token:\n%s", b)
	}
	for _, want := range []string{
		`"msg":"recordings are listed","node":"laptop.example.ts.net","user":"alice@example.com"`, `"query":"text=password"`,
		`"msg":"a recording is read"`, `"what":"play","session":"` + id + `","at":"2"`, `"msg":"a recording was played"`,
		`"msg":"API request"`, `"uri":"/recordings/` + id + `/play?at=2"`,
	} {
		if !strings.Contains(string(b), want) {
			t.Errorf("the log has no %s:\n%s", want, b)
		}
	}
}
