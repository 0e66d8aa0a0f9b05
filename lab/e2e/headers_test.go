// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// forgeries are header lines with which bob tries to become another user, or to
// remove his identity, which would leave the proxy's own. Some are possible only in
// HTTP/1.1, as HTTP/2 has no Connection header.
var forgeries = []struct {
	name  string
	lines []string
	http1 bool // only possible in HTTP/1.1
}{
	{name: "nothing"},
	{name: "Connection names the identity", lines: []string{"Connection: Impersonate-User, Impersonate-Group"}, http1: true},
	{name: "Connection names the user only", lines: []string{"Connection: close, impersonate-user"}, http1: true},
	{name: "Connection names the groups only", lines: []string{"Connection: IMPERSONATE-GROUP"}, http1: true},
	{name: "Connection names the credentials", lines: []string{"Connection: Authorization"}, http1: true},
	{name: "Connection in several lines and odd spacing", lines: []string{"Connection: close ,\t Impersonate-User", "connection:impersonate-group,,"}, http1: true},
	{name: "Connection together with an upgrade", lines: []string{"Connection: Upgrade, Impersonate-User, Impersonate-Group", "Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"}, http1: true},
	{name: "X-Remote-User", lines: []string{"X-Remote-User: system:admin", "X-Remote-Group: system:masters", "X-Remote-Extra-Scopes: all"}},
	{name: "the caller's own credentials", lines: []string{"Authorization: Bearer stolen"}},
	{name: "a bearer token among the subprotocols", lines: []string{"Sec-WebSocket-Protocol: v5.channel.k8s.io, base64url.bearer.authorization.k8s.io.c3RvbGVu"}},
	{name: "an address", lines: []string{"X-Real-Ip: 1.2.3.4"}},
}

// claims are header lines that name an identity. The request is refused, rather than
// the header removed.
var claims = []string{
	"Impersonate-User: system:admin",
	"impersonate-user: system:admin",
	"IMPERSONATE-GROUP: system:masters",
	"Impersonate-Uid: 0",
	"Impersonate-Extra-Scopes: all",
	"Impersonate-Extra-%2e: all",
	"Impersonate-Something-New: x",
}

func TestHeaders_ForgedNeverReachUpstream(t *testing.T) {
	for _, upstream := range []struct {
		name        string
		recorder    *recorder
		http1, tls  string // ports
		credentials string
	}{
		{"transport http", plain, portHTTPTransport, portHTTPTransportTLS, ""},
		{"transport kubernetes", encrypted, portRecorded, portRecordedTLS, "Bearer " + recorderToken},
	} {
		for _, forgery := range forgeries {
			t.Run(upstream.name+"/HTTP1/"+forgery.name, func(t *testing.T) {
				upstream.recorder.take()
				send(t, "bob", upstream.http1, get("/api", forgery.lines...))
				wantOnlyBob(t, upstream.recorder.take(), upstream.credentials)
			})
			if forgery.http1 {
				continue
			}
			t.Run(upstream.name+"/HTTP2/"+forgery.name, func(t *testing.T) {
				upstream.recorder.take()
				sendHTTP2(t, "bob", upstream.tls, forgery.lines...)
				wantOnlyBob(t, upstream.recorder.take(), upstream.credentials)
			})
		}
		for _, claim := range claims {
			t.Run(upstream.name+"/HTTP1/"+claim, func(t *testing.T) {
				upstream.recorder.take()
				resp := send(t, "bob", upstream.http1, get("/api", claim))
				wantNothing(t, upstream.recorder.take(), resp.StatusCode, http.StatusForbidden)
			})
			t.Run(upstream.name+"/HTTP2/"+claim, func(t *testing.T) {
				upstream.recorder.take()
				status := sendHTTP2(t, "bob", upstream.tls, claim)
				wantNothing(t, upstream.recorder.take(), status, http.StatusForbidden)
			})
		}
	}
}

// wantOnlyBob fails the test unless exactly one request arrived, as bob, with the
// given credentials.
func wantOnlyBob(t *testing.T, requests []*http.Request, credentials string) {
	t.Helper()
	if len(requests) != 1 {
		t.Fatalf("%d requests arrived; want 1", len(requests))
	}
	want := http.Header{
		"Impersonate-User":  {"bob@example.com"},
		"Impersonate-Group": {"tailnet-readers"},
	}
	if credentials != "" {
		want["Authorization"] = []string{credentials}
	}
	got := requests[0].Header
	for name, values := range got {
		lower := strings.ToLower(name)
		if strings.HasPrefix(lower, "impersonate") || strings.HasPrefix(lower, "x-remote") || lower == "authorization" || lower == "x-real-ip" {
			if !slices.Equal(values, want[name]) {
				t.Errorf("%s: %q arrived; want %q", name, values, want[name])
			}
		}
		for _, value := range values {
			if strings.Contains(value, "c3RvbGVu") || strings.Contains(value, "stolen") {
				t.Errorf("%s: %q arrived", name, value)
			}
		}
	}
	for name, values := range want {
		if !slices.Equal(got[name], values) {
			t.Errorf("%s: %q arrived; want %q", name, got[name], values)
		}
	}
}

// wantNothing fails the test unless no request arrived and the answer has the wanted
// status.
func wantNothing(t *testing.T, requests []*http.Request, status, want int) {
	t.Helper()
	if len(requests) > 0 {
		t.Errorf("%d requests arrived, the first with headers %v; want none", len(requests), requests[0].Header)
	}
	if status != want {
		t.Errorf("the answer is %d; want %d", status, want)
	}
}

func TestHeaders_MeddlingConfigCannotUseProxysIdentity(t *testing.T) {
	t.Run("header_up removes and sets identity", func(t *testing.T) {
		encrypted.take()
		send(t, "bob", portMeddling, get("/api"))
		wantOnlyBob(t, encrypted.take(), "Bearer "+recorderToken)
	})
	t.Run("the handler is missing", func(t *testing.T) {
		encrypted.take()
		for _, path := range []string{"/api", "/livez"} {
			resp := send(t, "alice", portUnprotected, get(path))
			wantNothing(t, encrypted.take(), resp.StatusCode, http.StatusForbidden)
			if !strings.Contains(resp.body, "without passing tailscale_impersonate") {
				t.Errorf("the answer is %s; want it to name the missing handler", resp.body)
			}
		}
	})
}

func TestHeaders_ConnectIsRefused(t *testing.T) {
	plain.take()
	resp := send(t, "alice", portHTTPTransport, "CONNECT "+lab.ProxyName+":443 HTTP/1.1\r\nHost: "+lab.ProxyName+"\r\n\r\n")
	wantNothing(t, plain.take(), resp.StatusCode, http.StatusMethodNotAllowed)
}

// sendHTTP2 sends a GET request with further header lines over HTTP/2 and returns
// the status of the answer. It writes the frames itself, as HTTP clients refuse to
// send such headers.
func sendHTTP2(t *testing.T, caller, port string, lines ...string) (status int) {
	t.Helper()
	const host = lab.ProxyName + "." + lab.Domain
	ca, err := theLab.Caddy.CA()
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	raw := dial(t, theLab.Callers[caller].Server, lab.ProxyName+":"+port)
	conn := tls.Client(raw, &tls.Config{ServerName: host, RootCAs: roots, NextProtos: []string{"h2"}})
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	framer := http2.NewFramer(conn, conn)
	if err := framer.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	fields := []hpack.HeaderField{
		{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "https"},
		{Name: ":authority", Value: host + ":" + port}, {Name: ":path", Value: "/api"},
	}
	for _, line := range lines {
		name, value, _ := strings.Cut(line, ":")
		fields = append(fields, hpack.HeaderField{Name: strings.ToLower(name), Value: strings.TrimSpace(value)})
	}
	for _, field := range fields {
		if err := encoder.WriteField(field); err != nil {
			t.Fatal(err)
		}
	}
	if err := framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true}); err != nil {
		t.Fatal(err)
	}
	decoder := hpack.NewDecoder(4096, func(f hpack.HeaderField) {
		if f.Name == ":status" {
			if _, err := fmt.Sscan(f.Value, &status); err != nil {
				t.Errorf("status %q: %v", f.Value, err)
			}
		}
	})
	for status == 0 {
		frame, err := framer.ReadFrame()
		if err != nil {
			t.Fatalf("reading the answer: %v", err)
		}
		switch frame := frame.(type) {
		case *http2.HeadersFrame:
			if _, err := decoder.Write(frame.HeaderBlockFragment()); err != nil {
				t.Fatal(err)
			}
		case *http2.RSTStreamFrame:
			t.Fatalf("the stream was reset: %v", frame.ErrCode)
		case *http2.GoAwayFrame:
			t.Fatalf("the connection was closed: %v", frame.ErrCode)
		}
	}
	return status
}
