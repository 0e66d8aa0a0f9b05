// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

// agesIn returns the ages of tokens that registry reports, by cluster.
func agesIn(t *testing.T, registry *prometheus.Registry) map[string]time.Duration {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	ages := make(map[string]time.Duration)
	for _, family := range families {
		if family.GetName() != "caddy_tailscale_impersonate_upstream_token_age_seconds" {
			continue
		}
		for _, m := range family.GetMetric() {
			ages[m.GetLabel()[0].GetValue()] = time.Duration(m.GetGauge().GetValue() * float64(time.Second))
		}
	}
	return ages
}

// The age is that of the token in use, not of the last attempt to read its file: a token
// that can no longer be read grows older.
func TestTokenAges_TokenInUse(t *testing.T) {
	path := writeFile(t, "token", "first")
	written := func(ago time.Duration) {
		t.Helper()
		if err := os.Chtimes(path, time.Time{}, time.Now().Add(-ago)); err != nil {
			t.Fatal(err)
		}
	}
	written(time.Hour)
	s, tr, _ := withTokenFile(t, path)
	registry := prometheus.NewPedanticRegistry()
	if err := reportAge(registry, tr.cluster); err != nil {
		t.Fatal(err)
	}
	host := tr.cluster.base.Host
	if age, ok := agesIn(t, registry)[host]; ok {
		t.Errorf("before any request: got age %v; want none", age)
	}
	want := func(about time.Duration) {
		t.Helper()
		if age := agesIn(t, registry)[host]; age < about || age > about+time.Minute {
			t.Errorf("got age %v; want %v", age, about)
		}
	}
	checkToken(t, s, tr, "Bearer first")
	want(time.Hour)

	rewrite(t, path, "second")
	written(10 * time.Minute)
	expire(tr)
	checkToken(t, s, tr, "Bearer second")
	want(10 * time.Minute)

	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	expire(tr)
	if resp := roundTrip(t, tr, newRequest(s, "/api")); resp.StatusCode != http.StatusOK {
		t.Fatalf("answered %s", resp.Status)
	}
	want(10 * time.Minute)
}

// Two transports of one config for the same cluster make one series, and another config
// knows nothing of it.
func TestTokenAges_OldestOfOneConfig(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	host := s.Listener.Addr().String()
	newConfig := func(ages ...time.Duration) *prometheus.Registry {
		ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
		t.Cleanup(cancel)
		for _, age := range ages {
			path := writeFile(t, "token", "t")
			if err := os.Chtimes(path, time.Time{}, time.Now().Add(-age)); err != nil {
				t.Fatal(err)
			}
			tr := &Transport{Source: Source{Kubeconfig: trusting(s, map[string]any{"tokenFile": path}).write(t)}}
			if err := tr.Provision(ctx); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := tr.Cleanup(); err != nil {
					t.Error(err)
				}
			})
			checkToken(t, s, tr, "Bearer t")
		}
		return ctx.GetMetricsRegistry()
	}
	older, newer := newConfig(time.Hour, 2*time.Hour, time.Minute), newConfig(time.Minute)
	for registry, want := range map[*prometheus.Registry]time.Duration{older: 2 * time.Hour, newer: time.Minute} {
		ages := agesIn(t, registry)
		if age := ages[host]; len(ages) != 1 || age < want || age > want+time.Minute {
			t.Errorf("got ages %v; want %v for %s", ages, want, host)
		}
	}
}
