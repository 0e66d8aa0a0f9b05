// SPDX-License-Identifier: Apache-2.0

package testcontrol

import (
	"net/http/httptest"
	"strings"
	"testing"

	"tailscale.com/tailcfg"
	tailscalecontrol "tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/logger"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/derptest"
)

// A node of tsnet dials an address of which it knows no peer over the network of its host.
// UDP shows that without anything that answers there.
func TestDial_NotOverTheHost(t *testing.T) {
	t.Setenv("TS_NO_LOGS_NO_SUPPORT", "true")
	control := &tailscalecontrol.Server{
		DERPMap: derptest.Start(t), DNSConfig: &tailcfg.DNSConfig{Proxied: true}, MagicDNSDomain: domain, Logf: logger.Discard,
	}
	control.HTTPTestServer = httptest.NewServer(control)
	t.Cleanup(control.HTTPTestServer.Close)
	server := join(t, control.HTTPTestServer.URL, "k8s")
	if _, err := server.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	const address = "100.100.9.9:53"
	overHost, err := server.Dial(t.Context(), "udp", address)
	if err != nil {
		t.Skipf("tsnet does not dial %s, so there is nothing to keep it from: %v", address, err)
	}
	_ = overHost.Close()
	c, err := tailnet.FromServer(server).Dial(t.Context(), "udp", address)
	if err == nil {
		_ = c.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "is no peer of the node") {
		t.Errorf("got error %v; want that the address is no peer", err)
	}
}
