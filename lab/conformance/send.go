// SPDX-License-Identifier: Apache-2.0

package conformance

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
	"strings"

	h2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// connect connects to the proxy, speaking protocol where there is TLS.
func (p Proxy) connect(ctx context.Context, protocol string) (net.Conn, error) {
	conn, err := p.Dial(ctx, "tcp", p.Address)
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	if !p.TLS {
		return conn, nil
	}
	name, _, _ := strings.Cut(p.Host, ":")
	secured := tls.Client(conn, &tls.Config{ServerName: name, InsecureSkipVerify: true, NextProtos: []string{protocol}})
	if err := secured.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return secured, nil
}

// bytesFor returns the attack as HTTP/1.1.
func (a attack) bytesFor(p Proxy, marker string) string {
	method, path := a.method, marker+a.path
	if method == "" {
		method = "GET"
	}
	if a.target != "" {
		path = strings.ReplaceAll(strings.ReplaceAll(a.target, "%s", path), "%h", p.Host)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: %s\r\n", method, path, p.Host)
	for _, f := range a.fields {
		fmt.Fprintf(&b, "%s:%s\r\n", f.name, f.value)
	}
	switch {
	case a.trailer:
		b.WriteString("Transfer-Encoding: chunked\r\n")
	case a.body != "":
		fmt.Fprintf(&b, "Content-Length: %d\r\n", len(a.body))
	}
	b.WriteString("\r\n" + a.body)
	return b.String()
}

// sendHTTP1 sends raw bytes over a connection of their own, and waits for an
// answer. An error means that there was none.
func (p Proxy) sendHTTP1(ctx context.Context, raw string) error {
	conn, err := p.connect(ctx, "http/1.1")
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, raw); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// fieldsFor returns the attack as the fields of HTTP/2. Names are in lower case, as
// anything else is malformed there.
func (a attack) fieldsFor(p Proxy, marker string) []hpack.HeaderField {
	method := a.method
	if method == "" {
		method = "GET"
	}
	fields := []hpack.HeaderField{
		{Name: ":method", Value: method}, {Name: ":scheme", Value: "https"},
		{Name: ":authority", Value: p.Host}, {Name: ":path", Value: marker + a.path},
	}
	for _, f := range a.fields {
		fields = append(fields, hpack.HeaderField{Name: strings.ToLower(f.name), Value: strings.Trim(f.value, " \t")})
	}
	return fields
}

// sendHTTP2 sends frames over a connection of their own, and waits for an answer.
func (p Proxy) sendHTTP2(ctx context.Context, fields []hpack.HeaderField, body string) error {
	conn, err := p.connect(ctx, "h2")
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, h2.ClientPreface); err != nil {
		return err
	}
	framer := h2.NewFramer(conn, conn)
	if err := framer.WriteSettings(); err != nil {
		return err
	}
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for _, f := range fields {
		if err := encoder.WriteField(f); err != nil {
			return err
		}
	}
	if err := framer.WriteHeaders(h2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: body == ""}); err != nil {
		return err
	}
	if body != "" {
		if err := framer.WriteData(1, true, []byte(body)); err != nil {
			return err
		}
	}
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			return err
		}
		switch frame := frame.(type) {
		case *h2.HeadersFrame:
			return nil
		case *h2.RSTStreamFrame:
			return fmt.Errorf("the stream was reset: %v", frame.ErrCode)
		case *h2.GoAwayFrame:
			return fmt.Errorf("the connection was closed: %v", frame.ErrCode)
		}
	}
}

// show returns the attack as it was sent, with a marker that can be sent again.
func (a attack) show(p Proxy, proto protocol) string {
	const marker = "/conformance/0"
	if proto == http1 {
		return fmt.Sprintf("%q", a.bytesFor(p, marker))
	}
	var b strings.Builder
	for _, f := range a.fieldsFor(p, marker) {
		fmt.Fprintf(&b, "%q: %q; ", f.Name, f.Value)
	}
	return b.String() + fmt.Sprintf("body: %q", a.body)
}
