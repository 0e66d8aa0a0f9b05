// SPDX-License-Identifier: Apache-2.0

// Package derptest runs a DERP relay for a test.
package derptest

import (
	"net"
	"net/http/httptest"
	"testing"

	"tailscale.com/derp/derpserver"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

// Start starts a DERP relay, through which nodes find each other, and returns its map. The
// relay stops with the test.
func Start(t testing.TB) *tailcfg.DERPMap {
	t.Helper()
	derp := derpserver.New(key.NewNode(), logger.Discard)
	server := httptest.NewUnstartedServer(derpserver.Handler(derp))
	server.Config.ErrorLog = logger.StdLogger(logger.Discard)
	server.StartTLS()
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
		_ = derp.Close()
	})
	return &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: {RegionID: 1, RegionCode: "lab", Nodes: []*tailcfg.DERPNode{{
		Name: "1", RegionID: 1, HostName: "127.0.0.1", IPv4: "127.0.0.1", IPv6: "none",
		DERPPort: server.Listener.Addr().(*net.TCPAddr).Port, STUNPort: -1, InsecureForTests: true,
	}}}}}
}
