// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	logged "go.uber.org/zap/zaptest/observer"
	"tailscale.com/sessionrecording"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/pin"
)

// If recording is enforced, no request gets around it.
func TestBegin_RefusesWhatCannotBeRecorded(t *testing.T) {
	with := func(r *http.Request, headers ...string) *http.Request {
		for i := 0; i < len(headers); i += 2 {
			r.Header[headers[i]] = strings.Fields(headers[i+1])
		}
		return r
	}
	withBody := func(length int64) *http.Request {
		r := execRequest(t)
		r.ContentLength = length
		return r
	}
	for _, tt := range []struct {
		name     string
		r        *http.Request
		enforce  bool
		code     int32
		outcomes []Outcome
	}{
		{"valid", execRequest(t), false, 0, nil},
		{"unrecordable, enforced", request(t, "POST", "/api/v1/namespaces/default/pods/web/ephemeralcontainers"), true, http.StatusForbidden, []Outcome{Refused}},
		{"unrecordable, not enforced", request(t, "POST", "/api/v1/namespaces/default/pods/web/ephemeralcontainers"), false, 0, []Outcome{Unrecorded}},
		{"ambiguous path", request(t, "GET", "/api/v1/namespaces/default/pods/web%2Fexec"), false, http.StatusBadRequest, []Outcome{Refused}},
		{"enforced, without a recorder", execRequest(t), true, http.StatusForbidden, []Outcome{Refused}},
		{"no upgrade", request(t, "POST", "/api/v1/namespaces/default/pods/web/exec"), false, http.StatusBadRequest, []Outcome{Refused}},
		{"no protocol to upgrade to", with(execRequest(t), "Upgrade", ""), false, http.StatusBadRequest, []Outcome{Refused}},
		{"an upgrade that Connection does not ask for", with(execRequest(t), "Connection", "keep-alive"), false, http.StatusBadRequest, []Outcome{Refused}},
		{"two upgrades", with(execRequest(t), "Upgrade", "websocket SPDY/3.1"), false, http.StatusBadRequest, []Outcome{Refused}},
		{"a second upgrade in another spelling", with(execRequest(t), "UPGRADE", "SPDY/3.1"), false, http.StatusBadRequest, []Outcome{Refused}},
		{"another protocol", with(execRequest(t), "Upgrade", "h2c"), false, http.StatusBadRequest, []Outcome{Refused}},
		{"no subprotocol", with(execRequest(t), "Sec-Websocket-Protocol", ""), false, http.StatusBadRequest, []Outcome{Refused}},
		{"an additional unknown subprotocol", with(execRequest(t), "Sec-Websocket-Protocol", "v5.channel.k8s.io v9.channel.k8s.io"), false, http.StatusBadRequest, []Outcome{Refused}},
		// The API server answers after the body, and the command runs before.
		{"a body", withBody(1), false, http.StatusBadRequest, []Outcome{Refused}},
		{"a body of unknown length", withBody(-1), false, http.StatusBadRequest, []Outcome{Refused}},
		// Nothing can be recorded as a condition for this request.
		{"no variables", httptest.NewRequestWithContext(t.Context(), "GET", "/version", nil), false, http.StatusForbidden, []Outcome{Refused}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			check := counted(t)
			s, err := newRecorder(t.TempDir()).Begin(tt.r, callerAt(nil, impersonate.Recording{Enforce: tt.enforce}))
			if s != nil {
				s.Close()
			}
			if code := codeOf(err); code != tt.code {
				t.Errorf("got %d (%v); want %d", code, err, tt.code)
			}
			check(tt.outcomes...)
		})
	}
}

// enforced_sessions says which sessions may take place where recording is enforced.
func TestBegin_EnforcedSessions(t *testing.T) {
	at := func(subresource string) *http.Request {
		r := execRequest(t)
		r.URL.Path = "/api/v1/namespaces/default/pods/web/" + subresource
		if subresource == "portforward" {
			r.Header.Set("Sec-Websocket-Protocol", "SPDY/3.1+portforward.k8s.io")
		}
		return r
	}
	for _, tt := range []struct {
		allowed           []string
		required, enforce bool
		refused           string // the subresources
	}{
		{nil, true, true, ""},
		{[]string{"exec"}, false, false, ""},
		{[]string{"exec"}, true, false, "attach portforward"},
		{[]string{"exec"}, false, true, "attach portforward"},
		{[]string{"exec", "attach"}, false, true, "portforward"},
		{[]string{"port-forward", "attach"}, false, true, "exec"},
	} {
		for _, subresource := range []string{"exec", "attach", "portforward"} {
			_, node := startRecorder(t)
			rec := newRecorder(t.TempDir())
			rec.Allowed, rec.Required = tt.allowed, tt.required
			recording := impersonate.Recording{Enforce: tt.enforce}
			if tt.enforce {
				recording.Recorders = recorders
			}
			s, err := rec.Begin(at(subresource), callerAt(node, recording))
			if s != nil {
				s.Close()
			}
			if refused := strings.Contains(tt.refused, subresource); refused != (codeOf(err) == http.StatusForbidden) || refused == (s != nil) {
				t.Errorf("%+v, %s: got %v, %v", tt, subresource, s, err)
			}
		}
	}
}

// A config that requires files has what leads past the recording refused.
func TestBegin_RequiredRefusesWhatCannotBeRecorded(t *testing.T) {
	rec := newRecorder(t.TempDir())
	rec.Required = true
	if s, err := rec.Begin(request(t, "GET", "/api/v1/nodes/a/proxy/run"), callerAt(nil, impersonate.Recording{})); s != nil || codeOf(err) != http.StatusForbidden {
		t.Errorf("got %v, %v; want a 403", s, err)
	}
}

func TestBegin_LeavesOtherRequestsAlone(t *testing.T) {
	check := counted(t)
	r := execRequest(t)
	r.Header.Set("Upgrade", "h2c")
	if s, err := newRecorder("").Begin(r, callerAt(nil, impersonate.Recording{})); s != nil || err != nil {
		t.Errorf("for a caller who is not recorded: got %v, %v; want nothing", s, err)
	}
	if s, err := newRecorder(t.TempDir()).Begin(request(t, "GET", "/api/v1/pods"), callerAt(nil, impersonate.Recording{Enforce: true})); s != nil || err != nil {
		t.Errorf("for a list: got %v, %v; want nothing", s, err)
	}
	check()
}

// The API server uses no extension that it is not offered.
func TestBegin_RemovesWebSocketExtensions(t *testing.T) {
	r := execRequest(t)
	r.Header["Sec-Websocket-Extensions"] = []string{"permessage-deflate"}
	r.Header["sec-websocket-extensions"] = []string{"permessage-deflate"}
	defer begin(t, newRecorder(t.TempDir()), r).Close()
	if offered := field(r.Header, "Sec-Websocket-Extensions"); len(offered) > 0 {
		t.Errorf("the API server is offered %q; want nothing", offered)
	}
}

func TestBegin_PinsRequest(t *testing.T) {
	for _, tt := range []struct {
		name, from, to string
		sent           bool
	}{
		{"unchanged", "/pods/web/exec", "/pods/web/exec", true},
		{"another ordinary request", "/pods/web/log", "/pods/db", true},
		{"another namespace", "/pods/web/exec", "/../other/pods/web/exec", false},
		{"another pod", "/pods/web/exec", "/pods/db/exec", false},
		{"ordinary to session", "/pods/web/log", "/pods/web/exec", false},
		{"session to ordinary", "/pods/web/exec", "/pods/web/log", false},
		{"another kind", "/pods/web/exec", "/pods/web/portforward", false},
		{"ordinary to unrecordable", "/pods/web/log", "/pods/web/proxy", false},
		{"unrecordable to another pod", "/pods/web/proxy", "/pods/db/proxy", false},
		{"another command", "/pods/web/exec?command=date", "/pods/web/exec?command=sh", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			base, err := url.Parse("/api/v1/namespaces/default/")
			if err != nil {
				t.Fatal(err)
			}
			at := func(path string) *url.URL {
				u, err := base.Parse("." + path)
				if err != nil {
					t.Fatal(err)
				}
				return u
			}
			r := execRequest(t)
			if strings.Contains(tt.from, "/log") {
				r.Header = make(http.Header)
			}
			r.URL = at(tt.from)
			s, err := newRecorder(t.TempDir()).Begin(r, callerAt(nil, impersonate.Recording{}))
			if err != nil {
				t.Fatal(err)
			}
			if s != nil {
				defer s.Close()
			}
			r.URL = at(tt.to)
			if err := pin.Check(r); (err == nil) != tt.sent {
				t.Errorf("got error %v; want none: %v", err, tt.sent)
			}
		})
	}
}

func TestBegin_HeaderNamesCallerAndPod(t *testing.T) {
	want := sessionrecording.CastHeader{
		Command: "sh -c id", SrcNode: "laptop.example.ts.net", SrcNodeID: "nAlice", SrcNodeUserID: 7, SrcNodeUser: "alice@example.com",
		Kubernetes: &sessionrecording.Kubernetes{PodName: "web", Namespace: "default", Container: "main", SessionType: "exec"},
	}
	r := execRequest(t)
	r.URL.RawQuery = "command=sh&command=-c&command=id&container=main"
	s := begin(t, newRecorder(t.TempDir()), r)
	defer s.Close()
	if diff := cmp.Diff(want, s.header); diff != "" {
		t.Errorf("for a user's device (-want +got):\n%s", diff)
	}

	r = execRequest(t)
	r.URL.Path = "/api/v1/namespaces/default/pods/web/attach"
	r.URL.RawQuery = ""
	caller := callerAt(nil, impersonate.Recording{})
	caller.Peer = &impersonate.Peer{Node: "ci.example.ts.net", NodeID: "nCI", Tags: []string{"tag:ci"}}
	s, err := newRecorder(t.TempDir()).Begin(r, caller)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	want = sessionrecording.CastHeader{
		SrcNode: "ci.example.ts.net", SrcNodeID: "nCI", SrcNodeTags: []string{"tag:ci"},
		Kubernetes: &sessionrecording.Kubernetes{PodName: "web", Namespace: "default", SessionType: "attach"},
	}
	if diff := cmp.Diff(want, s.header); diff != "" {
		t.Errorf("for a tagged device (-want +got):\n%s", diff)
	}
}

// The recorder of a session that is refused for another reason is not lost.
func TestBegin_RefusalReleasesRecorder(t *testing.T) {
	core, logs := logged.New(zap.InfoLevel)
	notADir := t.TempDir() + "/file"
	if err := os.WriteFile(notADir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r, node := startRecorder(t)
	rec := newRecorder(notADir)
	rec.Logger = zap.New(core)
	if _, err := rec.Begin(execRequest(t), callerAt(node, impersonate.Recording{Recorders: recorders, Enforce: true})); codeOf(err) != http.StatusServiceUnavailable {
		t.Fatalf("got error %v; want a 503", err)
	}
	eventually(t, "connections to the recorder are left", func() bool { return r.Conns() == 0 })
	if lost := logs.FilterMessageSnippet("lost").All(); len(lost) > 0 {
		t.Errorf("logged %v", lost)
	}
}
