// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

func TestHTTP3_IsRefused(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	node, err := theLab.Caddy.Node(ctx, lab.ProxyName)
	if err != nil {
		t.Fatal(err)
	}
	nodeIP, _ := node.TailscaleIPs()
	port, err := strconv.ParseUint(portHTTP3, 10, 16)
	if err != nil {
		t.Fatal(err)
	}
	alice := theLab.Callers["alice"].Server
	aliceIP, _ := alice.TailscaleIPs()
	packets, err := alice.ListenPacket("udp4", netip.AddrPortFrom(aliceIP, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer packets.Close()
	over := &quic.Transport{Conn: packets}
	defer over.Close()
	ca, err := theLab.Caddy.CA()
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	client := &http3.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots},
		Dial: func(ctx context.Context, _ string, tlsConfig *tls.Config, config *quic.Config) (*quic.Conn, error) {
			return over.DialEarly(ctx, net.UDPAddrFromAddrPort(netip.AddrPortFrom(nodeIP, uint16(port))), tlsConfig, config)
		},
	}
	defer client.Close()

	plain.take()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+lab.ProxyName+"."+lab.Domain+":"+portHTTP3+"/api", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	wantNothing(t, plain.take(), resp.StatusCode, http.StatusMisdirectedRequest)
	if resp.ProtoMajor != 3 || !strings.Contains(string(body), "protocols h1 h2") {
		t.Errorf("over %s, the answer is %s; want HTTP/3 and advice", resp.Proto, body)
	}
	// The log says so when the config is loaded, and says it of no other listener.
	log, err := os.ReadFile(theLab.Log("caddy"))
	if err != nil {
		t.Fatal(err)
	}
	const warning = "a tailnet listener offers HTTP/3"
	if got, want := strings.Count(string(log), warning), strings.Count(string(log), `"listen":"tailscale/`+lab.ProxyName+":"+portHTTP3+`"`); got == 0 || got != want {
		t.Errorf("the log has %q %d times; want it only for the listener with HTTP/3, %d times", warning, got, want)
	}
	// As a control, the same site works over HTTP/2.
	if status := sendHTTP2(t, "alice", portHTTP3); status != http.StatusOK {
		t.Errorf("over HTTP/2, the answer is %d; want 200", status)
	}
}
