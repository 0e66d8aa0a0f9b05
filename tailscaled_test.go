// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"tailscale.com/ipn/ipnstate"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

// Caddy listens on sockets of the host, whose Tailscale daemon says that 127.0.0.2 is its
// address and that alice's laptop is at 127.0.0.3. The host owns all of 127.0.0.0/8, so
// these connections are real.
func TestTailscaled_IsAskedAboutHostSockets(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "tailscaled.sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	daemon := &httptest.Server{Listener: ln, Config: &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var answer any
		switch {
		case r.URL.Path == "/localapi/v0/status":
			answer = &ipnstate.Status{TailscaleIPs: []netip.Addr{netip.MustParseAddr("127.0.0.2")}, Self: &ipnstate.PeerStatus{DNSName: "server.example.ts.net."}}
		case r.URL.Path == "/localapi/v0/whois" && r.FormValue("addr") == "127.0.0.3" && r.FormValue("dst_ip") == "127.0.0.2":
			answer = proxytest.WhoIs(proxytest.Readers)
		default:
			http.Error(w, "no such peer", http.StatusNotFound)
			return
		}
		if err := json.NewEncoder(w).Encode(answer); err != nil {
			t.Error(err)
		}
	})}}
	daemon.Start()
	defer daemon.Close()

	up := proxytest.NewAPIServer(t)
	s := proxytest.Config{
		API:  up,
		Bind: "127.0.0.1 127.0.0.2",
		Body: "tailscale_impersonate {\ntailscaled " + socket + "\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}",
	}.Start(t)

	send := func(from, to string) *http.Response {
		t.Helper()
		dialer := net.Dialer{Timeout: 10 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		conn, err := dialer.DialContext(t.Context(), "tcp", net.JoinHostPort(to, fmt.Sprint(s.Port)))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		return proxytest.Exchange(t, conn, "GET /api HTTP/1.1\r\nHost: server\r\nX-Forwarded-For: 127.0.0.3\r\nConnection: close\r\n\r\n")
	}
	if resp := send("127.0.0.3", "127.0.0.2"); resp.StatusCode != http.StatusOK {
		t.Errorf("alice is answered with %s", resp.Status)
	}
	up.CheckOne(t, proxytest.AliceAsProxy)
	for _, tt := range []struct{ name, from, to, word string }{
		{"the host itself", "127.0.0.2", "127.0.0.2", "itself"},
		{"another process of the host", "127.0.0.1", "127.0.0.2", "knows no peer"},
		{"a peer's address, on an address that is not the daemon's", "127.0.0.3", "127.0.0.1", "no tailnet node of this server owns"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			proxytest.CheckRefused(t, send(tt.from, tt.to), proxytest.Forbidden, tt.word)
			up.CheckNone(t)
		})
	}
}

// With the option, connections of tailnet nodes are refused: at the same addresses, the
// daemon may know other peers.
func TestTailscaled_NodeConnectionIsRefused(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	s := proxytest.StartSite(t, up, "tailscale_impersonate {\ntailscaled /nowhere\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", proxytest.SilentNode(t))
	resp := s.Get(t, "/api", "Connection: close\r\n")
	proxytest.CheckRefused(t, resp, proxytest.Forbidden, "not accepted by a tailnet node of this site")
	up.CheckNone(t)
}
