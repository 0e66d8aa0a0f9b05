// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"

	"golang.org/x/net/http2"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/quota"
)

// What the API server may send before anything is read, HTTP/2 settles when a connection
// begins.
func TestTransport_BoundsUnreadAnswers(t *testing.T) {
	for target, want := range map[string]uint32{
		"/openapi/v2":                quota.AnswerBuffer,
		"/api/v1/pods?watch=true":    quota.StreamBuffer,
		"/pods/web/log?follow=true":  quota.StreamBuffer,
		"/pods/web/log?follow=false": quota.AnswerBuffer,
	} {
		windows := make(chan uint32, 1)
		up := proxytest.NewAPIServer(t, func(s *httptest.Server) {
			// In place of the server's own HTTP/2.
			s.Config.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){
				"h2": func(_ *http.Server, conn *tls.Conn, _ http.Handler) { windows <- initialWindow(t, conn) },
			}
			s.TLS = &tls.Config{NextProtos: []string{"h2"}}
			s.EnableHTTP2 = false
		})
		tr := newTransport(t, trusting(up, token))
		r := newRequest(up, target)
		r.URL.Scheme = "https"
		if resp, err := tr.cluster.send(r); err == nil {
			_ = resp.Body.Close()
		}
		if got := <-windows; got != want {
			t.Errorf("%s: %d bytes of an answer may wait to be read; want %d", target, got, want)
		}
	}
}

// initialWindow returns the initial window of a client's streams.
func initialWindow(t *testing.T, conn net.Conn) uint32 {
	if _, err := io.CopyN(io.Discard, conn, int64(len(http2.ClientPreface))); err != nil {
		t.Error(err)
		return 0
	}
	frame, err := http2.NewFramer(io.Discard, conn).ReadFrame()
	if err != nil {
		t.Error(err)
		return 0
	}
	settings, ok := frame.(*http2.SettingsFrame)
	if !ok {
		t.Errorf("the client begins with a %T", frame)
		return 0
	}
	window, _ := settings.Value(http2.SettingInitialWindowSize)
	return window
}
