// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

func TestListener_MixedServerAcceptsOnlyTailnet(t *testing.T) {
	plain.take()
	if resp := send(t, "bob", portMixed, get("/api")); resp.StatusCode != http.StatusOK {
		t.Errorf("over the tailnet: %s %s; want 200", resp.Status, resp.body)
	}
	wantOnlyBob(t, plain.take(), "")

	conn, err := net.Dial("tcp", "127.0.0.1:"+portMixed)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, get("/api", "X-Forwarded-For: 100.64.0.2", "Forwarded: for=100.64.0.2")); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	wantNothing(t, plain.take(), resp.StatusCode, http.StatusForbidden)
	if !strings.Contains(string(body), "was not accepted by a tailnet node") {
		t.Errorf("the answer is %s; want it to give the reason", body)
	}
}

func TestListener_TwoNodesAskTheOneThatAccepted(t *testing.T) {
	second, err := theLab.Caddy.Node(t.Context(), secondNode)
	if err != nil {
		t.Fatal(err)
	}
	ip4, _ := second.TailscaleIPs()
	bob := theLab.Callers["bob"].Server
	for _, tt := range []struct{ node, address, group string }{
		{lab.ProxyName, lab.ProxyName + ":" + portTwoNodes, "tailnet-readers"},
		{secondNode, ip4.String() + ":" + portTwoNodes, "second-readers"},
	} {
		t.Run(tt.node, func(t *testing.T) {
			plain.take()
			resp := sendTo(t, bob, tt.address, get("/api", "Host: "+tt.address))
			requests := plain.take()
			if len(requests) != 1 {
				t.Fatalf("%d requests arrived (%s %s); want 1", len(requests), resp.Status, resp.body)
			}
			if got := requests[0].Header["Impersonate-Group"]; !slices.Equal(got, []string{tt.group}) {
				t.Errorf("groups %q arrived; want %q, which bob is granted by %s", got, tt.group, tt.node)
			}
		})
	}
}

// The node of the other tailnet has the address of one of our two nodes. Which one
// depends on the order in which they joined.
func TestListener_TwoNodesWithSameAddressAreRefused(t *testing.T) {
	address := func(node string) netip.Addr {
		server, err := theLab.Caddy.Node(t.Context(), node)
		if err != nil {
			t.Fatal(err)
		}
		ip4, _ := server.TailscaleIPs()
		return ip4
	}
	foreign := address(foreignNode)
	refused := 0
	for _, node := range []string{lab.ProxyName, secondNode} {
		plain.take()
		own := address(node)
		resp := sendTo(t, theLab.Callers["alice"].Server, own.String()+":"+portSameAddress, get("/api", "Host: "+own.String()))
		if own != foreign {
			if requests := plain.take(); resp.StatusCode != http.StatusOK || len(requests) != 1 {
				t.Errorf("at the address that only node %s has: %s %s; want 200", node, resp.Status, resp.body)
			}
			continue
		}
		refused++
		wantNothing(t, plain.take(), resp.StatusCode, http.StatusForbidden)
		for _, want := range []string{node, foreignNode, own.String()} {
			if !strings.Contains(resp.body, want) {
				t.Errorf("the answer is %s; want it to name %s", resp.body, want)
			}
		}
	}
	if refused != 1 {
		t.Errorf("%d of our nodes have the other tailnet's address %v; want 1", refused, foreign)
	}
}

func TestListener_PROXYProtocolCannotChangeAddress(t *testing.T) {
	alice, _ := theLab.Callers["alice"].Server.TailscaleIPs()
	for _, tt := range []struct{ name, header string }{
		{"with a header", "PROXY TCP4 " + alice.String() + " 100.64.0.1 40000 80\r\n"},
		{"without one", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			plain.take()
			log := tail(t, theLab.Log("caddy"))
			resp := send(t, "dave", portProxyProtocol, tt.header+get("/api"))
			wantNothing(t, plain.take(), resp.StatusCode, http.StatusForbidden)
			if lines := strings.Join(log.lines(t), "\n"); !strings.Contains(lines, "proxyproto") {
				t.Errorf("the log is %s; want it to name the wrapper", lines)
			}
		})
	}
}

func TestListener_ProxysOwnNodeIsRefused(t *testing.T) {
	node, err := theLab.Caddy.Node(t.Context(), lab.ProxyName)
	if err != nil {
		t.Fatal(err)
	}
	ip4, _ := node.TailscaleIPs()
	plain.take()
	resp := sendTo(t, node, ip4.String()+":"+portHTTPTransport, get("/api"))
	wantNothing(t, plain.take(), resp.StatusCode, http.StatusForbidden)
	if !strings.Contains(resp.body, "itself") {
		t.Errorf("the answer is %s; want it to say that the node is not a caller", resp.body)
	}
}
