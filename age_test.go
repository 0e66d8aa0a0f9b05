// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"bufio"
	"errors"
	"io"
	"net/http"
	"slices"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// aged is a site on which every connection is too old at once.
const aged = "tailscale_impersonate {\nmax_connection_age 1ns\nwhoami\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}"

// wantEOF fails t unless the server closes the connection.
func wantEOF(t *testing.T, r io.Reader) {
	t.Helper()
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read: %v; want the connection to be closed", err)
	}
}

// Whether the request is passed on, refused or answered by the handler itself.
func TestMaxConnectionAge_HTTP1EndsWithAnswer(t *testing.T) {
	s := proxytest.StartSite(t, proxytest.NewAPIServer(t), aged, proxytest.AliceNode())
	for _, request := range []string{
		"GET /api HTTP/1.1\r\nHost: k8s\r\n\r\n",
		"GET /api HTTP/1.1\r\nHost: k8s\r\nOrigin: https://evil.example\r\n\r\n",
		"GET /whoami HTTP/1.1\r\nHost: k8s\r\n\r\n",
	} {
		conn := s.Dial(t, proxytest.AliceAddr)
		defer conn.Close()
		if _, err := io.WriteString(conn, request); err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(conn)
		if resp := proxytest.ReadResponse(t, r); !resp.Close {
			t.Errorf("%q: the answer has the headers %v; want Connection: close", request, resp.Header)
		}
		wantEOF(t, r)
	}
}

// The connection says GOAWAY. What is open on it goes on, as its caller is checked.
func TestMaxConnectionAge_HTTP2GoesAway(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	finish := make(chan struct{})
	up.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Has("watch") {
			_, _ = io.WriteString(w, "begin ")
			_ = http.NewResponseController(w).Flush()
			<-finish
		}
		_, _ = io.WriteString(w, "end")
	})
	s := proxytest.Config{API: up, Body: aged, TLS: true, Nodes: []*tailnet.Node{proxytest.AliceNode()}}.Start(t)
	conn, err := new(http2.Transport).NewClientConn(s.Dial(t, proxytest.AliceAddr, "h2")) //nolint:staticcheck // that of http.Transport dials by itself
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	get := func(path string) *http.Response {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://example.com"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := conn.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	watch := get("/api/v1/pods?watch=true")
	defer watch.Body.Close()
	if _, err := io.ReadFull(watch.Body, make([]byte, len("begin "))); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); conn.CanTakeNewRequest(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the connection takes other requests")
		}
	}
	close(finish)
	if rest, err := io.ReadAll(watch.Body); err != nil || string(rest) != "end" {
		t.Errorf("the rest of the watch is %q, %v; want its end", rest, err)
	}
}

// Clients look for an answer that says Upgrade alone. No request can follow it.
func TestMaxConnectionAge_LetsUpgradesPass(t *testing.T) {
	s := proxytest.StartSite(t, proxytest.NewAPIServer(t), aged, proxytest.AliceNode())
	const upgrade = " HTTP/1.1\r\nHost: k8s\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n"
	for _, path := range []string{"/api/v1/namespaces/default/pods/web/exec", "/api/v1/namespaces/default/pods/web/portforward"} {
		resp := s.HTTP1(t, proxytest.AliceAddr, "POST "+path+upgrade)
		if resp.StatusCode != http.StatusSwitchingProtocols || !slices.Equal(resp.Header["Connection"], []string{"Upgrade"}) {
			t.Errorf("%s: the answer is %s, with the headers %v; want 101 and Connection: Upgrade", path, resp.Status, resp.Header)
		}
	}
	// Whoever asks for an upgrade and gets none cannot go on.
	up := proxytest.NewAPIServer(t)
	up.Answer(http.StatusOK)
	s = proxytest.StartSite(t, up, aged, proxytest.AliceNode())
	if resp := s.HTTP1(t, proxytest.AliceAddr, "GET /api"+upgrade); resp.StatusCode != http.StatusOK || !resp.Close {
		t.Errorf("without an upgrade, the answer is %s, with the headers %v; want Connection: close", resp.Status, resp.Header)
	}
}

// By default, it is longer than a test.
func TestMaxConnectionAge_YoungConnectionStays(t *testing.T) {
	s := proxytest.StartSite(t, proxytest.NewAPIServer(t), proxytest.ToKubernetes, proxytest.AliceNode())
	conn := s.Dial(t, proxytest.AliceAddr)
	defer conn.Close()
	r := bufio.NewReader(conn)
	for range 3 {
		if _, err := io.WriteString(conn, "GET /api HTTP/1.1\r\nHost: k8s\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if resp := proxytest.ReadResponse(t, r); resp.Close || resp.StatusCode != http.StatusOK {
			t.Errorf("the answer is %s, with the headers %v; want the connection to stay", resp.Status, resp.Header)
		}
	}
}
