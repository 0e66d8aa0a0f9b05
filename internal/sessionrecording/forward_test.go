// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"net/http"
	"net/url"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/spdystream/spdy"
	portforward "k8s.io/apimachinery/pkg/util/portforward"
	"k8s.io/apimachinery/pkg/util/remotecommand"
)

// A port-forward's ports and bytes are found, in SPDY and in SPDY inside of a
// WebSocket, however that is cut.
func TestForwardedPortsAndBytes(t *testing.T) {
	port := func(id spdy.StreamId, what, port string) spdy.Frame {
		return &spdy.SynStreamFrame{StreamId: id, Headers: http.Header{"streamtype": {what}, "port": {port}, "requestid": {"0"}}}
	}
	client := spdyControl(t, port(1, "error", "80"), port(3, "data", "80"), port(5, "error", "443"), port(7, "data", "443"), port(9, "data", "80")) +
		spdyFrame(3, "GET /") + spdyFrame(7, "hello")
	server := spdyFrame(3, "200 OK") + spdyFrame(7, "") + spdyFrame(9, "abc")
	tunnelled := func(s string, size int, fromClient bool) string {
		out := ""
		for _, piece := range pieces(s, func() int { return size }) {
			out += ws(0x80|opBinary, fromClient, piece)
		}
		return out
	}
	for _, tt := range []struct{ name, upgrade, version, client, server string }{
		{"SPDY", spdyUpgrade, portforward.PortForwardV1Name, client, server},
		{"tunnel", websocketUpgrade, portforward.WebsocketsSPDYTunnelingPortForwardV1, tunnelled(client, 1<<20, true), tunnelled(server, 1<<20, false)},
		{"tunnel in pieces", websocketUpgrade, portforward.WebsocketsSPDYTunnelingPortForwardV1, tunnelled(client, 3, true), tunnelled(server, 5, false)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			// What the query says about ports does not count.
			s := &Session{kind: forward, upgrade: tt.upgrade, query: url.Values{"ports": {"8080"}}}
			p, err := s.forwardProtocol(tt.version)
			if err != nil {
				t.Fatal(err)
			}
			if pass, err := (&filter{next: p.fromClient}).push([]byte(tt.client)); err != nil || len(pass) != len(tt.client) {
				t.Errorf("%d of %d bytes passed: %v", len(pass), len(tt.client), err)
			}
			if pass, err := (&filter{next: p.fromServer}).push([]byte(tt.server)); err != nil || len(pass) != len(tt.server) {
				t.Errorf("%d of %d bytes passed: %v", len(pass), len(tt.server), err)
			}
			if diff := cmp.Diff([]string{"80", "443"}, s.ports); diff != "" {
				t.Errorf("ports (-want +got):\n%s", diff)
			}
			if s.sent != 10 || s.received != 9 {
				t.Errorf("got %d bytes sent and %d received; want 10 and 9", s.sent, s.received)
			}
		})
	}
}

// Of a port-forward that has no end, neither have its ports, and each is a line in
// the log and a piece of memory.
func TestOnlySoManyPortsAreNoted(t *testing.T) {
	s := new(Session)
	for i := range maxPorts + 1 {
		if _, err := (*forwarded)(s).opened(http.Header{"Port": {strconv.Itoa(i)}}); err != nil {
			t.Fatal(err)
		}
	}
	if len(s.ports) != maxPorts+1 || s.ports[maxPorts] != "and more" {
		t.Errorf("got the ports %q; want %d and that there are more", s.ports, maxPorts)
	}
}

// Over a WebSocket without SPDY in it, the query says which ports, and nothing else.
func TestPortsOfTheQuery(t *testing.T) {
	for _, version := range []string{remotecommand.StreamProtocolV4Name, v4Base64Channels} {
		s := &Session{kind: forward, upgrade: websocketUpgrade, query: url.Values{"ports": {"80,443", "8080"}}}
		if _, err := s.forwardProtocol(version); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{"80", "443", "8080"}, s.ports); diff != "" {
			t.Errorf("%s: ports (-want +got):\n%s", version, diff)
		}
	}
}
