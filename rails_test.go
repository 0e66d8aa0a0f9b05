// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// What a policy file grants beyond the rails does not arrive, and the log says so.
func TestGroupsBeyondTheRailsAreCutAndLogged(t *testing.T) {
	core, logs := observer.New(zapcore.WarnLevel)
	cfg := caddyfile.Config{Rails: impersonate.Limits{DenyGroups: []string{"system:*"}, UserPrefix: "tailnet:", GroupPrefix: "tailnet:"}}
	h := newHandler(t, cfg, newNode(whoIs(`{"impersonate":{"groups":["system:masters","readers"]}}`), nil))
	h.logger = zap.New(core)
	_, got := serve(t, h, newRequest("GET", "https://k8s/api"))
	if got == nil {
		t.Fatal("refused")
	}
	want := http.Header{"Impersonate-User": {"tailnet:alice@example.com"}, "Impersonate-Group": {"tailnet:readers"}}
	if diff := cmp.Diff(want, protected(got.Header)); diff != "" {
		t.Errorf("headers differ (-want +got):\n%s", diff)
	}
	entries := logs.FilterFieldKey("groups").All()
	if len(entries) != 1 || entries[0].ContextMap()["peer"] != "alice@example.com" || !strings.Contains(entries[0].Message, "left out") {
		t.Errorf("got log entries %v; want one that names the peer and the groups", logs.All())
	}
}

func TestWhoeverTheRailsLeaveNothingIsRefused(t *testing.T) {
	for name, rails := range map[string]impersonate.Limits{
		"require_groups": {RequireGroups: true, DenyGroups: []string{"*"}},
		"user_prefix":    {UserPrefix: "sys"},
	} {
		t.Run(name, func(t *testing.T) {
			who := whoIs(readers)
			who.UserProfile.LoginName = "tem:admin"
			resp, got := serve(t, newHandler(t, caddyfile.Config{Rails: rails}, newNode(who, nil)), newRequest("GET", "https://k8s/api"))
			if got != nil {
				t.Error("the next handler was called")
			}
			checkRefused(t, resp, forbidden, "tem:admin", name)
		})
	}
}

// A recheck that cannot tell says so, and one that finds nobody forbids: the two end
// open requests late and at once.
func TestARecheckThatFindsNobodyIsAnError(t *testing.T) {
	elsewhere := aliceNode()
	elsewhere.Addrs = func() (ip4, ip6 netip.Addr) { return netip.MustParseAddr("100.64.0.9"), netip.Addr{} }
	offline := aliceNode()
	offline.Addrs = func() (ip4, ip6 netip.Addr) { return }
	for _, tt := range []struct {
		name  string
		node  *tailnet.Node
		final bool
	}{
		{"the node has another address by now", elsewhere, true},
		{"the node is not connected", offline, false},
		{"the peer is gone", newNode(nil, tailnet.ErrPeerNotFound), true},
		{"the node does not answer", newNode(nil, errors.New("no LocalAPI")), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHandler(t, caddyfile.Config{}, tt.node)
			id, err := h.recheck(t.Context(), netip.MustParseAddr(aliceAddr), netip.MustParseAddr(nodeAddr), time.Now())
			if id != nil || err == nil || apierrors.IsForbidden(err) != tt.final {
				t.Errorf("got %+v and error %v; want an error, forbidden: %v", id, err, tt.final)
			}
		})
	}
}

// A request that has ended costs no further question.
func TestARequestThatHasEndedIsNotRechecked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node := newChanging()
		h := newHandler(t, caddyfile.Config{}, node.Node)
		wantUser(t, h, over()(), "alice@example.com")
		time.Sleep(3 * h.Interval())
		node.mu.Lock()
		defer node.mu.Unlock()
		if node.asked != 1 {
			t.Errorf("the node was asked %d times; want once", node.asked)
		}
	})
}

// A recheck that is answered from before would find a grant that is gone.
func TestARecheckAsksAnew(t *testing.T) {
	hour := caddy.Duration(time.Hour)
	node := newChanging()
	h := newHandler(t, caddyfile.Config{CacheTTL: &hour}, node.Node)
	recheck := func() []string {
		t.Helper()
		id, err := h.recheck(context.Background(), netip.MustParseAddr(aliceAddr), netip.MustParseAddr(nodeAddr), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		return id.Groups
	}
	if diff := cmp.Diff([]string{"tailnet-readers"}, recheck()); diff != "" {
		t.Errorf("groups (-want +got):\n%s", diff)
	}
	node.says(whoIs(), nil)
	if diff := cmp.Diff([]string(nil), recheck()); diff != "" {
		t.Errorf("groups after the grant was withdrawn (-want +got):\n%s", diff)
	}
}
