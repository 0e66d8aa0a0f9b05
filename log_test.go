// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// One line says who sent what, and its request ID: for refusals always, for other
// requests at debug level.
func TestLog_Decisions(t *testing.T) {
	const id = "7d5e2b6c-0000-4000-8000-000000000000"
	alice := map[string]any{
		"node": "laptop.example.ts.net", "user": "alice@example.com", "groups": []any{"tailnet-readers"}, "source": "grants",
		"remote_addr": "192.0.2.1:1234", "method": "GET", "uri": "https://k8s/api", "request_id": id,
	}
	for _, tt := range []struct {
		name    string
		level   zapcore.Level
		cfg     caddyfile.Config
		headers []string
		message string
		want    map[string]any
	}{
		{"allowed, at debug", zapcore.DebugLevel, caddyfile.Config{}, nil, "request allowed", alice},
		{"allowed, at info", zapcore.InfoLevel, caddyfile.Config{}, nil, "", nil},
		{
			"refused with an identity", zapcore.WarnLevel, caddyfile.Config{}, []string{"Impersonate-User", "bob"}, "request refused",
			map[string]any{"code": "impersonation", "status": int32(403), "host": "k8s"},
		},
		{
			"refused without an identity", zapcore.WarnLevel, caddyfile.Config{Limits: impersonate.Limits{AllowGroups: []string{"x"}, RequireGroups: true}}, nil, "request refused",
			map[string]any{"code": "guard", "status": int32(403), "host": "k8s", "groups": nil, "source": nil},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			core, logs := observer.New(tt.level)
			h := newLoggingHandler(t, tt.cfg, zap.New(core), proxytest.AliceNode())
			r := proxytest.NewRequest("GET", "https://k8s/api", tt.headers...)
			r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer).Set("http.request.uuid", id)
			proxytest.Serve(t, h, r)
			entries := logs.FilterMessage(tt.message).All()
			if tt.message == "" {
				if logs.Len() > 0 {
					t.Errorf("logged %v; want nothing", logs.All())
				}
				return
			}
			if len(entries) != 1 {
				t.Fatalf("got %d lines %q in %v; want 1", len(entries), tt.message, logs.All())
			}
			want := make(map[string]any)
			for _, fields := range []map[string]any{alice, tt.want} {
				for name, value := range fields {
					if want[name] = value; value == nil {
						delete(want, name)
					}
				}
			}
			got := entries[0].ContextMap()
			delete(got, "reason")
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("fields (-want +got):\n%s", diff)
			}
		})
	}
}

// A refusal is logged with its reason and the request.
func TestLog_Refusal(t *testing.T) {
	core, logs := observer.New(zapcore.WarnLevel)
	h := newLoggingHandler(t, caddyfile.Config{}, zap.New(core), proxytest.NewNode(nil, tailnet.ErrPeerNotFound))
	r := proxytest.NewRequest("GET", "http://k8s/api?x=y")
	r.RemoteAddr = proxytest.AliceAddr + ":40000"
	proxytest.Serve(t, h, r)
	if logs.Len() != 1 {
		t.Fatalf("got %d log entries; want 1", logs.Len())
	}
	got := logs.All()[0].ContextMap()
	if reason, _ := got["reason"].(string); !strings.Contains(reason, proxytest.AliceAddr) {
		t.Errorf("the reason %q does not name the peer", reason)
	}
	delete(got, "reason")
	want := map[string]any{"code": "unknown_peer", "request_id": "", "status": int32(403), "remote_addr": proxytest.AliceAddr + ":40000", "method": "GET", "host": "k8s", "uri": "http://k8s/api?x=y"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("log entry differs (-want +got):\n%s", diff)
	}
}
