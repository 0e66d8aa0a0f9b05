// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recorder"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordertest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// recorders is the address of the recorder at a node of startRecorder.
var recorders = []netip.AddrPort{netip.MustParseAddrPort("100.64.0.7:80")}

// startRecorder starts a recorder, and returns it with a node that dials it.
func startRecorder(t *testing.T) (*recordertest.Recorder, *tailnet.Node) {
	t.Helper()
	r := recordertest.Start(t)
	return r, &tailnet.Node{
		Name:     "k8s",
		Addrs:    func() (netip.Addr, netip.Addr) { return netip.MustParseAddr("100.64.0.1"), netip.Addr{} },
		DialPeer: func(ctx context.Context, _, _ string) (net.Conn, error) { return r.Dial(ctx) },
	}
}

// newRecorder returns a Recorder that keeps its recordings in dir.
func newRecorder(dir string) *Recorder {
	rec := &Recorder{Client: new(recorder.Client), Logger: zap.NewNop()}
	if dir != "" {
		rec.Dir = newDir(dir)
	}
	return rec
}

// begin begins the session that r becomes. It fails t if there is none.
func begin(t *testing.T, rec *Recorder, r *http.Request) *Session {
	t.Helper()
	s, err := rec.Begin(r, callerAt(nil, impersonate.Recording{}))
	if err != nil {
		t.Fatal(err)
	}
	if s == nil {
		t.Fatal("got no session")
	}
	return s
}

// callerAt returns alice, connected to node.
func callerAt(node *tailnet.Node, recording impersonate.Recording) authn.Caller {
	return authn.Caller{
		Peer:     &impersonate.Peer{Node: "laptop.example.ts.net", NodeID: "nAlice", Login: "alice@example.com", UserID: 7},
		Identity: &impersonate.Identity{User: "alice@example.com", Recording: recording},
		Conn:     &tailnet.Conn{Remote: netip.MustParseAddrPort("100.64.0.2:1")},
		Node:     node,
	}
}

// request returns a request with variables, as Caddy's server makes it.
func request(t *testing.T, method, target string) *http.Request {
	t.Helper()
	ctx := context.WithValue(t.Context(), caddyhttp.VarsCtxKey, make(map[string]any))
	return httptest.NewRequestWithContext(ctx, method, target, nil)
}

// execRequest returns a request for exec over WebSocket.
func execRequest(t *testing.T) *http.Request {
	t.Helper()
	r := request(t, http.MethodGet, "/api/v1/namespaces/default/pods/web/exec?command=sh")
	r.Header.Set("Connection", "Upgrade")
	r.Header.Set("Upgrade", "websocket")
	r.Header.Set("Sec-Websocket-Protocol", "v5.channel.k8s.io")
	return r
}

// upgraded is the header of the answer to execRequest.
var upgraded = http.Header{"Upgrade": {"websocket"}, "Sec-WebSocket-Protocol": {"v5.channel.k8s.io"}}

// codeOf returns the status code that err refuses a request with, 0 if err is nil.
func codeOf(err error) int32 {
	if err == nil {
		return 0
	}
	status, ok := apistatus.From(err)
	if !ok {
		return http.StatusInternalServerError
	}
	return status.Code
}

// counted returns what checks the outcomes that are counted from now on.
func counted(t *testing.T) (check func(want ...Outcome)) {
	t.Helper()
	before := counts(t)
	return func(want ...Outcome) {
		t.Helper()
		got, wanted := counts(t), make(map[Outcome]float64)
		for outcome := range got {
			got[outcome] -= before[outcome]
			wanted[outcome] = 0
		}
		for _, outcome := range want {
			wanted[outcome]++
		}
		if diff := cmp.Diff(wanted, got); diff != "" {
			t.Errorf("counted (-want +got):\n%s", diff)
		}
	}
}

// counts returns the value of the metric for every outcome.
func counts(t *testing.T) map[Outcome]float64 {
	t.Helper()
	registry := prometheus.NewRegistry()
	metrics.Register(registry)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[Outcome]float64)
	for _, family := range families {
		if family.GetName() == "caddy_tailscale_impersonate_recordings_total" {
			for _, m := range family.GetMetric() {
				all[Outcome(m.GetLabel()[0].GetValue())] = m.GetCounter().GetValue()
			}
		}
	}
	return all
}

// eventually waits until what holds. It fails t with message after ten seconds.
func eventually(t *testing.T, message string, what func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !what(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(message)
		}
	}
}

// written is a buffer that may be read while a sink writes to it.
type written struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements [io.Writer].
func (w *written) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(p)
}

func (w *written) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.String()
}

// failing is a writer that fails.
type failing struct{}

// Write implements [io.Writer].
func (failing) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

// neverFails returns what a sink that must not fail calls when it does.
func neverFails(t *testing.T) func(error) {
	return func(err error) { t.Errorf("the sink failed: %v", err) }
}
