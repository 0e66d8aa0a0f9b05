// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// If the upstream does not upgrade, the connection stays HTTP. If the proxy switched
// anyway, the client could write further requests directly to the upstream, over the
// proxy's own connection.
func TestUpgrade_RefusedUpgradeLeavesConnectionToHTTP(t *testing.T) {
	const elsewhere = "/followed"
	for _, upstream := range []struct {
		name        string
		recorder    *recorder
		port        string
		credentials string
	}{
		{"transport http", plain, portHTTPTransport, ""},
		{"transport kubernetes", encrypted, portRecorded, "Bearer " + recorderToken},
	} {
		for _, ask := range []struct {
			method  string
			headers []string
		}{
			{"GET", []string{"Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"}},
			{"POST", []string{"Connection: Upgrade", "Upgrade: SPDY/3.1", "Content-Length: 0"}},
		} {
			for _, code := range []int{http.StatusBadRequest, http.StatusForbidden, http.StatusFound, http.StatusTemporaryRedirect, http.StatusOK} {
				for _, pipelined := range []bool{true, false} {
					t.Run(fmt.Sprintf("%s/%s/%d/pipelined=%t", upstream.name, ask.headers[1], code, pipelined), func(t *testing.T) {
						location := upstream.recorder.server.URL + elsewhere
						first := request(ask.method, fmt.Sprintf("/status/%d?location=%s", code, url.QueryEscape(location)), "", ask.headers...)
						// It has forged headers, which are removed only if the handler sees the request.
						second := get("/second", "X-Remote-User: system:admin", "Authorization: Bearer stolen")

						conn := dial(t, theLab.Callers["bob"].Server, lab.ProxyName+":"+upstream.port)
						reader := bufio.NewReader(conn)
						write := func(raw string) {
							t.Helper()
							if _, err := io.WriteString(conn, raw); err != nil {
								t.Fatalf("writing a request: %v", err)
							}
						}
						answer := func() *http.Response {
							t.Helper()
							resp, err := http.ReadResponse(reader, nil)
							if err != nil {
								t.Fatalf("reading an answer: %v", err)
							}
							defer resp.Body.Close()
							if _, err := io.Copy(io.Discard, resp.Body); err != nil {
								t.Fatalf("reading the body of an answer: %v", err)
							}
							return resp
						}

						upstream.recorder.take()
						if pipelined {
							write(first + second)
						} else {
							write(first)
						}
						resp := answer()
						if got := resp.Header.Get("Location"); resp.StatusCode != code || got != location {
							t.Errorf("the answer is %s with location %q; want the upstream's, %d with %q", resp.Status, got, code, location)
						}
						if !pipelined {
							wantOnlyBob(t, upstream.recorder.take(), upstream.credentials)
							write(second)
						}
						if resp := answer(); resp.StatusCode != http.StatusOK {
							t.Errorf("the second answer is %s; want 200", resp.Status)
						}
						requests := upstream.recorder.take()
						if pipelined {
							if len(requests) != 2 {
								t.Fatalf("%d requests arrived; want 2", len(requests))
							}
							wantOnlyBob(t, requests[:1], upstream.credentials)
							requests = requests[1:]
						}
						wantOnlyBob(t, requests, upstream.credentials)
						if got := requests[0].URL.Path; got != "/second" {
							t.Errorf("the second request to arrive is for %s; want /second", got)
						}
					})
				}
			}
		}
	}
}
