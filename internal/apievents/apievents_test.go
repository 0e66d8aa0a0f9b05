// SPDX-License-Identifier: Apache-2.0

package apievents_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"tailscale.com/sessionrecording"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apievents"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/pin"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recorder"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordertest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

const limit = 10

// recorders are the address of the recorder at a node of startRecorder.
var recorders = []netip.AddrPort{netip.MustParseAddrPort("100.64.1.0:80")}

// startRecorder starts a recorder, and returns it with a node that dials it.
func startRecorder(t *testing.T) (*recordertest.Recorder, *tailnet.Node) {
	t.Helper()
	r := recordertest.Start(t)
	return r, nodeDialling(func(ctx context.Context, _, _ string) (net.Conn, error) { return r.Dial(ctx) })
}

func nodeDialling(dial func(ctx context.Context, network, address string) (net.Conn, error)) *tailnet.Node {
	return &tailnet.Node{
		Name:     "k8s",
		Addrs:    func() (netip.Addr, netip.Addr) { return netip.MustParseAddr("100.64.0.1"), netip.Addr{} },
		DialPeer: dial,
	}
}

// recording is a Recorder whose outcomes and log can be inspected.
type recording struct {
	*apievents.Recorder
	logged *observer.ObservedLogs
	before map[apievents.Outcome]float64
}

func newRecording(t *testing.T) *recording {
	core, logged := observer.New(zap.InfoLevel)
	client := new(recorder.Client)
	t.Cleanup(client.Close)
	return &recording{
		Recorder: &apievents.Recorder{BodyLimit: limit, Client: client, Logger: zap.New(core)},
		logged:   logged,
		before:   counts(t),
	}
}

// counts returns the value of the metric for every outcome.
func counts(t *testing.T) map[apievents.Outcome]float64 {
	t.Helper()
	registry := prometheus.NewRegistry()
	metrics.Register(registry)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[apievents.Outcome]float64)
	for _, family := range families {
		if family.GetName() == "caddy_tailscale_impersonate_events_total" {
			for _, m := range family.GetMetric() {
				all[apievents.Outcome(m.GetLabel()[0].GetValue())] = m.GetCounter().GetValue()
			}
		}
	}
	return all
}

// checkCounted checks the outcomes that were counted since newRecording.
func (rec *recording) checkCounted(t *testing.T, want ...apievents.Outcome) {
	t.Helper()
	got, wanted := counts(t), make(map[apievents.Outcome]float64)
	for outcome := range got {
		got[outcome] -= rec.before[outcome]
		wanted[outcome] = 0
	}
	for _, outcome := range want {
		wanted[outcome]++
	}
	if diff := cmp.Diff(wanted, got); diff != "" {
		t.Errorf("counted (-want +got):\n%s", diff)
	}
}

// checkRefused checks that err refuses a request with the given status code, and
// returns its message.
func checkRefused(t *testing.T, err error, code int32) string {
	t.Helper()
	status, ok := apistatus.From(err)
	if !ok || status.Code != code {
		t.Fatalf("got error %v; want a refusal with the code %d", err, code)
	}
	return status.Message
}

var alice = &impersonate.Peer{Node: "laptop.example.ts.net", NodeID: "nAlice", Login: "alice@example.com", UserID: 7}

func callerAt(node *tailnet.Node, peer *impersonate.Peer, recording impersonate.Recording) authn.Caller {
	return authn.Caller{
		Peer: peer, Node: node, Conn: &tailnet.Conn{Remote: netip.MustParseAddrPort("100.64.0.2:40000")},
		Identity: &impersonate.Identity{User: "alice@example.com", Groups: []string{"a", "b"}, Node: peer.Node, Recording: recording},
	}
}

// newRequest returns a request as Caddy's server makes it, with a body unless it is
// empty.
func newRequest(method, target, body string, headers ...string) *http.Request {
	var reader io.Reader
	if body != "" {
		reader = strings.NewReader(body)
	}
	r := httptest.NewRequest(method, target, reader)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	return caddyhttp.PrepareRequest(r, caddy.NewReplacer(), httptest.NewRecorder(), nil)
}

func TestRecord_EventFields(t *testing.T) {
	server, node := startRecorder(t)
	rec := newRecording(t)
	before := time.Now().Unix()
	r := newRequest("PATCH", "/apis/apps/v1/namespaces/a/deploy%6Dents/d/scale?fieldManager=x", "{}", "User-Agent", "kubectl")
	if err := rec.Record(r, callerAt(node, alice, impersonate.Recording{Recorders: recorders, Events: true})); err != nil {
		t.Fatal(err)
	}
	events := server.TakeEvents()
	if len(events) != 1 {
		t.Fatalf("the recorder has %d events; want 1", len(events))
	}
	if at := events[0].Timestamp; at < before || at > time.Now().Unix() {
		t.Errorf("got the timestamp %d; want the current time", at)
	}
	events[0].Timestamp = 0
	want := &sessionrecording.Event{
		Type:      "kubernetes-api-request",
		UserAgent: "kubectl",
		Request: sessionrecording.Request{
			Method: "PATCH", Path: "/apis/apps/v1/namespaces/a/deploy%6Dents/d/scale?fieldManager=x", Body: []byte("{}"),
			QueryParameters: url.Values{"fieldManager": {"x"}},
		},
		Kubernetes: sessionrecording.KubernetesRequestInfo{
			IsResourceRequest: true, Path: "/apis/apps/v1/namespaces/a/deployments/d/scale", Verb: "patch",
			APIPrefix: "apis", APIGroup: "apps", APIVersion: "v1", Namespace: "a", Resource: "deployments", Subresource: "scale", Name: "d",
			Parts: []string{"deployments", "d", "scale"},
		},
		Source: sessionrecording.Source{Node: "laptop.example.ts.net", NodeID: "nAlice", NodeUser: "alice@example.com", NodeUserID: 7},
	}
	if diff := cmp.Diff(want, events[0]); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	rec.checkCounted(t, apievents.Sent)

	// The selectors of a list, and a tagged device.
	ci := &impersonate.Peer{Node: "ci.example.ts.net", NodeID: "nCI", Tags: []string{"tag:ci"}}
	r = newRequest("GET", "/api/v1/pods?fieldSelector=spec.nodeName%3Dn&labelSelector=a%3Db", "")
	if err := rec.Record(r, callerAt(node, ci, impersonate.Recording{Recorders: recorders, Events: true})); err != nil {
		t.Fatal(err)
	}
	got := server.TakeEvents()[0]
	if k := got.Kubernetes; k.Verb != "list" || k.FieldSelector != "spec.nodeName=n" || k.LabelSelector != "a=b" {
		t.Errorf("got %+v; want a list with its selectors", k)
	}
	if diff := cmp.Diff(sessionrecording.Source{Node: "ci.example.ts.net", NodeID: "nCI", NodeTags: []string{"tag:ci"}}, got.Source); diff != "" {
		t.Errorf("source (-want +got):\n%s", diff)
	}
}

// What the client writes is cut, for a recorder and for the log, except for the body.
func TestRecord_CutsWhatTheClientWrites(t *testing.T) {
	server, node := startRecorder(t)
	rec := newRecording(t)
	rec.Log = rec.Logger
	long := strings.Repeat("a", 100_000)
	caller := callerAt(node, alice, impersonate.Recording{Recorders: recorders, Events: true})
	caller.Identity.ActAs = &impersonate.ActAsRequest{Target: &impersonate.Target{User: long, Groups: slices.Repeat([]string{long}, 200)}}
	for _, target := range []string{
		"/api/v1/namespaces/" + long + "/pods/" + long + "/log?container=" + long + "&" + long + "=x&labelSelector=" + long + "&fieldSelector=a%3D" + long,
		"/apis/" + long + "/" + long + "/" + long + "?" + strings.Repeat("a=b&", 9_000),
		"/api/v1/pods?" + manyParameters(9_000),
		"/api/v1/namespaces/a/services/b/proxy/" + strings.Repeat("x/", 50_000),
	} {
		r := newRequest("PATCH", target, "{}", "User-Agent", long)
		r.Method = long
		if err := rec.Record(r, caller); err != nil {
			t.Fatal(err)
		}
		events := server.TakeEvents()
		if len(events) != 1 {
			t.Fatalf("the recorder has %d events; want 1", len(events))
		}
		text, err := json.Marshal(events[0])
		if err != nil {
			t.Fatal(err)
		}
		if len(text) > 64<<10 {
			t.Errorf("%.50s: the event has %d bytes", target, len(text))
		}
		if k := events[0].Kubernetes; k.Path == "" || len(k.Path) > 300 || len(events[0].Request.Path) > 300 || len(k.Parts) > 129 {
			t.Errorf("%.50s: the event has a path of %d bytes, a target of %d and %d parts", target, len(k.Path), len(events[0].Request.Path), len(k.Parts))
		}
		line := 0
		for name, value := range rec.logged.TakeAll()[0].ContextMap() {
			n := len(fmt.Sprint(value))
			if line += n; n > 300 && name != "as_groups" {
				t.Errorf("%.50s: %s has %d bytes in the log", target, name, n)
			}
		}
		if line > 64<<10 {
			t.Errorf("%.50s: the line has %d bytes", target, line)
		}
	}
}

// manyParameters returns a query of n parameters. Go parses none of more than 10,000.
func manyParameters(n int) string {
	var query strings.Builder
	for i := range n {
		fmt.Fprintf(&query, "p%d=x&", i)
	}
	return query.String()
}

// unread fails the test if it is read.
type unread struct{ t *testing.T }

func (u unread) Read([]byte) (int, error) {
	u.t.Error("the body is read")
	return 0, io.EOF
}

func (unread) Close() error { return nil }

func TestRecord_Bodies(t *testing.T) {
	server, node := startRecorder(t)
	const pods, pod = "/api/v1/namespaces/a/pods", "/api/v1/namespaces/a/pods/p"
	for _, tt := range []struct {
		name           string
		method, target string
		body           string
		configure      func(*apievents.Recorder)
		want           string
		untouched      bool
		upgrade        bool
	}{
		{name: "none", method: "POST", target: pods},
		{name: "short", method: "POST", target: pods, body: "{}", want: "{}"},
		{name: "as long as the limit", method: "PUT", target: pod, body: "0123456789", want: "0123456789"},
		{name: "longer", method: "PATCH", target: pod, body: "0123456789a", want: "0123456789\n[the body is cut off after 10 bytes]"},
		{name: "much longer", method: "DELETE", target: pod, body: strings.Repeat("0123456789", 1e5), want: "0123456789\n[the body is cut off after 10 bytes]"},
		{name: "of a debug container", method: "PATCH", target: pod + "/ephemeralcontainers", body: "{}", want: "{}"},
		{name: "of a request for no resource", method: "POST", target: "/other", body: "{}", want: "{}"},

		{name: "with an upgrade that the API server may ignore", method: "POST", target: pods, body: "x", upgrade: true, want: "x"},

		{name: "of a GET", method: "GET", target: pods, body: "x", untouched: true, want: "[the body is left out: the API server does not read it]"},
		{name: "of a watch", method: "GET", target: pods + "?watch=1", body: "x", untouched: true, want: "[the body is left out: the API server does not read it]"},
		{name: "of an exec", method: "POST", target: pod + "/exec", body: "x", untouched: true, want: "[the body is left out: it is not for the API server]"},
		{name: "for an application", method: "POST", target: pod + "/proxy/x", body: "x", untouched: true, want: "[the body is left out: it is not for the API server]"},
		{name: "of a Secret", method: "POST", target: "/api/v1/namespaces/a/secrets", body: "x", untouched: true, want: "[the body is left out: it may hold secrets]"},
		{name: "of a Secret, in another spelling", method: "PUT", target: "/api/v1/namespaces/a/s%65crets/s/", body: "x", untouched: true, want: "[the body is left out: it may hold secrets]"},
		{name: "of a TokenReview", method: "POST", target: "/apis/authentication.k8s.io/v1/tokenreviews", body: "x", untouched: true, want: "[the body is left out: it may hold secrets]"},
		{name: "of a Secret, with SecretBodies", method: "POST", target: "/api/v1/namespaces/a/secrets", body: "x", configure: func(rec *apievents.Recorder) { rec.SecretBodies = true }, want: "x"},
		{name: "of secrets of another API", method: "POST", target: "/apis/example.com/v1/namespaces/a/secrets", body: "x", want: "x"},
		{name: "with a limit of 0", method: "POST", target: pods, body: "x", configure: func(rec *apievents.Recorder) { rec.BodyLimit = 0 }, untouched: true, want: "[the body is left out: the limit is 0]"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rec := newRecording(t)
			if tt.configure != nil {
				tt.configure(rec.Recorder)
			}
			r := newRequest(tt.method, tt.target, tt.body)
			if tt.upgrade {
				r.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}}
			}
			switch {
			case tt.untouched:
				r.Body = unread{t}
			case tt.body != "":
				// A client may send it like this.
				r.Body = io.NopCloser(iotest.OneByteReader(strings.NewReader(tt.body)))
			}
			if err := rec.Record(r, callerAt(node, alice, impersonate.Recording{Recorders: recorders, Events: true})); err != nil {
				t.Fatal(err)
			}
			events := server.TakeEvents()
			if len(events) != 1 || string(events[0].Request.Body) != tt.want {
				t.Errorf("got events %+v; want one with the body %q", events, tt.want)
			}
			if tt.untouched {
				if _, ok := r.Body.(unread); !ok {
					t.Error("the body was replaced")
				}
				return
			}
			sent, err := io.ReadAll(r.Body)
			if err != nil || string(sent) != tt.body {
				t.Errorf("%d bytes are forwarded (%v); want all %d", len(sent), err, len(tt.body))
			}
		})
	}
}

// An event that would not say all of what is asked for is refused where recording is
// enforced: the body if the config says so, path and query always.
func TestRecord_IncompleteEventIsRefused(t *testing.T) {
	const pods = "/api/v1/namespaces/a/pods"
	long := pods + "?labelSelector=" + strings.Repeat("<", 16<<10)
	for _, tt := range []struct {
		name, target, body string
		refuseCut, enforce bool
		code               int32
	}{
		{"a body as long as the limit", pods, "0123456789", true, true, 0},
		{"a longer body", pods, "0123456789a", true, true, http.StatusForbidden},
		{"a longer body, not enforced", pods, "0123456789a", true, false, 0},
		{"a longer body, by default", pods, "0123456789a", false, true, 0},
		{"a long query", long, "", false, true, http.StatusBadRequest},
		{"a long query, not enforced", long, "", true, false, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server, node := startRecorder(t)
			rec := newRecording(t)
			rec.RefuseCut = tt.refuseCut
			err := rec.Record(newRequest("POST", tt.target, tt.body), callerAt(node, alice, impersonate.Recording{Recorders: recorders, Events: true, Enforce: tt.enforce}))
			events := server.TakeEvents()
			if tt.code != 0 {
				if message := checkRefused(t, err, tt.code); !strings.Contains(message, "has to be recorded") || len(events) != 0 {
					t.Errorf("got %q and %d events", message, len(events))
				}
				rec.checkCounted(t, apievents.Refused)
				return
			}
			if err != nil || len(events) != 1 {
				t.Errorf("got %v and %d events; want one", err, len(events))
			}
			rec.checkCounted(t, apievents.Sent)
		})
	}
}

// What a client writes is in an event several times, and longer in JSON.
func TestRecord_EventIsBounded(t *testing.T) {
	server, node := startRecorder(t)
	rec := newRecording(t)
	long := strings.Repeat("<", 900_000)
	r := newRequest("POST", "/api/v1/namespaces/a/pods/"+long+"?labelSelector="+long, "", "User-Agent", long)
	if err := rec.Record(r, callerAt(node, alice, impersonate.Recording{Recorders: recorders, Events: true})); err != nil {
		t.Fatal(err)
	}
	events := server.TakeEvents()
	if len(events) != 1 {
		t.Fatalf("got %d events", len(events))
	}
	b, err := json.Marshal(events[0])
	if err != nil || len(b) > 16<<10 || !strings.Contains(string(b), "[cut, ") {
		t.Errorf("the event has %d bytes, %v; want at most 16 KiB, with a mark", len(b), err)
	}
	if got := events[0].Request.Path; !strings.HasPrefix(got, "/api/v1/namespaces/a/pods/") {
		t.Errorf("got the path %q", got)
	}
}

// Record reads no more of a body than the event needs. The rest streams through.
func TestRecord_StreamsRestOfBody(t *testing.T) {
	_, node := startRecorder(t)
	rec := newRecording(t)
	pr, pw := io.Pipe()
	go func() {
		// The client sends the rest once the request was forwarded.
		_, _ = pw.Write(bytes.Repeat([]byte("x"), limit+1))
	}()
	r := newRequest("POST", "/api/v1/namespaces/a/pods", "")
	r.Body, r.ContentLength = pr, -1
	if err := rec.Record(r, callerAt(node, alice, impersonate.Recording{Recorders: recorders, Events: true})); err != nil {
		t.Fatal(err)
	}
	go func() {
		_, _ = pw.Write([]byte("rest"))
		_ = pw.Close()
	}()
	sent, err := io.ReadAll(r.Body)
	if want := strings.Repeat("x", limit+1) + "rest"; err != nil || string(sent) != want {
		t.Errorf("%q is forwarded (%v); want %q", sent, err, want)
	}
	if err := r.Body.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := pw.Write([]byte("x")); err == nil {
		t.Error("closing the body does not close the body of the client")
	}
}

func TestRecord_IncompleteBodyIsRefused(t *testing.T) {
	_, node := startRecorder(t)
	rec := newRecording(t)
	r := newRequest("POST", "/api/v1/namespaces/a/pods", "")
	r.Body = io.NopCloser(iotest.ErrReader(errors.New("the client is gone")))
	err := rec.Record(r, callerAt(node, alice, impersonate.Recording{Recorders: recorders, Events: true}))
	checkRefused(t, err, http.StatusBadRequest)
}

func TestRecord_WithoutRecorder(t *testing.T) {
	for _, tt := range []struct {
		name string
		mode recordertest.Mode
		none bool
		logs string
	}{
		{name: "failing", mode: recordertest.Failing, logs: "it answers 500 Internal Server Error: the recorder fails"},
		{name: "silent", mode: recordertest.Silent, logs: "deadline exceeded"},
		{name: "version 1", mode: recordertest.V1, logs: "it takes no events"},
		{name: "unknown", none: true, logs: "name no address of a recorder"},
	} {
		for _, enforce := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/enforced %t", tt.name, enforce), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					server, node := startRecorder(t)
					server.SetMode(tt.mode)
					recording := impersonate.Recording{Recorders: recorders, Unresolved: tt.none, Events: true, Enforce: enforce}
					if tt.none {
						recording.Recorders = nil
					}
					rec := newRecording(t)
					began := time.Now()
					err := rec.Record(newRequest("GET", "/api/v1/pods", ""), callerAt(node, alice, recording))
					if took := time.Since(began); took > 5*time.Second {
						t.Errorf("it took %v; want at most 5s", took)
					}
					if enforce {
						if message := checkRefused(t, err, http.StatusForbidden); !strings.Contains(message, "has to be recorded") {
							t.Errorf("got message %q; want the reason", message)
						}
						rec.checkCounted(t, apievents.Refused)
					} else {
						if err != nil {
							t.Errorf("got error %v; want none", err)
						}
						rec.checkCounted(t, apievents.Unsent)
					}
					if logged := fmt.Sprint(rec.logged.All()); !strings.Contains(logged, tt.logs) {
						t.Errorf("logged %s; want it to contain %q", logged, tt.logs)
					}
				})
			})
		}
	}
}

// What a grant names as a recorder may be any address that the proxy's host can reach.
func TestRecord_DialsOnlyTheTailnet(t *testing.T) {
	node := nodeDialling(func(context.Context, string, string) (net.Conn, error) {
		t.Error("an address outside of the tailnet is dialled")
		return nil, net.ErrClosed
	})
	outside := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:80")}
	err := newRecording(t).Record(newRequest("GET", "/api/v1/pods", ""), callerAt(node, alice, impersonate.Recording{Recorders: outside, Events: true, Enforce: true}))
	checkRefused(t, err, http.StatusForbidden)
}

func TestRecord_AmbiguousRequestIsRefused(t *testing.T) {
	server, node := startRecorder(t)
	rec := newRecording(t)
	r := newRequest("GET", "/api/v1/namespaces/a/secrets%2Fs", "")
	err := rec.Record(r, callerAt(node, alice, impersonate.Recording{Recorders: recorders, Events: true}))
	checkRefused(t, err, http.StatusBadRequest)
	if pin.Check(r) == nil {
		t.Error("a config that ignores the refusal can send the request")
	}
	if n := len(server.TakeEvents()); n > 0 {
		t.Errorf("the recorder has %d events; want none", n)
	}
	rec.checkCounted(t, apievents.Refused)
}

func TestRecord_PinsRequest(t *testing.T) {
	_, node := startRecorder(t)
	rec := newRecording(t)
	r := newRequest("GET", "/api/v1/pods", "")
	if err := rec.Record(r, callerAt(node, alice, impersonate.Recording{Recorders: recorders, Events: true})); err != nil {
		t.Fatal(err)
	}
	r.URL.Path = "/api/v1/secrets"
	if pin.Check(r) == nil {
		t.Error("another request can be sent")
	}
	r = newRequest("DELETE", "/api/v1/namespaces/a/pods/b?dryRun=All", `{"dryRun":["All"]}`)
	if err := rec.Record(r, callerAt(node, alice, impersonate.Recording{Recorders: recorders, Events: true})); err != nil {
		t.Fatal(err)
	}
	if err := pin.Check(r); err != nil {
		t.Errorf("the unchanged request cannot be sent: %v", err)
	}
	body := r.Body
	r.Body = http.NoBody
	if pin.Check(r) == nil {
		t.Error("the request can be sent without the recorded body")
	}
	r.Body, r.URL.RawQuery = body, ""
	if pin.Check(r) == nil {
		t.Error("the request can be sent without the recorded query")
	}
}

// touched is a body that notes whether it is read.
type touched struct {
	io.ReadCloser
	read bool
}

func (b *touched) Read(p []byte) (int, error) {
	b.read = true
	return b.ReadCloser.Read(p)
}

func TestRecord_LeavesOtherRequestsAlone(t *testing.T) {
	for _, tt := range []struct {
		recording      impersonate.Recording
		logs, recorded bool
	}{
		{impersonate.Recording{}, false, false},
		{impersonate.Recording{}, true, true},
		{impersonate.Recording{Recorders: recorders, Enforce: true}, false, false},
		{impersonate.Recording{Events: true}, false, false},
		{impersonate.Recording{Events: true, Recorders: recorders}, false, true},
		{impersonate.Recording{Events: true, Enforce: true}, false, true},
		{impersonate.Recording{Events: true, Unresolved: true}, false, true},
	} {
		_, node := startRecorder(t)
		rec := newRecording(t)
		if tt.logs {
			rec.Log = rec.Logger
		}
		r := newRequest("POST", "/api/v1/namespaces/a/pods", "{}")
		body := &touched{ReadCloser: r.Body}
		r.Body = body
		err := rec.Record(r, callerAt(node, alice, tt.recording))
		if refused := tt.recorded && tt.recording.Enforce; (err != nil) != refused {
			t.Errorf("%+v, logging %v: got error %v; want one: %v", tt.recording, tt.logs, err, refused)
		}
		if body.read != tt.recorded {
			t.Errorf("%+v, logging %v: the body is read: %v; want %v", tt.recording, tt.logs, body.read, tt.recorded)
		}
	}
}

func TestRecord_LogsEveryRequest(t *testing.T) {
	rec := newRecording(t)
	rec.Log = rec.Logger
	caller := callerAt(nil, alice, impersonate.Recording{})
	for _, r := range []*http.Request{
		newRequest("POST", "/api/v1/namespaces/a/pods/p/eviction", "0123456789a", "User-Agent", "kubectl"),
		newRequest("POST", "/api/v1/namespaces/a/secrets", "x"),
		newRequest("GET", "/api/v1//pods", ""),
		newRequest("POST", "/api/v1/namespaces/a/pods", "k8s\x00\xff"),
	} {
		if err := rec.Record(r, caller); err != nil {
			t.Fatal(err)
		}
		if err := pin.Check(r); err != nil {
			t.Errorf("a request that is only logged is refused: %v", err)
		}
	}
	logged := rec.logged.All()
	if len(logged) != 4 {
		t.Fatalf("got %d lines; want 4", len(logged))
	}
	want := map[string]any{
		"user": "alice@example.com", "groups": []any{"a", "b"}, "held_back": []any{}, "as": "", "as_groups": []any{}, "node": "laptop.example.ts.net", "remote_addr": "100.64.0.2:40000",
		"verb": "create", "group": "", "version": "v1", "resource": "pods", "subresource": "eviction", "namespace": "a", "name": "p", "class": "ordinary",
		"method": "POST", "uri": "/api/v1/namespaces/a/pods/p/eviction", "user_agent": "kubectl",
		"body": "0123456789", "body_base64": "", "body_cut": true, "body_left_out": "",
	}
	if diff := cmp.Diff(want, logged[0].ContextMap()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	caller.Identity.ActAs = &impersonate.ActAsRequest{Target: &impersonate.Target{User: "bob", Groups: []string{"c"}}}
	if err := rec.Record(newRequest("GET", "/api", ""), caller); err != nil {
		t.Fatal(err)
	}
	line := rec.logged.All()[4].ContextMap()
	if diff := cmp.Diff([]any{"alice@example.com", "bob", []any{"c"}}, []any{line["user"], line["as"], line["as_groups"]}); diff != "" {
		t.Errorf("acting as another user (-want +got):\n%s", diff)
	}
	if line := logged[1].ContextMap(); line["body"] != "" || line["body_left_out"] != "it may hold secrets" {
		t.Errorf("got %v of a Secret; want no body", line)
	}
	if line := logged[2].ContextMap(); line["class"] != "ambiguous" {
		t.Errorf("got %v of an ambiguous path; want the class ambiguous", line)
	}
	if line := logged[3].ContextMap(); line["body"] != "" || line["body_base64"] != "azhzAP8=" {
		t.Errorf("got %v of a body that is not text; want base64", line)
	}
	rec.checkCounted(t) // there is no recorder
}

func BenchmarkRecord(b *testing.B) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })}
	go func() { _ = server.Serve(ln) }()
	defer server.Close()
	node := nodeDialling(func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, ln.Addr().String())
	})
	rec := &apievents.Recorder{BodyLimit: limit, Client: new(recorder.Client), Logger: zap.NewNop()}
	defer rec.Client.Close()
	caller := callerAt(node, alice, impersonate.Recording{Recorders: recorders, Events: true})
	r := newRequest("GET", "/api/v1/namespaces/a/pods", "")
	b.ReportAllocs()
	for b.Loop() {
		if err := rec.Record(r, caller); err != nil {
			b.Fatal(err)
		}
	}
}
