// SPDX-License-Identifier: Apache-2.0

// Package hostile sends what no well-behaved client sends: requests whose answers are not
// read, header fields by the ten thousand, frames that are never finished.
package hostile

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// writeTimeout is how long the server may take to read what an attack sends.
const writeTimeout = 20 * time.Second

// Dialer connects to addresses of the tailnet, as a [lab.Caller] does.
type Dialer interface {
	Dial(ctx context.Context, network, address string) (net.Conn, error)
}

// TLS opens a connection of a caller to the proxy's site that speaks a protocol.
func TLS(ctx context.Context, c Dialer, protocol string) (*tls.Conn, error) {
	host := lab.ProxyName + "." + lab.Domain
	raw, err := c.Dial(ctx, "tcp", host+":443")
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, &tls.Config{ServerName: host, NextProtos: []string{protocol}, InsecureSkipVerify: true})
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	return conn, nil
}

// HTTP2 is an HTTP/2 connection. It drops what it receives.
type HTTP2 struct {
	net.Conn

	mu      sync.Mutex // held while writing
	framer  *http2.Framer
	stream  uint32
	answers atomic.Int64
	over    chan struct{}
}

// NewHTTP2 opens an HTTP/2 connection whose answers have a window: with 0, the server can
// send no byte of a body.
func NewHTTP2(ctx context.Context, c Dialer, window uint32) (*HTTP2, error) {
	conn, err := TLS(ctx, c, "h2")
	if err != nil {
		return nil, err
	}
	h := &HTTP2{Conn: conn, framer: http2.NewFramer(conn, conn), stream: 1, over: make(chan struct{})}
	_ = conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	if err := h.framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: window}); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	go h.drop()
	return h, nil
}

// drop reads frames, so that the server can send what is not an answer's body.
func (h *HTTP2) drop() {
	defer close(h.over)
	for {
		frame, err := h.framer.ReadFrame()
		var stream http2.StreamError
		if errors.As(err, &stream) {
			continue
		}
		if err != nil {
			return
		}
		if _, ok := frame.(*http2.HeadersFrame); ok {
			h.answers.Add(1)
		}
	}
}

// Answers returns how many answers have begun.
func (h *HTTP2) Answers() int { return int(h.answers.Load()) }

// Over is closed when the connection has ended.
func (h *HTTP2) Over() <-chan struct{} { return h.over }

// Get sends a GET request.
func (h *HTTP2) Get(path string) error { return h.send("GET", path, 0, true) }

// Bomb sends a POST request that does not end, with so many header fields of one byte
// each.
func (h *HTTP2) Bomb(path string, fields int) error { return h.send("POST", path, fields, false) }

func (h *HTTP2) send(method, path string, fields int, end bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for _, f := range [][2]string{
		{":method", method}, {":scheme", "https"}, {":authority", lab.ProxyName + "." + lab.Domain}, {":path", path},
	} {
		// Never indexed, so that all requests are encoded alike.
		if err := encoder.WriteField(hpack.HeaderField{Name: f[0], Value: f[1], Sensitive: true}); err != nil {
			return err
		}
	}
	const age = 0x80 | 21 // the field "age" of HPACK's table
	block.Write(bytes.Repeat([]byte{age}, fields))
	_ = h.SetWriteDeadline(time.Now().Add(writeTimeout))
	const most = 16 << 10
	first := block.Next(most)
	if err := h.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: h.stream, BlockFragment: first, EndHeaders: block.Len() == 0, EndStream: end}); err != nil {
		return err
	}
	for block.Len() > 0 {
		part := block.Next(most)
		if err := h.framer.WriteContinuation(h.stream, block.Len() == 0, part); err != nil {
			return err
		}
	}
	h.stream += 2
	return nil
}

// UnreadAnswers asks for path n times on a connection and reads nothing.
func UnreadAnswers(ctx context.Context, c Dialer, path string, n int) (*HTTP2, error) {
	h, err := NewHTTP2(ctx, c, 0)
	if err != nil {
		return nil, err
	}
	for range n {
		if err := h.Get(path); err != nil {
			return h, err
		}
	}
	return h, nil
}

// HeaderBombs sends n requests with 29,000 header fields each.
func HeaderBombs(ctx context.Context, c Dialer, path string, n int) (*HTTP2, error) {
	h, err := NewHTTP2(ctx, c, 0)
	if err != nil {
		return nil, err
	}
	for range n {
		if err := h.Bomb(path, 29_000); err != nil {
			return h, err
		}
	}
	return h, nil
}

// Upgrade sends a request to upgrade an HTTP/1.1 connection to a WebSocket, as kubectl
// exec does. It does not wait for the answer.
func Upgrade(ctx context.Context, c Dialer, target string) (net.Conn, error) {
	conn, err := TLS(ctx, c, "http/1.1")
	if err != nil {
		return nil, err
	}
	_ = conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	_, err = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s.%s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n",
		target, lab.ProxyName, lab.Domain)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// Upgraded is Upgrade, and waits until the session is open.
func Upgraded(ctx context.Context, c Dialer, target string) (net.Conn, error) {
	conn, err := Upgrade(ctx, c, target)
	if err != nil {
		return nil, err
	}
	_ = conn.SetReadDeadline(time.Now().Add(writeTimeout))
	var head strings.Builder
	for b := make([]byte, 1); !strings.HasSuffix(head.String(), "\r\n\r\n"); head.Write(b) {
		if _, err := conn.Read(b); err != nil {
			return nil, errors.Join(fmt.Errorf("after %q: %w", head.String(), err), conn.Close())
		}
	}
	if !strings.HasPrefix(head.String(), "HTTP/1.1 101 ") {
		return nil, errors.Join(fmt.Errorf("answered with %.60q", head.String()), conn.Close())
	}
	return conn, nil
}

// Frame begins a WebSocket frame of so many bytes, and does not finish it.
func Frame(conn net.Conn, size int) error {
	_ = conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	header := binary.BigEndian.AppendUint64([]byte{0x82, 0x80 | 127}, uint64(size)) //nolint:gosec // no size is negative
	header = append(header, 0, 0, 0, 0)
	if _, err := conn.Write(header); err != nil {
		return err
	}
	_, err := conn.Write(make([]byte, size-1))
	return err
}
