// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// Caddy makes a new registry for every config, and several handlers share one.
func TestRevocationsAreCountedAcrossConfigs(t *testing.T) {
	const reason = "test"
	for config := 1; config <= 2; config++ {
		registry := prometheus.NewRegistry()
		registerMetrics(registry)
		registerMetrics(registry)
		revocations.WithLabelValues(reason).Inc()
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, family := range families {
			// What other tests have counted is there as well.
			if family.GetName() != "caddy_tailscale_impersonate_revoked_requests_total" {
				continue
			}
			found = true
			for _, m := range family.GetMetric() {
				if label := m.GetLabel(); len(label) != 1 || label[0].GetName() != "reason" {
					t.Errorf("got labels %v; want only the reason: a metric names nobody", label)
				} else if label[0].GetValue() == reason && m.GetCounter().GetValue() != float64(config) {
					t.Errorf("in config %d got %v; want %d", config, m.GetCounter().GetValue(), config)
				}
			}
		}
		if !found {
			t.Fatalf("got metrics %v; want the revoked requests", families)
		}
	}
}
