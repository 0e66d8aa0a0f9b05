// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"tailscale.com/tsnet"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/headscale"
)

// otherTailnet is a second tailnet, which uses the same addresses as the first.
type otherTailnet struct {
	headscale *headscale.Server
	key       string // auth key for a node of Caddy
}

func startOtherTailnet(ctx context.Context, dir string) (*otherTailnet, error) {
	if err := os.Setenv("TS_NO_LOGS_NO_SUPPORT", "true"); err != nil {
		return nil, err
	}
	hs, err := headscale.Start(ctx, headscale.Config{
		Dir:        dir,
		BaseDomain: "other.example",
		Policy:     []byte(`{"grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}]}`),
	})
	if err != nil {
		return nil, err
	}
	const login = "mallory@example.com"
	if err := hs.CreateUser(ctx, login); err != nil {
		return nil, err
	}
	key, err := hs.UserKey(ctx, login)
	return &otherTailnet{hs, key}, err
}

func (o *otherTailnet) stop() error { return o.headscale.Stop() }

// response is an answer whose body has been read.
type response struct {
	*http.Response
	body string
}

// send writes a raw request to a port of the proxy's node as a caller, and returns
// the answer.
func send(t *testing.T, caller, port, raw string) response {
	t.Helper()
	return sendTo(t, theLab.Callers[caller].Server, lab.ProxyName+":"+port, raw)
}

func sendTo(t *testing.T, from *tsnet.Server, address, raw string) response {
	t.Helper()
	resp, err := trySend(t, from, address, raw)
	if err != nil {
		t.Fatalf("reading the answer to %q: %v", raw, err)
	}
	return resp
}

// trySend is [sendTo] for a connection that may be closed without an answer.
func trySend(t *testing.T, from *tsnet.Server, address, raw string) (response, error) {
	t.Helper()
	conn := dial(t, from, address)
	if _, err := io.WriteString(conn, raw); err != nil {
		t.Fatalf("writing a request: %v", err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return response{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return response{resp, string(body)}, err
}

// statusOf sends a request and returns the status of the answer. It does not read
// the body, which may never end.
func statusOf(t *testing.T, caller, port, raw string) int {
	t.Helper()
	conn := dial(t, theLab.Callers[caller].Server, lab.ProxyName+":"+port)
	if _, err := io.WriteString(conn, raw); err != nil {
		t.Fatalf("writing a request: %v", err)
	}
	return readStatus(t, conn, raw)
}

// readStatus reads the status of the answer to a request from conn.
func readStatus(t *testing.T, conn net.Conn, raw string) int {
	t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("reading the answer to %q: %v", raw, err)
	}
	return resp.StatusCode
}

// dial connects to an address of the tailnet within 20 seconds. The connection is
// closed when the test ends.
func dial(t *testing.T, from *tsnet.Server, address string) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	conn, err := lab.Dial(ctx, from, "tcp", address)
	if err != nil {
		t.Fatalf("dialling %s: %v", address, err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// get returns a GET request for path with additional header lines.
func get(path string, headers ...string) string { return request("GET", path, "", headers...) }

// request returns an HTTP/1.1 request to the proxy by its name. It closes the
// connection, unless a header line says otherwise.
func request(method, path, body string, headers ...string) string {
	head := append([]string{method + " " + path + " HTTP/1.1"}, headers...)
	if !contains(headers, "host:") {
		head = append(head, "Host: "+lab.ProxyName)
	}
	if !contains(headers, "connection:") {
		head = append(head, "Connection: close")
	}
	if body != "" {
		head = append(head, fmt.Sprintf("Content-Length: %d", len(body)))
	}
	return strings.Join(head, "\r\n") + "\r\n\r\n" + body
}

func contains(lines []string, prefix string) bool {
	for _, line := range lines {
		if strings.HasPrefix(strings.ToLower(line), prefix) {
			return true
		}
	}
	return false
}

// replaceOnce replaces the only occurrence of old in s.
func replaceOnce(s, old, replacement string) string {
	if strings.Count(s, old) != 1 {
		panic(fmt.Sprintf("%q does not occur exactly once", old))
	}
	return strings.Replace(s, old, replacement, 1)
}
