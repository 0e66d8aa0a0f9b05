// SPDX-License-Identifier: Apache-2.0

package proxytest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Dial connects to s from the tailnet address from, over TLS if s does, with the given
// protocols on offer.
func (s *Site) Dial(t testing.TB, from string, protocols ...string) net.Conn {
	t.Helper()
	conn := net.Conn(dial(t, from, NodeAddr, s.Port))
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if s.tls != nil {
		config := s.tls.Clone()
		config.NextProtos = protocols
		tlsConn := tls.Client(conn, config)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err := tlsConn.HandshakeContext(ctx); err != nil {
			t.Fatalf("TLS handshake: %v", err)
		}
		conn = tlsConn
	}
	return conn
}

// Get sends alice's GET of path to s over HTTP/1.1, with the given header lines, each
// ended by CR LF.
func (s *Site) Get(t testing.TB, path, lines string) *http.Response {
	t.Helper()
	return s.HTTP1(t, AliceAddr, "GET "+path+" HTTP/1.1\r\nHost: k8s\r\n"+lines+"\r\n")
}

// HTTP1 sends raw bytes to s on a connection of their own and returns the answer, whose
// body has been read.
func (s *Site) HTTP1(t testing.TB, from, raw string) *http.Response {
	t.Helper()
	conn := s.Dial(t, from, "http/1.1")
	defer conn.Close()
	return Exchange(t, conn, raw)
}

// HostHTTP1 is HTTP1 over the socket of the host at 127.0.0.1.
func (s *Site) HostHTTP1(t testing.TB, raw string) *http.Response {
	t.Helper()
	conn, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(t.Context(), "tcp", fmt.Sprintf("127.0.0.1:%d", s.Port))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return Exchange(t, conn, raw)
}

// Exchange sends raw bytes on conn and returns the answer, whose body has been read.
func Exchange(t testing.TB, conn net.Conn, raw string) *http.Response {
	t.Helper()
	if _, err := io.WriteString(conn, raw); err != nil {
		t.Fatalf("sending: %v", err)
	}
	return ReadResponse(t, bufio.NewReader(conn))
}

// ReadResponse reads an answer and its body, unless it switches protocols.
func ReadResponse(t testing.TB, from *bufio.Reader) *http.Response {
	t.Helper()
	resp, err := http.ReadResponse(from, nil)
	if err != nil {
		t.Fatalf("reading the answer: %v", err)
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return resp
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("reading the answer's body: %v", err)
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp
}

// HTTP2 sends alice's header fields to s as they are, on an HTTP/2 connection of their
// own, with a body and trailers if there are any. It returns the status of the answer,
// or "reset" if the stream or the connection was closed instead.
func (s *Site) HTTP2(t testing.TB, fields [][2]string, trailers ...[2]string) string {
	t.Helper()
	conn := s.Dial(t, AliceAddr, "h2")
	defer conn.Close()
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	framer := http2.NewFramer(conn, conn)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	send := func(fields [][2]string, end bool) {
		block.Reset()
		for _, f := range fields {
			if err := encoder.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}); err != nil {
				t.Fatal(err)
			}
		}
		err := framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: end})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := framer.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	send(fields, len(trailers) == 0)
	if len(trailers) > 0 {
		if err := framer.WriteData(1, false, []byte("body")); err != nil {
			t.Fatal(err)
		}
		send(trailers, true)
	}
	for {
		frame, err := framer.ReadFrame()
		if errors.Is(err, io.EOF) {
			return "reset"
		}
		if err != nil {
			t.Fatalf("reading a frame: %v", err)
		}
		switch frame := frame.(type) {
		case *http2.MetaHeadersFrame:
			return frame.PseudoValue("status")
		case *http2.RSTStreamFrame, *http2.GoAwayFrame:
			return "reset"
		}
	}
}
