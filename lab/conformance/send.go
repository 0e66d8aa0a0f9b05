// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"

	"github.com/quic-go/quic-go"
	h3 "github.com/quic-go/quic-go/http3"
	h2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// connect connects to the proxy. Over TLS, it negotiates protocol.
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

// expand replaces the placeholders for the path and the proxy's name in raw.
func (p Proxy) expand(raw, path string) string {
	return strings.NewReplacer("%s", path, "%h", p.Host).Replace(raw)
}

// bytesFor returns the attack's HTTP/1.1 bytes.
func (a attack) bytesFor(p Proxy, marker string) string {
	path, host, body := marker+a.path, p.Host, p.expand(a.body, marker)
	if a.host != nil {
		host = p.expand(*a.host, "")
	}
	var b strings.Builder
	b.WriteString(a.preface)
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: %s\r\n", cmp.Or(a.method, http.MethodGet), p.expand(cmp.Or(a.target, "%s"), path), host)
	for _, f := range a.fields {
		fmt.Fprintf(&b, "%s:%s\r\n", f.name, f.value)
	}
	switch {
	case a.trailer:
		b.WriteString("Transfer-Encoding: chunked\r\n")
	case body != "":
		fmt.Fprintf(&b, "Content-Length: %d\r\n", len(body))
	}
	b.WriteString("\r\n" + body + p.expand(a.behind, marker))
	return b.String()
}

// sendHTTP1 sends an attack as raw bytes over a new connection and waits for an answer. If
// it holds a second request, it also waits for the second answer, which may be missing.
// It returns how many bytes were answered, at least if their number matters. An error means
// that there was no answer.
func (p Proxy) sendHTTP1(ctx context.Context, a attack, marker string) (answered int64, err error) {
	conn, err := p.connect(ctx, "http/1.1")
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, a.bytesFor(p, marker)); err != nil {
		return 0, err
	}
	counted := &counter{Reader: conn}
	answers := bufio.NewReader(counted)
	resp, err := http.ReadResponse(answers, nil)
	if err != nil {
		return 0, err
	}
	switch {
	case a.behind != "":
		if _, err := io.Copy(io.Discard, resp.Body); err == nil {
			if resp, err := http.ReadResponse(answers, nil); err == nil {
				_ = resp.Body.Close()
			}
		}
	case a.answer > 0:
		_, _ = io.Copy(io.Discard, resp.Body) // what has arrived counts
	}
	return counted.read, resp.Body.Close()
}

// counter counts what is read.
type counter struct {
	io.Reader
	read int64
}

// Read implements [io.Reader].
func (c *counter) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.read += int64(n)
	return n, err
}

// fieldsFor returns the attack's HTTP/2 fields. Names are in lower case, as HTTP/2
// requires.
func (a attack) fieldsFor(p Proxy, marker string) []hpack.HeaderField {
	fields := []hpack.HeaderField{
		{Name: ":method", Value: cmp.Or(a.method, http.MethodGet)}, {Name: ":scheme", Value: "https"},
		{Name: ":authority", Value: p.Host}, {Name: ":path", Value: p.expand(cmp.Or(a.target, "%s"), marker+a.path)},
	}
	return append(fields, hpackFields(a.fields)...)
}

func hpackFields(fields []field) (out []hpack.HeaderField) {
	for _, f := range fields {
		out = append(out, hpack.HeaderField{Name: strings.ToLower(f.name), Value: strings.Trim(f.value, " \t")})
	}
	return out
}

// sendHTTP2 sends an attack as frames over a new connection and waits for an answer. It
// returns the length of its frames, at least as far as it matters.
func (p Proxy) sendHTTP2(ctx context.Context, a attack, marker string) (answered int64, err error) {
	conn, err := p.connect(ctx, "h2")
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, h2.ClientPreface); err != nil {
		return 0, err
	}
	framer := h2.NewFramer(conn, conn)
	if err := framer.WriteSettings(); err != nil {
		return 0, err
	}
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	writeHeaders := func(fields []hpack.HeaderField, last bool) error {
		block.Reset()
		for _, f := range fields {
			if err := encoder.WriteField(f); err != nil {
				return err
			}
		}
		return framer.WriteHeaders(h2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: last})
	}
	if err := writeHeaders(a.fieldsFor(p, marker), a.body == ""); err != nil {
		return 0, err
	}
	if a.body != "" {
		if err := framer.WriteData(1, len(a.trailers) == 0, []byte(p.expand(a.body, marker))); err != nil {
			return 0, err
		}
		if len(a.trailers) > 0 {
			if err := writeHeaders(hpackFields(a.trailers), true); err != nil {
				return 0, err
			}
		}
	}
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			return answered, err
		}
		switch frame := frame.(type) {
		case *h2.HeadersFrame, *h2.ContinuationFrame, *h2.DataFrame:
			answered += int64(frame.Header().Length)
			// A window of the answer that is not enlarged is more than any limit.
			if a.answer == 0 || frame.Header().Flags.Has(h2.FlagDataEndStream) || answered > a.answer {
				return answered, nil
			}
		case *h2.RSTStreamFrame:
			return answered, fmt.Errorf("the stream was reset: %v", frame.ErrCode)
		case *h2.GoAwayFrame:
			return answered, fmt.Errorf("the connection was closed: %v", frame.ErrCode)
		}
	}
}

// sendHTTP3 sends an attack over a new HTTP/3 connection and waits for an answer. It
// sends CONNECT as extended CONNECT, for a WebSocket.
func (p Proxy) sendHTTP3(ctx context.Context, a attack, marker string) error {
	packets, address, err := p.Packets(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = packets.Close() }()
	over := &quic.Transport{Conn: packets}
	defer func() { _ = over.Close() }()
	client := &h3.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		Dial: func(ctx context.Context, _ string, tlsConfig *tls.Config, config *quic.Config) (*quic.Conn, error) {
			return over.DialEarly(ctx, address, tlsConfig, config)
		},
	}
	defer func() { _ = client.Close() }()
	r, err := http.NewRequestWithContext(ctx, cmp.Or(a.method, http.MethodGet), "https://"+p.Host+marker+a.path, strings.NewReader(a.body))
	if err != nil {
		return err
	}
	if a.method == http.MethodConnect {
		r.Proto = "websocket"
		r.Header.Set("Sec-WebSocket-Version", "13")
	}
	resp, err := client.RoundTrip(r)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// show returns the attack as it was sent, with a marker for sending it again.
func (a attack) show(p Proxy, proto protocol) string {
	const marker = "/conformance/0"
	if proto == http1 {
		return "printf '" + printfEscape(a.bytesFor(p, marker)) + "'"
	}
	var b strings.Builder
	for _, f := range a.fieldsFor(p, marker) {
		fmt.Fprintf(&b, "%q: %q; ", f.Name, f.Value)
	}
	fmt.Fprintf(&b, "body: %q", p.expand(a.body, marker))
	for _, f := range a.trailers {
		fmt.Fprintf(&b, "; trailer %q: %q", f.name, f.value)
	}
	return b.String()
}

// printfEscape escapes raw for the shell's printf, in single quotes.
func printfEscape(raw string) string {
	var b strings.Builder
	for _, c := range []byte(raw) {
		switch {
		case c == '\r':
			b.WriteString(`\r`)
		case c == '\n':
			b.WriteString(`\n`)
		case c == '%':
			b.WriteString("%%")
		case c < ' ', c > '~', c == '\'', c == '\\':
			fmt.Fprintf(&b, `\%03o`, c)
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}
