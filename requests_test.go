// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/revocation"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordertest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

const (
	eventsEnforced = `{"recorderAddrs":["` + recorderAddr + `"],"enforceRecorder":true,"enableEvents":true}`
	eventsWanted   = `{"recorderAddrs":["` + recorderAddr + `"],"enableEvents":true}`
)

func TestRequestsAreSentToTheRecorderThatTheGrantsName(t *testing.T) {
	recorder, node := startRecorder(t, eventsWanted)
	up := newUpstream(t)
	s := startSite(t, up, false, "", "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", node)
	body := strings.Repeat("0123456789", 10_000) // more than the default limit
	resp := s.http1(t, aliceAddr, fmt.Sprintf("POST /api/v1/namespaces/a/pods HTTP/1.1\r\nHost: k8s\r\nContent-Length: %d\r\n\r\n%s", len(body), body))
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("got %s", resp.Status)
	}
	seen := up.take()
	if len(seen) != 1 || seen[0].ContentLength != int64(len(body)) {
		t.Fatalf("the API server saw %d requests; want one with all of the body", len(seen))
	}
	events := recorder.TakeEvents()
	if len(events) != 1 {
		t.Fatalf("the recorder has %d events; want 1", len(events))
	}
	e := events[0]
	if e.Kubernetes.Verb != "create" || e.Kubernetes.Resource != "pods" || e.Source.NodeUser != "alice@example.com" || e.Source.NodeID != "nLaptop" {
		t.Errorf("got %+v; want that alice creates a pod", e)
	}
	if got, want := string(e.Request.Body), body[:64<<10]+"\n[the body is cut off after 65536 bytes]"; got != want {
		t.Errorf("got a body of %d bytes; want the first 65536, and that it is cut", len(got))
	}
}

// A client that has Caddy drop a body would delete what is recorded as a dry run.
func TestABodyThatIsRecordedIsSent(t *testing.T) {
	const body = `{"kind":"DeleteOptions","apiVersion":"v1","dryRun":["All"]}`
	recorder, node := startRecorder(t, eventsEnforced)
	up := newUpstream(t)
	s := startSite(t, up, false, "", "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", node)
	resp := s.http1(t, aliceAddr, fmt.Sprintf("DELETE /apis/apps/v1/namespaces/a/deployments/b HTTP/1.1\r\nHost: k8s\r\nIncremental: ?1\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(body), body))
	seen := up.take()
	if resp.StatusCode != http.StatusOK || len(seen) != 1 {
		t.Fatalf("got %s, and the API server saw %d requests; want one", resp.Status, len(seen))
	}
	if seen[0].ContentLength == 0 {
		t.Error("the API server saw no body")
	}
	if events := recorder.TakeEvents(); len(events) != 1 || string(events[0].Request.Body) != body {
		t.Errorf("the recorder has %+v", events)
	}
}

// Without the handler's help as well: what would be sent is not what is recorded.
func TestABodyThatIsRecordedIsNotDroppedByAConfig(t *testing.T) {
	for _, rewrite := range []string{"request_header Incremental ?1", "uri query -dryRun"} {
		_, node := startRecorder(t, eventsEnforced)
		up := newUpstream(t)
		s := startSite(t, up, false, "", "route {\ntailscale_impersonate\n"+rewrite+"\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}\n}", node)
		resp := s.http1(t, aliceAddr, "DELETE /api/v1/namespaces/a/pods/b?dryRun=All HTTP/1.1\r\nHost: k8s\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n")
		if seen := up.take(); len(seen) > 0 {
			t.Errorf("%s: the API server saw the request", rewrite)
		}
		checkRefused(t, resp, refusedWith{http.StatusForbidden, "Forbidden", ""}, "recorder")
	}
}

func TestARequestThatCannotBeRecordedIsNotSent(t *testing.T) {
	for _, tt := range []struct {
		rule   string
		mode   recordertest.Mode
		status int
	}{
		{eventsEnforced, recordertest.V2, http.StatusOK},
		{eventsEnforced, recordertest.Failing, http.StatusForbidden},
		{eventsEnforced, recordertest.V1, http.StatusForbidden},
		{eventsWanted, recordertest.Failing, http.StatusOK},
		{enforced, recordertest.Failing, http.StatusOK}, // only sessions are recorded
	} {
		recorder, node := startRecorder(t, tt.rule)
		recorder.SetMode(tt.mode)
		up := newUpstream(t)
		s := startSite(t, up, false, "", "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", node)
		resp := s.http1(t, aliceAddr, "GET /api/v1/secrets HTTP/1.1\r\nHost: k8s\r\n\r\n")
		if resp.StatusCode != tt.status {
			t.Errorf("%s, mode %v: got %s; want %d", tt.rule, tt.mode, resp.Status, tt.status)
		}
		if sent := len(up.take()) > 0; sent != (tt.status == http.StatusOK) {
			t.Errorf("%s, mode %v: the API server saw the request: %v", tt.rule, tt.mode, sent)
		}
		if tt.status != http.StatusOK {
			checkRefused(t, resp, refusedWith{http.StatusForbidden, "Forbidden", ""}, "has to be recorded")
		}
	}
}

// The access log must not name a user for a request that went nowhere.
func TestARequestThatCannotBeRecordedSetsNoPlaceholders(t *testing.T) {
	recorder, node := startRecorder(t, eventsEnforced)
	recorder.SetMode(recordertest.Failing)
	r := newRequest(http.MethodGet, "https://k8s.example.ts.net/api/v1/secrets")
	resp, got := serve(t, newHandler(t, caddyfile.Config{}, node), r)
	if resp.StatusCode == http.StatusOK || got != nil {
		t.Fatalf("got %s; want a refusal", resp.Status)
	}
	repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if user, ok := repl.Get(userID); ok {
		t.Errorf("the placeholder says %v; want nobody", user)
	}
}

// The union of all rules counts.
func TestOneRuleIsEnoughForEvents(t *testing.T) {
	recorder, node := startRecorder(t, wanted, `{"enableEvents":true}`, `{"enforceRecorder":true}`)
	up := newUpstream(t)
	s := startSite(t, up, false, "", "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", node)
	s.http1(t, aliceAddr, "GET /api/v1/pods HTTP/1.1\r\nHost: k8s\r\n\r\n")
	if n := len(recorder.TakeEvents()); n != 1 {
		t.Errorf("the recorder has %d events; want 1", n)
	}
	recorder.SetMode(recordertest.Failing)
	if resp := s.http1(t, aliceAddr, "GET /api/v1/pods HTTP/1.1\r\nHost: k8s\r\n\r\n"); resp.StatusCode != http.StatusForbidden {
		t.Errorf("got %s from a recorder that fails; want 403", resp.Status)
	}
}

func TestWhatIsRecordedIsWhatIsSent(t *testing.T) {
	_, node := startRecorder(t, eventsWanted)
	up := newUpstream(t)
	s := startSite(t, up, false, "", "route {\ntailscale_impersonate\nuri strip_prefix /a\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}\n}", node)
	if resp := s.http1(t, aliceAddr, "GET /a/api/v1/pods HTTP/1.1\r\nHost: k8s\r\n\r\n"); resp.StatusCode != http.StatusForbidden || len(up.take()) > 0 {
		t.Errorf("got %s; want 403, and nothing sent", resp.Status)
	}
}

func TestRequestsAreLoggedWithoutARecorder(t *testing.T) {
	limit := int64(4)
	for _, tt := range []struct {
		name   string
		config caddyfile.Config
		want   []map[string]any
	}{
		{"not unless that is configured", caddyfile.Config{EventBodyLimit: &limit, EventSecretBodies: true}, nil},
		{"log", caddyfile.Config{Events: "log", EventBodyLimit: &limit}, []map[string]any{
			{"verb": "create", "resource": "pods", "body": "0123", "body_cut": true, "body_left_out": ""},
			{"verb": "create", "resource": "secrets", "body": "", "body_cut": false, "body_left_out": "it may hold secrets"},
		}},
		{"log, with the bodies of Secrets", caddyfile.Config{Events: "log", EventSecretBodies: true}, []map[string]any{
			{"verb": "create", "resource": "pods", "body": "01234", "body_cut": false, "body_left_out": ""},
			{"verb": "create", "resource": "secrets", "body": "01234", "body_cut": false, "body_left_out": ""},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			core, logs := observer.New(zap.InfoLevel)
			h := &Handler{Config: tt.config, logger: zap.New(core)}
			if err := h.setUp(new(revocation.Config), []string{t.Name()}); err != nil {
				t.Fatal(err)
			}
			h.setReady(tailnet.Nodes{aliceNode()})
			for _, resource := range []string{"pods", "secrets"} {
				r := newRequest("POST", "https://k8s/api/v1/namespaces/a/"+resource)
				r.Body = io.NopCloser(strings.NewReader("01234"))
				if _, passed := serve(t, h, r); passed == nil {
					t.Fatal("the request does not go on")
				}
			}
			var got []map[string]any
			for _, entry := range logs.All() {
				if entry.LoggerName != "events" || entry.ContextMap()["user"] != "alice@example.com" {
					t.Errorf("got %q of the logger %q, with %v; want alice's requests in that of events", entry.Message, entry.LoggerName, entry.ContextMap())
				}
				line := make(map[string]any)
				for _, field := range []string{"verb", "resource", "body", "body_cut", "body_left_out"} {
					line[field] = entry.ContextMap()[field]
				}
				got = append(got, line)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
