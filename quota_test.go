// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// heldBytes returns the metric held_bytes of the running Caddy.
func heldBytes(t *testing.T) float64 {
	t.Helper()
	config := caddy.ActiveContext()
	families, err := config.GetMetricsRegistry().Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() == "caddy_tailscale_impersonate_held_bytes" {
			return family.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatal("there is no metric held_bytes")
	return 0
}

// What is counted and never given back would shut out a caller after some days.
func TestQuota_NothingStaysCounted(t *testing.T) {
	up := proxytest.NewPods(t)
	s := proxytest.Config{API: up, Body: proxytest.ToKubernetes, Nodes: []*tailnet.Node{proxytest.AliceNode()}, TLS: true, Server: "max_header_size 1MiB"}.Start(t)
	before := heldBytes(t)
	sh := proxytest.MustOpen(t, proxytest.OpenWebSocket, s)
	sh.Hear(t, "hello ")
	withSession := heldBytes(t)
	if withSession <= before {
		t.Error("an open session does not count")
	}
	fields := [][2]string{{":method", "GET"}, {":scheme", "https"}, {":authority", "k8s"}, {":path", "/api"}}
	if got := s.HTTP2(t, fields); got != "200" {
		t.Errorf("answered with %s", got)
	}
	for range 300 {
		fields = append(fields, [2]string{"age", ""})
	}
	if got := s.HTTP2(t, fields); got != "431" {
		t.Errorf("300 header fields were answered with %s; want 431", got)
	}
	for range 3000 {
		fields = append(fields, [2]string{"age", ""})
	}
	if got := s.HTTP2(t, fields); got != "reset" {
		t.Errorf("3,300 header fields were answered with %s; want a closed connection", got)
	}
	conn := s.Dial(t, proxytest.AliceAddr, "http/1.1")
	if resp := proxytest.Exchange(t, conn, "GET /api HTTP/1.1\r\nHost: k8s\r\n\r\n"); resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(resp.Body)
		t.Errorf("answered with %s: %s", resp.Status, body)
	}
	const connection = 256 << 10
	waitForHeld(t, withSession+connection)
	_ = conn.Close()
	sh.Leave()
	waitForHeld(t, before)
}

// A frame of a recorded session is held until its end has arrived.
func TestQuota_UnfinishedFramesCount(t *testing.T) {
	up := proxytest.NewPods(t)
	s := proxytest.Config{
		API: up, Nodes: []*tailnet.Node{proxytest.AliceNode()}, TLS: true,
		Body: "tailscale_impersonate {\nrecord " + t.TempDir() + "\n}\nreverse_proxy https://$UPSTREAM {\n$KUBERNETES\n}",
	}.Start(t)
	before := heldBytes(t)
	sh := proxytest.MustOpenWebSocket(t, s)
	sh.Hear(t, "hello ")
	withSession := heldBytes(t)
	const size = 600 << 10
	frame := make([]byte, 14+size)
	frame[0], frame[1] = 0x82, 0x80|127 // binary, and masked with zeros
	binary.BigEndian.PutUint64(frame[2:], size)
	sh.Send(t, frame[:len(frame)-1])
	for deadline := time.Now().Add(15 * time.Second); heldBytes(t) < withSession+size/2; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%.0f bytes are counted with a frame of %d bytes, and %.0f without", heldBytes(t), size, withSession)
		}
	}
	sh.Leave()
	waitForHeld(t, before)
}

// What a client does not read of a session waits in the network stack of the node.
func TestQuota_UnreadSessionsCount(t *testing.T) {
	up := proxytest.NewTunnel(t, func(conn net.Conn) {
		defer conn.Close()
		if _, err := io.WriteString(conn, proxytest.SwitchedToV5); err != nil {
			t.Error(err)
		}
		message := proxytest.PodMessage("\x01" + strings.Repeat("y\n", 16<<10))
		for err := error(nil); err == nil; {
			_, err = conn.Write(message)
		}
	})
	for _, options := range []string{"", "record " + t.TempDir()} {
		s := proxytest.Config{
			API: up, TLS: true, Nodes: []*tailnet.Node{proxytest.AliceNode()},
			Body: "tailscale_impersonate {\n" + options + "\n}\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}",
		}.Start(t)
		before := heldBytes(t)
		conn := s.Dial(t, proxytest.AliceAddr, "http/1.1")
		if resp := proxytest.Exchange(t, conn, proxytest.UpgradeRequest("GET", proxytest.ExecTarget, "websocket", proxytest.WebSocketV5)); resp.StatusCode != http.StatusSwitchingProtocols {
			t.Fatalf("%s: got %s; want an upgrade", options, resp.Status)
		}
		const unread = 2 << 20
		for deadline := time.Now().Add(20 * time.Second); heldBytes(t) < before+unread; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: %.0f bytes more are counted while the client reads nothing; want more than %d", options, heldBytes(t)-before, unread)
			}
		}
		_ = conn.Close()
		waitForHeld(t, before)
	}
}

// waitForHeld waits until the metric held_bytes is want.
func waitForHeld(t *testing.T, want float64) {
	t.Helper()
	for deadline := time.Now().Add(15 * time.Second); heldBytes(t) != want; {
		if time.Now().After(deadline) {
			t.Fatalf("%.0f bytes are counted; want %.0f", heldBytes(t), want)
		}
		time.Sleep(10 * time.Millisecond) // between two looks
	}
}
