// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/app"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

// newStreams returns an API server that answers every request with a line, and never ends
// the answer. To requests for nodes it gives no answer, but a notice on the channel.
func newStreams(t *testing.T) (*proxytest.APIServer, <-chan struct{}) {
	t.Helper()
	up := proxytest.NewAPIServer(t)
	silent := make(chan struct{})
	up.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/api/v1/nodes" {
			close(silent)
			<-r.Context().Done()
			return
		}
		w.Header().Set("Content-Type", "text/plain")
		_, _ = io.WriteString(w, "first\n")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	return up, silent
}

// A watch ends properly, so that clients do not take it for a failure; a log does not, as
// it would look complete. New streams are refused, until the connection is closed.
func TestStop_StreamsEndProperly(t *testing.T) {
	process := app.Acquire()
	process.Release()
	t.Cleanup(func() { // or further streams would be refused
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			now := app.Acquire()
			now.Release()
			if now != process {
				return
			}
			if time.Now().After(deadline) {
				t.Fatal("the state of the process is kept after the last request")
			}
		}
	})
	api, silent := newStreams(t)
	s := proxytest.StartSite(t, api, "tailscale_impersonate {\nrecheck_interval 1s\n}\nreverse_proxy https://$UPSTREAM {\n$KUBERNETES\n}", proxytest.AliceNode())
	process = app.Acquire()
	process.Release()

	send := func(path string) net.Conn {
		conn := s.Dial(t, proxytest.AliceAddr)
		t.Cleanup(func() { _ = conn.Close() })
		if _, err := io.WriteString(conn, "GET "+path+" HTTP/1.1\r\nHost: k8s\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	answer := func(conn net.Conn) *http.Response {
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = resp.Body.Close() })
		return resp
	}
	open := func(path string) *bufio.Reader {
		body := bufio.NewReader(answer(send(path)).Body)
		if line, err := body.ReadString('\n'); line != "first\n" {
			t.Fatalf("%s: got %q, %v", path, line, err)
		}
		return body
	}
	watch := open("/api/v1/pods?watch=true")
	log := open("/api/v1/namespaces/default/pods/web/log?follow=true")
	unanswered := send("/api/v1/nodes?watch=true")
	<-silent
	process.Requests.Stop(5 * time.Second)

	proxytest.CheckRefused(t, answer(unanswered), proxytest.TryAgain, "the proxy is stopping")

	if rest, err := io.ReadAll(watch); len(rest) > 0 || err != nil {
		t.Errorf("the watch ends with %q, %v; want a proper end", rest, err)
	}
	if rest, err := io.ReadAll(log); !strings.Contains(string(rest), "the proxy is stopping") || err == nil {
		t.Errorf("the log ends with %q, %v; want the reason, and an error", rest, err)
	}
	resp := s.Get(t, "/api/v1/pods?watch=true", "")
	proxytest.CheckRefused(t, resp, proxytest.TryAgain, "the proxy is stopping")
	if !resp.Close {
		t.Errorf("got headers %v; want the connection to be closed, for a retry over another", resp.Header)
	}
}
