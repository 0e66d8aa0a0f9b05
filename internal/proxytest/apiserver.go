// SPDX-License-Identifier: Apache-2.0

package proxytest

import (
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// ProxyToken is the value of Authorization in requests with the proxy's credentials.
const ProxyToken = "Bearer proxy-token"

// The headers that identify alice to the API server, behind transport http and behind
// transport kubernetes.
var (
	AliceHeaders = http.Header{"Impersonate-User": {"alice@example.com"}, "Impersonate-Group": {"tailnet-readers"}}
	AliceAsProxy = http.Header{"Impersonate-User": {"alice@example.com"}, "Impersonate-Group": {"tailnet-readers"}, "Authorization": {ProxyToken}}
)

// APIServer records the requests that it receives.
type APIServer struct {
	*httptest.Server

	mu       sync.Mutex
	received []*http.Request
	status   int // what it answers, 200 if zero
}

// NewAPIServer returns an API server that speaks TLS and HTTP/2, answers 200 and accepts
// every upgrade. configure can change the server before it starts.
func NewAPIServer(t testing.TB, configure ...func(*httptest.Server)) *APIServer {
	t.Helper()
	a := new(APIServer)
	a.Server = httptest.NewUnstartedServer(a.record(t, func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		status := a.status
		a.mu.Unlock()
		protocol := r.Header.Get("Upgrade")
		switch {
		case status != 0:
			w.WriteHeader(status)
		case protocol != "":
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Errorf("API server: %v", err)
				return
			}
			defer conn.Close()
			fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", protocol)
		}
	}))
	a.EnableHTTP2 = true
	for _, f := range configure {
		f(a.Server)
	}
	a.StartTLS()
	t.Cleanup(a.Close)
	return a
}

// allowing returns h, except that what the proxy asks about its own account is allowed.
func allowing(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.URL.Path, "/selfsubjectaccessreviews") {
			h.ServeHTTP(w, r)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, `{"status": {"allowed": true}}`)
	})
}

// record returns a handler that reads each request with its trailers, records it, and
// has h answer it, except for what the proxy asks about its own account.
func (a *APIServer) record(t testing.TB, h http.HandlerFunc) http.Handler {
	return allowing(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			t.Errorf("API server: reading the body: %v", err)
		}
		a.mu.Lock()
		a.received = append(a.received, r)
		a.mu.Unlock()
		h(w, r)
	}))
}

// Answer has a answer all further requests with status, or as before if status is 0.
func (a *APIServer) Answer(status int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.status = status
}

// NewTunnel returns an API server that leaves the connection of every request to
// serve. It records nothing.
func NewTunnel(t testing.TB, serve func(net.Conn)) *APIServer {
	t.Helper()
	a := NewAPIServer(t)
	a.Config.Handler = allowing(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		serve(conn)
	}))
	return a
}

// Take returns the requests that a has received since the last call.
func (a *APIServer) Take() []*http.Request {
	a.mu.Lock()
	defer a.mu.Unlock()
	received := a.received
	a.received = nil
	return received
}

// One returns the one request that a has received since the last call of Take.
func (a *APIServer) One(t testing.TB) *http.Request {
	t.Helper()
	received := a.Take()
	if len(received) != 1 {
		t.Fatalf("the API server received %d requests; want 1", len(received))
	}
	return received[0]
}

// CheckNone checks that a has received nothing since the last call of Take.
func (a *APIServer) CheckNone(t testing.TB) {
	t.Helper()
	for _, r := range a.Take() {
		t.Errorf("the API server received %s %s, with the identity %v; want no request", r.Method, r.URL, Protected(r.Header))
	}
}

// CheckOne checks that a has received exactly one request, with exactly the identity
// and credentials want, and without trailers.
func (a *APIServer) CheckOne(t testing.TB, want http.Header) {
	t.Helper()
	received := a.Take()
	if len(received) != 1 {
		t.Errorf("the API server received %d requests; want 1", len(received))
	}
	for _, r := range received {
		if diff := cmp.Diff(want, Protected(r.Header)); diff != "" {
			t.Errorf("identity at the API server differs (-want +got):\n%s", diff)
		}
		if len(r.Trailer) > 0 {
			t.Errorf("trailers have reached the API server: %v", r.Trailer)
		}
	}
}

// CA returns the certificate authority of a, in PEM.
func (a *APIServer) CA() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate().Raw})
}

// Expand replaces variables in a Caddyfile: $UPSTREAM by the address of a, $HTTP by a
// transport http that trusts a, and $KUBERNETES by a transport kubernetes with
// credentials for a.
func (a *APIServer) Expand(t testing.TB, text string) string {
	t.Helper()
	dir := t.TempDir()
	ca, token, kubeconfig := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "token"), filepath.Join(dir, "kubeconfig")
	WriteFile(t, token, "proxy-token")
	WriteFile(t, ca, string(a.CA()))
	WriteFile(t, kubeconfig, fmt.Sprintf(`{"apiVersion": "v1", "kind": "Config", "current-context": "c",
		"contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
		"clusters": [{"name": "k", "cluster": {"server": %q, "certificate-authority": %q}}],
		"users": [{"name": "u", "user": {"tokenFile": %q}}]}`, a.URL, ca, token))
	return strings.NewReplacer(
		"$UPSTREAM", a.Listener.Addr().String(),
		"$KUBERNETES", "transport kubernetes {\nkubeconfig "+kubeconfig+"\n}\n",
		"$HTTP", "transport http {\nversions 1.1\ntls_trust_pool file "+ca+"\n}\n",
	).Replace(text)
}
