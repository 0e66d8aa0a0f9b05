// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// A tailnet may give the address of a device that left to another one.
func TestCache_ReassignedAddressIsAskedAnew(t *testing.T) {
	hour := caddy.Duration(time.Hour)
	node := proxytest.NewChangingNode()
	h := newHandler(t, caddyfile.Config{CacheTTL: &hour}, node.Node)
	proxytest.CheckUser(t, h, proxytest.NewConn()(), "alice@example.com")
	node.Says(proxytest.WhoIsMallory(), nil)
	proxytest.CheckUser(t, h, proxytest.NewConn()(), "mallory@example.com")
	node.Says(nil, tailnet.ErrPeerNotFound)
	proxytest.CheckUser(t, h, proxytest.NewConn()(), "")
}

func TestCache_ConnectionSharesAnswerForTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node := proxytest.NewChangingNode()
		h := newHandler(t, caddyfile.Config{}, node.Node)
		request := proxytest.NewConn()
		for range 3 {
			proxytest.CheckUser(t, h, request(), "alice@example.com")
		}
		if node.Asked() != 1 {
			t.Errorf("three requests asked %d times; want once", node.Asked())
		}
		node.Says(proxytest.WhoIsMallory(), nil)
		time.Sleep(h.TTL() - time.Nanosecond)
		proxytest.CheckUser(t, h, request(), "alice@example.com")
		time.Sleep(time.Nanosecond)
		proxytest.CheckUser(t, h, request(), "mallory@example.com")
		node.Says(nil, errors.New("no answer"))
		time.Sleep(h.TTL())
		proxytest.CheckUser(t, h, request(), "")
	})
}

func TestCache_DisabledAsksForEachRequest(t *testing.T) {
	var none caddy.Duration
	node := proxytest.NewChangingNode()
	h := newHandler(t, caddyfile.Config{CacheTTL: &none}, node.Node)
	request := proxytest.NewConn()
	proxytest.CheckUser(t, h, request(), "alice@example.com")
	node.Says(proxytest.WhoIsMallory(), nil)
	proxytest.CheckUser(t, h, request(), "mallory@example.com")
}

// Handlers with other options decide separately about requests on the same connection.
func TestCache_HandlersOnOneConnectionDecideSeparately(t *testing.T) {
	node := proxytest.NewChangingNode()
	who := proxytest.WhoIs(proxytest.Readers)
	who.CapMap["example.com/cap/staging"] = []tailcfg.RawMessage{`{"impersonate":{"groups":["staging"]}}`}
	node.Says(who, nil)
	production := newHandler(t, caddyfile.Config{}, node.Node)
	staging := newHandler(t, caddyfile.Config{Capability: "example.com/cap/staging"}, node.Node)
	request := proxytest.NewConn()
	for range 2 {
		for h, group := range map[*Handler]string{production: "tailnet-readers", staging: "staging"} {
			_, got := proxytest.Serve(t, h, request())
			if got == nil || !slices.Equal(got.Header["Impersonate-Group"], []string{group}) {
				t.Errorf("passed on in the wrong groups; want %s: %+v", group, got)
			}
		}
	}
}
