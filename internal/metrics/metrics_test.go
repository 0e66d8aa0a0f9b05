// SPDX-License-Identifier: Apache-2.0

package metrics_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
)

// labels are all that a metric may be told apart by: nothing that names anybody.
var labels = []string{"outcome", "source", "reason", "result"}

// Caddy makes a new registry for every config, and several handlers share one.
func TestCountsOutliveConfigs(t *testing.T) {
	for config := 1; config <= 2; config++ {
		registry := prometheus.NewRegistry()
		metrics.Register(registry)
		metrics.Register(registry)
		metrics.Revocations.WithLabelValues("test").Inc()
		metrics.Decisions.WithLabelValues(metrics.Allowed, "test").Inc()
		metrics.Refusals.WithLabelValues("test").Inc()
		metrics.Recordings.WithLabelValues("test").Inc()
		metrics.Events.WithLabelValues("test").Inc()
		metrics.Questions.WithLabelValues(metrics.Known).Observe(1)
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		if len(families) != 7 {
			t.Errorf("got %d metrics; want 7", len(families))
		}
		for _, family := range families {
			if !strings.HasPrefix(family.GetName(), "caddy_tailscale_impersonate_") {
				t.Errorf("metric %s is not named as ours", family.GetName())
			}
			for _, m := range family.GetMetric() {
				test := false
				for _, label := range m.GetLabel() {
					if !slices.Contains(labels, label.GetName()) {
						t.Errorf("%s has the label %s; want only those of %v", family.GetName(), label.GetName(), labels)
					}
					test = test || label.GetValue() == "test"
				}
				if test && m.GetCounter().GetValue() != float64(config) {
					t.Errorf("in config %d %s is %v; want %d", config, family.GetName(), m.GetCounter().GetValue(), config)
				}
			}
		}
	}
}
