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
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordertest"
)

func TestEvents_AreSentToGrantedRecorder(t *testing.T) {
	recorder, node := proxytest.StartRecorder(t, proxytest.EventsWanted)
	up := proxytest.NewAPIServer(t)
	s := proxytest.StartSite(t, up, proxytest.ToKubernetes, node)
	body := strings.Repeat("0123456789", 10_000) // more than the default limit
	resp := s.HTTP1(t, proxytest.AliceAddr, fmt.Sprintf("POST /api/v1/namespaces/a/pods HTTP/1.1\r\nHost: k8s\r\nContent-Length: %d\r\n\r\n%s", len(body), body))
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("got %s", resp.Status)
	}
	if got := up.One(t).ContentLength; got != int64(len(body)) {
		t.Errorf("the API server received %d bytes; want %d", got, len(body))
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
		t.Errorf("got a body of %d bytes; want the first 65536, and that it is cut off", len(got))
	}
}

// Caddy drops a chunked body if the client sends the header Incremental. Recorded would
// be a dry run, while the API server deletes.
func TestEvents_RecordedBodyIsSent(t *testing.T) {
	const body = `{"kind":"DeleteOptions","apiVersion":"v1","dryRun":["All"]}`
	recorder, node := proxytest.StartRecorder(t, proxytest.EventsEnforced)
	up := proxytest.NewAPIServer(t)
	s := proxytest.StartSite(t, up, proxytest.ToKubernetes, node)
	resp := s.HTTP1(t, proxytest.AliceAddr, fmt.Sprintf("DELETE /apis/apps/v1/namespaces/a/deployments/b HTTP/1.1\r\nHost: k8s\r\nIncremental: ?1\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(body), body))
	if resp.StatusCode != http.StatusOK {
		t.Errorf("got %s", resp.Status)
	}
	if up.One(t).ContentLength == 0 {
		t.Error("the API server received no body")
	}
	if events := recorder.TakeEvents(); len(events) != 1 || string(events[0].Request.Body) != body {
		t.Errorf("the recorder has %+v", events)
	}
}

// The transport refuses what is no longer the request that was recorded.
func TestEvents_RewrittenRequestIsRefused(t *testing.T) {
	for _, rewrite := range []string{"request_header Incremental ?1", "uri query -dryRun"} {
		_, node := proxytest.StartRecorder(t, proxytest.EventsEnforced)
		up := proxytest.NewAPIServer(t)
		s := proxytest.StartSite(t, up, "route {\ntailscale_impersonate\n"+rewrite+"\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}\n}", node)
		resp := s.HTTP1(t, proxytest.AliceAddr, "DELETE /api/v1/namespaces/a/pods/b?dryRun=All HTTP/1.1\r\nHost: k8s\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n")
		up.CheckNone(t)
		proxytest.CheckRefused(t, resp, proxytest.Forbidden, "recorder")
	}
}

func TestEvents_UnrecordableRequestIsNotSent(t *testing.T) {
	for _, tt := range []struct {
		rule   string
		mode   recordertest.Mode
		status int
	}{
		{proxytest.EventsEnforced, recordertest.V2, http.StatusOK},
		{proxytest.EventsEnforced, recordertest.Failing, http.StatusForbidden},
		{proxytest.EventsEnforced, recordertest.V1, http.StatusForbidden},
		{proxytest.EventsWanted, recordertest.Failing, http.StatusOK},
		{proxytest.SessionsEnforced, recordertest.Failing, http.StatusOK}, // only sessions are recorded
	} {
		recorder, node := proxytest.StartRecorder(t, tt.rule)
		recorder.SetMode(tt.mode)
		up := proxytest.NewAPIServer(t)
		s := proxytest.StartSite(t, up, proxytest.ToKubernetes, node)
		resp := s.Get(t, "/api/v1/secrets", "")
		if resp.StatusCode != tt.status {
			t.Errorf("%s, mode %v: got %s; want %d", tt.rule, tt.mode, resp.Status, tt.status)
		}
		if tt.status == http.StatusOK {
			up.CheckOne(t, proxytest.AliceAsProxy)
			continue
		}
		up.CheckNone(t)
		proxytest.CheckRefused(t, resp, proxytest.Forbidden, "has to be recorded")
	}
}

// A body that a recorder would get only in part is refused if the config says so.
func TestEvents_LongBodyIsRefused(t *testing.T) {
	recorder, node := proxytest.StartRecorder(t, proxytest.EventsEnforced)
	up := proxytest.NewAPIServer(t)
	s := proxytest.StartSite(t, up, "tailscale_impersonate {\nevent_body_limit 4B refuse\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", node)
	post := func(body string) *http.Response {
		return s.HTTP1(t, proxytest.AliceAddr, fmt.Sprintf("POST /api/v1/namespaces/a/pods HTTP/1.1\r\nHost: k8s\r\nContent-Length: %d\r\n\r\n%s", len(body), body))
	}
	proxytest.CheckRefused(t, post("01234"), proxytest.Forbidden, "its body is longer than the 4 bytes of event_body_limit")
	up.CheckNone(t)
	if resp := post("0123"); resp.StatusCode != http.StatusOK || len(recorder.TakeEvents()) != 1 {
		t.Errorf("got %s for a body within the limit", resp.Status)
	}
}

// The access log must not name a user for a request that was not forwarded.
func TestEvents_UnrecordableRequestSetsNoPlaceholders(t *testing.T) {
	recorder, node := proxytest.StartRecorder(t, proxytest.EventsEnforced)
	recorder.SetMode(recordertest.Failing)
	r := proxytest.NewRequest(http.MethodGet, "https://k8s.example.ts.net/api/v1/secrets")
	resp, got := proxytest.Serve(t, newHandler(t, caddyfile.Config{}, node), r)
	if resp.StatusCode == http.StatusOK || got != nil {
		t.Fatalf("got %s; want a refusal", resp.Status)
	}
	repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if user, ok := repl.Get("http.auth.user.id"); ok {
		t.Errorf("the placeholder says %v; want nobody", user)
	}
}

// The union of all rules counts.
func TestEvents_UnionOfRulesCounts(t *testing.T) {
	recorder, node := proxytest.StartRecorder(t, proxytest.SessionsWanted, `{"enableEvents":true}`, `{"enforceRecorder":true}`)
	up := proxytest.NewAPIServer(t)
	s := proxytest.StartSite(t, up, proxytest.ToKubernetes, node)
	s.Get(t, "/api/v1/pods", "")
	if n := len(recorder.TakeEvents()); n != 1 {
		t.Errorf("the recorder has %d events; want 1", n)
	}
	recorder.SetMode(recordertest.Failing)
	if resp := s.Get(t, "/api/v1/pods", ""); resp.StatusCode != http.StatusForbidden {
		t.Errorf("got %s from a recorder that fails; want 403", resp.Status)
	}
}

func TestEvents_RewrittenPathIsRefused(t *testing.T) {
	_, node := proxytest.StartRecorder(t, proxytest.EventsWanted)
	up := proxytest.NewAPIServer(t)
	s := proxytest.StartSite(t, up, "route {\ntailscale_impersonate\nuri strip_prefix /a\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}\n}", node)
	if resp := s.Get(t, "/a/api/v1/pods", ""); resp.StatusCode != http.StatusForbidden {
		t.Errorf("got %s; want 403", resp.Status)
	}
	up.CheckNone(t)
}

func TestEvents_AreLogged(t *testing.T) {
	limit := int64(4)
	for _, tt := range []struct {
		name   string
		config caddyfile.Config
		want   []map[string]any
	}{
		{"without events", caddyfile.Config{EventBodyLimit: &limit, EventSecretBodies: true}, nil},
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
			h := newLoggingHandler(t, tt.config, zap.New(core), proxytest.AliceNode())
			for _, resource := range []string{"pods", "secrets"} {
				r := proxytest.NewRequest("POST", "https://k8s/api/v1/namespaces/a/"+resource)
				r.Body = io.NopCloser(strings.NewReader("01234"))
				if _, passed := proxytest.Serve(t, h, r); passed == nil {
					t.Fatal("the request is refused")
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
