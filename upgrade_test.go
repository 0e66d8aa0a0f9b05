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

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// A command may end before it has read its input. Its exit code comes last. Because of the
// access log, Caddy counts the bytes of both directions until the tunnel has ended.
func TestTunnel_LastWordsReachClientThatIsSending(t *testing.T) {
	const last = "\x03exit code 6"
	up := proxytest.NewTunnel(t, func(conn net.Conn) {
		defer conn.Close() // which resets it: the client is still sending
		_, _ = io.WriteString(conn, proxytest.SwitchedToV5)
		_, _ = io.ReadFull(conn, make([]byte, 100<<10))
		_, _ = conn.Write(proxytest.PodMessage(last))
	})
	block := proxytest.ClientMessage("\x00" + strings.Repeat("x", 32<<10))
	for _, options := range []string{"", "record " + t.TempDir()} {
		s := proxytest.Config{
			API: up, TLS: true, Nodes: []*tailnet.Node{proxytest.NewNode(proxytest.WhoIs(proxytest.Readers), nil)},
			Body: "log\ntailscale_impersonate {\n" + options + "\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}",
		}.Start(t)
		for _, target := range []string{proxytest.ExecTarget, "/api/v1/namespaces/default/services/web/proxy/"} {
			for range 5 {
				conn := s.Dial(t, proxytest.AliceAddr, "http/1.1")
				if _, err := io.WriteString(conn, proxytest.UpgradeRequest("GET", target, "websocket", proxytest.WebSocketV5)); err != nil {
					t.Fatal(err)
				}
				sent := make(chan error, 1)
				go func() {
					var err error
					for err == nil {
						_, err = conn.Write(block)
					}
					sent <- err
				}()
				r := bufio.NewReader(conn)
				if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
					t.Fatalf("%s %s: got %v, %v", options, target, resp, err)
				}
				got, err := io.ReadAll(r)
				if err != nil || !strings.HasSuffix(string(got), last) {
					t.Errorf("%s %s: got %.200q, %v; want the last words", options, target, got, err)
				}
				// A reset can overtake them, and some systems then discard what has arrived.
				select {
				case err := <-sent:
					t.Fatalf("%s %s: the client, which is still sending, got %v", options, target, err)
				case <-time.After(20 * time.Millisecond): // long enough for a reset
				}
				_ = conn.Close()
				<-sent //nolint:errcheck // it ends with the connection
			}
		}
	}
}
