// SPDX-License-Identifier: Apache-2.0

package apievents_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"tailscale.com/sessionrecording"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apievents"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/pin"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordertest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

const limit = 10

// network is a tailnet with recorders on it.
type network struct {
	recorders map[netip.AddrPort]*recordertest.Recorder
	local     map[netip.AddrPort]string
	dials     atomic.Int64
}

// newNetwork returns a network with n recorders, and their addresses.
func newNetwork(t *testing.T, n int) (*network, []netip.AddrPort) {
	t.Helper()
	nw := &network{recorders: make(map[netip.AddrPort]*recordertest.Recorder), local: make(map[netip.AddrPort]string)}
	var addrs []netip.AddrPort
	for i := range n {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{100, 64, 1, byte(i)}), 80)
		r := recordertest.New()
		served := make(chan error, 1)
		go func() { served <- r.Serve(ln) }()
		t.Cleanup(func() {
			if err := errors.Join(r.Close(), <-served); err != nil {
				t.Error(err)
			}
		})
		nw.recorders[addr], nw.local[addr] = r, ln.Addr().String()
		addrs = append(addrs, addr)
	}
	return nw, addrs
}

// node returns a node of the network.
func (nw *network) node() *tailnet.Node {
	return &tailnet.Node{
		Name:  "k8s",
		Addrs: func() (netip.Addr, netip.Addr) { return netip.MustParseAddr("100.64.0.1"), netip.Addr{} },
		DialPeer: func(ctx context.Context, network, address string) (net.Conn, error) {
			nw.dials.Add(1)
			local, ok := nw.local[netip.MustParseAddrPort(address)]
			if !ok {
				return nil, errors.New("nobody there")
			}
			return new(net.Dialer).DialContext(ctx, network, local)
		},
	}
}

// site is a Site whose outcomes and log can be looked at.
type site struct {
	*apievents.Site
	outcomes []apievents.Outcome
	logged   *observer.ObservedLogs
}

func newSite(t *testing.T) *site {
	core, logged := observer.New(zap.InfoLevel)
	s := &site{logged: logged}
	s.Site = &apievents.Site{BodyLimit: limit, Logger: zap.New(core), Count: func(o apievents.Outcome) { s.outcomes = append(s.outcomes, o) }}
	t.Cleanup(s.Close)
	return s
}

var alice = &impersonate.Peer{Node: "laptop.example.ts.net", NodeID: "nAlice", Login: "alice@example.com", UserID: 7}

func callerOf(node *tailnet.Node, peer *impersonate.Peer, recording impersonate.Recording) apievents.Caller {
	return apievents.Caller{
		Peer: peer, Node: node, Remote: netip.MustParseAddrPort("100.64.0.2:40000"),
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

func TestAnEventSaysWhoAskedForWhat(t *testing.T) {
	nw, addrs := newNetwork(t, 1)
	s := newSite(t)
	before := time.Now().Unix()
	r := newRequest("PATCH", "/apis/apps/v1/namespaces/a/deploy%6Dents/d/scale?fieldManager=x", "{}", "User-Agent", "kubectl")
	if err := s.Record(r, callerOf(nw.node(), alice, impersonate.Recording{Recorders: addrs, Events: true})); err != nil {
		t.Fatal(err)
	}
	events := nw.recorders[addrs[0]].TakeEvents()
	if len(events) != 1 {
		t.Fatalf("the recorder has %d events; want 1", len(events))
	}
	if at := events[0].Timestamp; at < before || at > time.Now().Unix() {
		t.Errorf("got the timestamp %d; want one of now", at)
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
	if diff := cmp.Diff([]apievents.Outcome{apievents.Sent}, s.outcomes); diff != "" {
		t.Errorf("counted (-want +got):\n%s", diff)
	}

	// The selectors of a list, and a tagged device.
	ci := &impersonate.Peer{Node: "ci.example.ts.net", NodeID: "nCI", Tags: []string{"tag:ci"}}
	r = newRequest("GET", "/api/v1/pods?fieldSelector=spec.nodeName%3Dn&labelSelector=a%3Db", "")
	if err := s.Record(r, callerOf(nw.node(), ci, impersonate.Recording{Recorders: addrs, Events: true})); err != nil {
		t.Fatal(err)
	}
	got := nw.recorders[addrs[0]].TakeEvents()[0]
	if k := got.Kubernetes; k.Verb != "list" || k.FieldSelector != "spec.nodeName=n" || k.LabelSelector != "a=b" {
		t.Errorf("got %+v; want a list with its selectors", k)
	}
	if diff := cmp.Diff(sessionrecording.Source{Node: "ci.example.ts.net", NodeID: "nCI", NodeTags: []string{"tag:ci"}}, got.Source); diff != "" {
		t.Errorf("source (-want +got):\n%s", diff)
	}
}

// unread fails the test if it is read.
type unread struct{ t *testing.T }

func (u unread) Read([]byte) (int, error) {
	u.t.Error("the body is read")
	return 0, io.EOF
}

func (unread) Close() error { return nil }

func TestBodies(t *testing.T) {
	nw, addrs := newNetwork(t, 1)
	const pods, pod = "/api/v1/namespaces/a/pods", "/api/v1/namespaces/a/pods/p"
	for _, tt := range []struct {
		name           string
		method, target string
		body           string
		configure      func(*apievents.Site)
		want           string
		untouched      bool
		upgrade        bool
	}{
		{name: "none", method: "POST", target: pods},
		{name: "short", method: "POST", target: pods, body: "{}", want: "{}"},
		{name: "as long as may be", method: "PUT", target: pod, body: "0123456789", want: "0123456789"},
		{name: "longer", method: "PATCH", target: pod, body: "0123456789a", want: "0123456789\n[the body is cut off after 10 bytes]"},
		{name: "much longer", method: "DELETE", target: pod, body: strings.Repeat("0123456789", 1e5), want: "0123456789\n[the body is cut off after 10 bytes]"},
		{name: "of a debug container", method: "PATCH", target: pod + "/ephemeralcontainers", body: "{}", want: "{}"},
		{name: "of something that is no resource", method: "POST", target: "/other", body: "{}", want: "{}"},

		{name: "with an upgrade that the API server may not care for", method: "POST", target: pods, body: "x", upgrade: true, want: "x"},

		{name: "of a GET", method: "GET", target: pods, body: "x", untouched: true, want: "[the body is left out: the API server does not read it]"},
		{name: "of a watch", method: "GET", target: pods + "?watch=1", body: "x", untouched: true, want: "[the body is left out: the API server does not read it]"},
		{name: "of an exec", method: "POST", target: pod + "/exec", body: "x", untouched: true, want: "[the body is left out: it is not for the API server]"},
		{name: "for an application", method: "POST", target: pod + "/proxy/x", body: "x", untouched: true, want: "[the body is left out: it is not for the API server]"},
		{name: "of a Secret", method: "POST", target: "/api/v1/namespaces/a/secrets", body: "x", untouched: true, want: "[the body is left out: it may hold secrets]"},
		{name: "of a Secret, in another spelling", method: "PUT", target: "/api/v1/namespaces/a/s%65crets/s/", body: "x", untouched: true, want: "[the body is left out: it may hold secrets]"},
		{name: "of a TokenReview", method: "POST", target: "/apis/authentication.k8s.io/v1/tokenreviews", body: "x", untouched: true, want: "[the body is left out: it may hold secrets]"},
		{name: "of a Secret, if that is wanted", method: "POST", target: "/api/v1/namespaces/a/secrets", body: "x", configure: func(s *apievents.Site) { s.SecretBodies = true }, want: "x"},
		{name: "of secrets of another API", method: "POST", target: "/apis/example.com/v1/namespaces/a/secrets", body: "x", want: "x"},
		{name: "with a limit of 0", method: "POST", target: pods, body: "x", configure: func(s *apievents.Site) { s.BodyLimit = 0 }, untouched: true, want: "[the body is left out: the limit is 0]"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSite(t)
			if tt.configure != nil {
				tt.configure(s.Site)
			}
			r := newRequest(tt.method, tt.target, tt.body)
			if tt.upgrade {
				r.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}}
			}
			switch {
			case tt.untouched:
				r.Body = unread{t}
			case tt.body != "":
				// As it may arrive.
				r.Body = io.NopCloser(iotest.OneByteReader(strings.NewReader(tt.body)))
			}
			if err := s.Record(r, callerOf(nw.node(), alice, impersonate.Recording{Recorders: addrs, Events: true})); err != nil {
				t.Fatal(err)
			}
			events := nw.recorders[addrs[0]].TakeEvents()
			if len(events) != 1 || string(events[0].Request.Body) != tt.want {
				t.Errorf("got events %+v; want one with the body %q", events, tt.want)
			}
			if tt.untouched {
				if _, ok := r.Body.(unread); !ok {
					t.Error("the body was put into another")
				}
				return
			}
			sent, err := io.ReadAll(r.Body)
			if err != nil || string(sent) != tt.body {
				t.Errorf("%d bytes go on (%v); want all %d", len(sent), err, len(tt.body))
			}
		})
	}
}

// A body is streamed on, and not read any further than its event needs.
func TestABodyIsNotHeld(t *testing.T) {
	nw, addrs := newNetwork(t, 1)
	s := newSite(t)
	pr, pw := io.Pipe()
	go func() {
		// The rest comes only once the request goes on.
		_, _ = pw.Write(bytes.Repeat([]byte("x"), limit+1))
	}()
	r := newRequest("POST", "/api/v1/namespaces/a/pods", "")
	r.Body, r.ContentLength = pr, -1
	if err := s.Record(r, callerOf(nw.node(), alice, impersonate.Recording{Recorders: addrs, Events: true})); err != nil {
		t.Fatal(err)
	}
	go func() {
		_, _ = pw.Write([]byte("rest"))
		_ = pw.Close()
	}()
	sent, err := io.ReadAll(r.Body)
	if want := strings.Repeat("x", limit+1) + "rest"; err != nil || string(sent) != want {
		t.Errorf("%q goes on (%v); want %q", sent, err, want)
	}
	if err := r.Body.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := pw.Write([]byte("x")); err == nil {
		t.Error("closing the body does not close the client's")
	}
}

func TestABodyThatBreaksOffIsRefused(t *testing.T) {
	nw, addrs := newNetwork(t, 1)
	s := newSite(t)
	r := newRequest("POST", "/api/v1/namespaces/a/pods", "")
	r.Body = io.NopCloser(iotest.ErrReader(errors.New("the client is gone")))
	err := s.Record(r, callerOf(nw.node(), alice, impersonate.Recording{Recorders: addrs, Events: true}))
	if err == nil || err.ErrStatus.Code != http.StatusBadRequest {
		t.Errorf("got %v; want a refusal with the code 400", err)
	}
}

func TestWithoutARecorderThatTakesEvents(t *testing.T) {
	for _, tt := range []struct {
		name   string
		mode   recordertest.Mode
		absent bool
		none   bool
		says   string
	}{
		{name: "failing", mode: recordertest.Failing, says: "it answers 500 Internal Server Error: the recorder fails"},
		{name: "silent", mode: recordertest.Silent, says: "deadline exceeded"},
		{name: "of an older version", mode: recordertest.V1, says: "it takes no events"},
		{name: "absent", absent: true, says: "nobody there"},
		{name: "unknown", none: true, says: "name no address of a recorder"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for _, enforce := range []bool{false, true} {
				nw, addrs := newNetwork(t, 1)
				nw.recorders[addrs[0]].SetMode(tt.mode)
				switch {
				case tt.absent:
					nw.local = nil
				case tt.none:
					addrs = nil
				}
				s := newSite(t)
				began := time.Now()
				err := s.Record(newRequest("GET", "/api/v1/pods", ""), callerOf(nw.node(), alice, impersonate.Recording{Recorders: addrs, Unresolved: tt.none, Events: true, Enforce: enforce}))
				if took := time.Since(began); took > 6*time.Second {
					t.Errorf("it took %v; want no more than 5 s", took)
				}
				want := apievents.Unsent
				if enforce {
					want = apievents.Refused
				}
				if (err != nil) != enforce {
					t.Errorf("enforced: %v: got %v; want a refusal if it is", enforce, err)
				}
				if err != nil && (err.ErrStatus.Code != http.StatusForbidden || !strings.Contains(err.ErrStatus.Message, "has to be recorded")) {
					t.Errorf("got %+v; want a 403 that says why", err.ErrStatus)
				}
				if diff := cmp.Diff([]apievents.Outcome{want}, s.outcomes); diff != "" {
					t.Errorf("counted (-want +got):\n%s", diff)
				}
				if logged := fmt.Sprint(s.logged.All()); !strings.Contains(logged, tt.says) {
					t.Errorf("logged %s; want it to say %q", logged, tt.says)
				}
			}
		})
	}
}

// What a grant names as a recorder may be anything that the proxy can reach.
func TestOnlyTheTailnetIsDialled(t *testing.T) {
	nw, addrs := newNetwork(t, 1)
	outside := netip.MustParseAddrPort("192.0.2.1:80")
	nw.local[outside] = nw.local[addrs[0]]
	s := newSite(t)
	err := s.Record(newRequest("GET", "/api/v1/pods", ""), callerOf(nw.node(), alice, impersonate.Recording{Recorders: []netip.AddrPort{outside}, Events: true, Enforce: true}))
	if err == nil || nw.dials.Load() > 0 {
		t.Errorf("got %v after %d dials; want a refusal and none", err, nw.dials.Load())
	}
}

// What a recorder says when it fails has no end that we know of.
func TestOfWhatARecorderSaysTheBeginningIsLogged(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = io.WriteString(w, "it is broken"+strings.Repeat(".", 1<<16))
	}))
	t.Cleanup(server.Close)
	addr := netip.MustParseAddrPort("100.64.1.0:80")
	nw := &network{local: map[netip.AddrPort]string{addr: server.Listener.Addr().String()}}
	s := newSite(t)
	if err := s.Record(newRequest("GET", "/api/v1/pods", ""), callerOf(nw.node(), alice, impersonate.Recording{Recorders: []netip.AddrPort{addr}, Events: true})); err != nil {
		t.Fatal(err)
	}
	if logged := fmt.Sprint(s.logged.All()); !strings.Contains(logged, "it is broken") || len(logged) > 1<<12 {
		t.Errorf("%d bytes are logged: %.100s", len(logged), logged)
	}
}

// A recorder that does not answer costs the first request its head start, and no
// event is lost.
func TestTheNextRecorderIsAskedInTime(t *testing.T) {
	t.Parallel()
	nw, addrs := newNetwork(t, 3)
	nw.recorders[addrs[0]].SetMode(recordertest.Silent)
	nw.recorders[addrs[1]].SetMode(recordertest.Failing)
	s := newSite(t)
	node := nw.node()
	record := func() time.Duration {
		began := time.Now()
		if err := s.Record(newRequest("GET", "/api/v1/pods", ""), callerOf(node, alice, impersonate.Recording{Recorders: addrs, Events: true, Enforce: true})); err != nil {
			t.Fatal(err)
		}
		return time.Since(began)
	}
	if took := record(); took > 2*time.Second {
		t.Errorf("the first event took %v; want half a second", took)
	}
	if took := record(); took > 400*time.Millisecond {
		t.Errorf("the second event took %v; want no time, as the silent recorder is known", took)
	}
	if n := len(nw.recorders[addrs[2]].TakeEvents()); n != 2 {
		t.Errorf("the recorder that answers has %d events; want 2", n)
	}
}

// What all recorders are known not to do is not waited for again and again.
func TestSilentRecordersCostOneWaitAndAreTriedAgain(t *testing.T) {
	t.Parallel()
	nw, addrs := newNetwork(t, 1)
	nw.recorders[addrs[0]].SetMode(recordertest.Silent)
	s := newSite(t)
	node := nw.node()
	record := func() (time.Duration, bool) {
		began := time.Now()
		err := s.Record(newRequest("GET", "/api/v1/pods", ""), callerOf(node, alice, impersonate.Recording{Recorders: addrs, Events: true, Enforce: true}))
		return time.Since(began), err == nil
	}
	if _, ok := record(); ok {
		t.Fatal("the request went on")
	}
	if took, ok := record(); ok || took > time.Second {
		t.Errorf("the second request: went on %v, after %v; want it refused at once", ok, took)
	}
	nw.recorders[addrs[0]].SetMode(recordertest.V2)
	for deadline := time.Now().Add(20 * time.Second); ; {
		if _, ok := record(); ok {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the recorder is never tried again")
		}
		time.Sleep(50 * time.Millisecond) // between two looks at the condition
	}
}

func TestConnectionsToRecordersAreKept(t *testing.T) {
	nw, addrs := newNetwork(t, 1)
	s := newSite(t)
	node := nw.node()
	for range 20 {
		if err := s.Record(newRequest("GET", "/api/v1/pods", ""), callerOf(node, alice, impersonate.Recording{Recorders: addrs, Events: true})); err != nil {
			t.Fatal(err)
		}
	}
	if n := nw.dials.Load(); n != 1 {
		t.Errorf("dialled %d times; want once", n)
	}
	// What the recorder has closed meanwhile is no failure.
	nw.recorders[addrs[0]].Cut()
	if err := s.Record(newRequest("GET", "/api/v1/pods", ""), callerOf(node, alice, impersonate.Recording{Recorders: addrs, Events: true, Enforce: true})); err != nil {
		t.Errorf("after the connection was closed: %v", err)
	}
	s.Close()
	for deadline := time.Now().Add(10 * time.Second); nw.recorders[addrs[0]].Conns() > 0; {
		if time.Now().After(deadline) {
			t.Fatal("connections are left")
		}
		time.Sleep(10 * time.Millisecond) // between two looks at the condition
	}
}

// Two tailnets have the same addresses.
func TestEveryNodeHasItsOwnRecorders(t *testing.T) {
	a, addrs := newNetwork(t, 1)
	b, _ := newNetwork(t, 1)
	s := newSite(t)
	for _, nw := range []*network{a, b} {
		if err := s.Record(newRequest("GET", "/api/v1/pods", ""), callerOf(nw.node(), alice, impersonate.Recording{Recorders: addrs, Events: true})); err != nil {
			t.Fatal(err)
		}
		if n := len(nw.recorders[addrs[0]].TakeEvents()); n != 1 {
			t.Errorf("the recorder of the caller's tailnet has %d events; want 1", n)
		}
	}
}

func TestAmbiguousRequestsAreNotRecordedButRefused(t *testing.T) {
	nw, addrs := newNetwork(t, 1)
	s := newSite(t)
	r := newRequest("GET", "/api/v1/namespaces/a/secrets%2Fs", "")
	err := s.Record(r, callerOf(nw.node(), alice, impersonate.Recording{Recorders: addrs, Events: true}))
	if err == nil || err.ErrStatus.Code != http.StatusBadRequest {
		t.Errorf("got %v; want a refusal with the code 400", err)
	}
	if pin.Check(r) == nil {
		t.Error("whoever ignores the refusal can send the request")
	}
	if diff := cmp.Diff([]apievents.Outcome{apievents.Refused}, s.outcomes); diff != "" {
		t.Errorf("counted (-want +got):\n%s", diff)
	}
}

func TestWhatIsSentIsWhatIsRecorded(t *testing.T) {
	nw, addrs := newNetwork(t, 1)
	s := newSite(t)
	r := newRequest("GET", "/api/v1/pods", "")
	if err := s.Record(r, callerOf(nw.node(), alice, impersonate.Recording{Recorders: addrs, Events: true})); err != nil {
		t.Fatal(err)
	}
	r.URL.Path = "/api/v1/secrets"
	if pin.Check(r) == nil {
		t.Error("something else can be sent")
	}
	r = newRequest("DELETE", "/api/v1/namespaces/a/pods/b?dryRun=All", `{"dryRun":["All"]}`)
	if err := s.Record(r, callerOf(nw.node(), alice, impersonate.Recording{Recorders: addrs, Events: true})); err != nil {
		t.Fatal(err)
	}
	if err := pin.Check(r); err != nil {
		t.Errorf("it cannot be sent as it is: %v", err)
	}
	body := r.Body
	r.Body = http.NoBody
	if pin.Check(r) == nil {
		t.Error("it can be sent without the body that is recorded")
	}
	r.Body, r.URL.RawQuery = body, ""
	if pin.Check(r) == nil {
		t.Error("it can be sent without the query that is recorded")
	}
}

func TestConcerns(t *testing.T) {
	addrs := []netip.AddrPort{netip.MustParseAddrPort("100.64.1.0:80")}
	for _, tt := range []struct {
		recording  impersonate.Recording
		want, logs bool
	}{
		{impersonate.Recording{}, false, false},
		{impersonate.Recording{}, true, true},
		{impersonate.Recording{Recorders: addrs, Enforce: true}, false, false},
		{impersonate.Recording{Events: true}, false, false},
		{impersonate.Recording{Events: true, Recorders: addrs}, true, false},
		{impersonate.Recording{Events: true, Enforce: true}, true, false},
		{impersonate.Recording{Events: true, Unresolved: true}, true, false},
	} {
		s := newSite(t)
		if tt.logs {
			s.Log = s.Logger
		}
		if got := s.Concerns(&tt.recording); got != tt.want {
			t.Errorf("%+v, logging %v: got %v; want %v", tt.recording, tt.logs, got, tt.want)
		}
	}
}

func TestTheLogHasEveryRequest(t *testing.T) {
	s := newSite(t)
	s.Log = s.Logger
	who := callerOf(nil, alice, impersonate.Recording{})
	for _, r := range []*http.Request{
		newRequest("POST", "/api/v1/namespaces/a/pods/p/eviction", "0123456789a", "User-Agent", "kubectl"),
		newRequest("POST", "/api/v1/namespaces/a/secrets", "x"),
		newRequest("GET", "/api/v1//pods", ""),
		newRequest("POST", "/api/v1/namespaces/a/pods", "k8s\x00\xff"),
	} {
		if err := s.Record(r, who); err != nil {
			t.Fatal(err)
		}
		if err := pin.Check(r); err != nil {
			t.Errorf("what is only logged is refused: %v", err)
		}
	}
	logged := s.logged.All()
	if len(logged) != 4 {
		t.Fatalf("got %d lines; want 4", len(logged))
	}
	want := map[string]any{
		"user": "alice@example.com", "groups": []any{"a", "b"}, "as": "", "as_groups": []any{}, "node": "laptop.example.ts.net", "remote_addr": "100.64.0.2:40000",
		"verb": "create", "group": "", "version": "v1", "resource": "pods", "subresource": "eviction", "namespace": "a", "name": "p", "class": "ordinary",
		"method": "POST", "uri": "/api/v1/namespaces/a/pods/p/eviction", "user_agent": "kubectl",
		"body": "0123456789", "body_base64": "", "body_cut": true, "body_left_out": "",
	}
	if diff := cmp.Diff(want, logged[0].ContextMap()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	who.Identity.ActAs = &impersonate.ActAsRequest{Target: &impersonate.Target{User: "bob", Groups: []string{"c"}}}
	if err := s.Record(newRequest("GET", "/api", ""), who); err != nil {
		t.Fatal(err)
	}
	line := s.logged.All()[4].ContextMap()
	if diff := cmp.Diff([]any{"alice@example.com", "bob", []any{"c"}}, []any{line["user"], line["as"], line["as_groups"]}); diff != "" {
		t.Errorf("acting as somebody else (-want +got):\n%s", diff)
	}
	if line := logged[1].ContextMap(); line["body"] != "" || line["body_left_out"] != "it may hold secrets" {
		t.Errorf("got %v of a Secret; want no body", line)
	}
	if line := logged[2].ContextMap(); line["class"] != "ambiguous" {
		t.Errorf("got %v of an ambiguous path; want that to be said", line)
	}
	if line := logged[3].ContextMap(); line["body"] != "" || line["body_base64"] != "azhzAP8=" {
		t.Errorf("got %v of a body that is no text; want it in base64", line)
	}
	if len(s.outcomes) > 0 {
		t.Errorf("counted %v; want nothing, as there is no recorder", s.outcomes)
	}
}

func BenchmarkRecord(b *testing.B) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })}
	go func() { _ = server.Serve(ln) }()
	defer server.Close()
	addr := netip.MustParseAddrPort("100.64.1.0:80")
	nw := &network{local: map[netip.AddrPort]string{addr: ln.Addr().String()}}
	s := &apievents.Site{BodyLimit: limit, Logger: zap.NewNop(), Count: func(apievents.Outcome) {}}
	defer s.Close()
	who := callerOf(nw.node(), alice, impersonate.Recording{Recorders: []netip.AddrPort{addr}, Events: true})
	r := newRequest("GET", "/api/v1/namespaces/a/pods", "")
	b.ReportAllocs()
	for b.Loop() {
		if err := s.Record(r, who); err != nil {
			b.Fatal(err)
		}
	}
}
