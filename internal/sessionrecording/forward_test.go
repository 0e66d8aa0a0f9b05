// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/spdystream/spdy"
	portforward "k8s.io/apimachinery/pkg/util/portforward"
	"k8s.io/apimachinery/pkg/util/remotecommand"
)

// Ports and bytes are counted in SPDY, and in SPDY inside a WebSocket, however it is
// split into messages.
func TestForwarding_PortsAndBytes(t *testing.T) {
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
			// The API server ignores the ports in the query.
			f := &forwarding{query: url.Values{"ports": {"8080"}}}
			p, err := f.protocol(tt.upgrade, tt.version)
			if err != nil {
				t.Fatal(err)
			}
			if pass, err := (&filter{next: p.fromClient}).push([]byte(tt.client)); err != nil || len(pass) != len(tt.client) {
				t.Errorf("%d of %d bytes passed: %v", len(pass), len(tt.client), err)
			}
			if pass, err := (&filter{next: p.fromServer}).push([]byte(tt.server)); err != nil || len(pass) != len(tt.server) {
				t.Errorf("%d of %d bytes passed: %v", len(pass), len(tt.server), err)
			}
			if diff := cmp.Diff([]string{"80", "443"}, f.ports); diff != "" {
				t.Errorf("ports (-want +got):\n%s", diff)
			}
			if f.sent != 10 || f.received != 9 {
				t.Errorf("got %d bytes sent and %d received; want 10 and 9", f.sent, f.received)
			}
		})
	}
}

// A client may open any number of ports in one port-forward.
func TestForwarding_PortsAreBounded(t *testing.T) {
	f := new(forwarding)
	for i := range maxPorts + 1 {
		if _, err := f.streamOpened(http.Header{"Port": {strconv.Itoa(i)}}); err != nil {
			t.Fatal(err)
		}
	}
	if len(f.ports) != maxPorts+1 || f.ports[maxPorts] != "and more" {
		t.Errorf("got the ports %q; want %d and a note that there are more", f.ports, maxPorts)
	}
}

// Over a WebSocket without SPDY inside, only the query names the ports.
func TestForwarding_PortsOfQuery(t *testing.T) {
	for _, version := range []string{remotecommand.StreamProtocolV4Name, v4Base64Channels} {
		f := &forwarding{query: url.Values{"ports": {"80,443", "8080"}}}
		if _, err := f.protocol(websocketUpgrade, version); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{"80", "443", "8080"}, f.ports); diff != "" {
			t.Errorf("%s: ports (-want +got):\n%s", version, diff)
		}
	}
}

// What cannot be a port does not get into the log.
func TestForwarding_NotesOnlyPorts(t *testing.T) {
	var f forwarding
	for _, port := range []string{"80", strings.Repeat("8", 900_000), "65535", ""} {
		f.note(port)
	}
	if diff := cmp.Diff([]string{"80", "65535"}, f.noted()); diff != "" {
		t.Errorf("ports (-want +got):\n%s", diff)
	}
}
