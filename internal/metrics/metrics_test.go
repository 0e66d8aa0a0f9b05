// SPDX-License-Identifier: Apache-2.0

package metrics_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	_ "github.com/tailscale-impersonate/caddy-tailscale-impersonate" // creates every metric of the process
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
)

type result string

var (
	counter   = metrics.NewCounter[result]("test_counted_total", "A test's.", "result", "yes", "no")
	vec       = metrics.NewCounterVec("test_vec_total", "A test's.", "result", "reason")
	histogram = metrics.NewHistogram[result](prometheus.HistogramOpts{Name: "test_duration_seconds", Help: "A test's.", Buckets: []float64{1}}, "result", "yes", "no")
)

// gather returns the metrics of registry as name{label values}.
func gather(t *testing.T, registry *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]float64)
	for _, family := range families {
		for _, m := range family.GetMetric() {
			var labels []string
			for _, label := range m.GetLabel() {
				labels = append(labels, label.GetValue())
			}
			value := m.GetCounter().GetValue()
			if h := m.GetHistogram(); h != nil {
				value = float64(h.GetSampleCount())
			}
			got[family.GetName()+"{"+strings.Join(labels, ",")+"}"] = value
		}
	}
	return got
}

// Caddy makes a new registry for every config, and several modules of a config use it.
func TestRegister_CountsSurviveReload(t *testing.T) {
	for config := 1; config <= 2; config++ {
		registry := prometheus.NewPedanticRegistry()
		metrics.Register(registry)
		metrics.Register(registry)
		counter.With("yes").Inc()
		vec.WithLabelValues("yes", "because").Inc()
		histogram.WithLabelValues("yes").Observe(1)
		got := gather(t, registry)
		for _, name := range []string{"test_counted_total{yes}", "test_vec_total{because,yes}", "test_duration_seconds{yes}"} {
			if value := got["caddy_tailscale_impersonate_"+name]; value != float64(config) {
				t.Errorf("config %d: %s is %v; want %d", config, name, value, config)
			}
		}
	}
}

// Prometheus cannot see the first increment of a series that did not exist before.
func TestNew_ReportsEveryValueFromTheStart(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	metrics.Register(registry)
	got := gather(t, registry)
	for _, name := range []string{"test_counted_total{no}", "test_duration_seconds{no}"} {
		if value, ok := got["caddy_tailscale_impersonate_"+name]; !ok || value != 0 {
			t.Errorf("%s: got %v (reported: %v); want 0", name, value, ok)
		}
	}
}

func TestRegister_FurtherCollectors(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	metrics.Register(registry, prometheus.NewGauge(prometheus.GaugeOpts{Name: "further", Help: "A test's."}))
	if got := gather(t, registry); len(got) < 2 {
		t.Errorf("got %v; want the further metric as well as the process's", got)
	} else if _, ok := got["further{}"]; !ok {
		t.Errorf("got %v; want further", got)
	}
}

// Labels have few values, and name no user, group or device.
func TestRegister_Labels(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	metrics.Register(registry)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	plugin := 0
	for _, family := range families {
		if strings.HasPrefix(family.GetName(), "caddy_tailscale_impersonate_test_") {
			continue
		}
		plugin++
		if !strings.HasPrefix(family.GetName(), "caddy_tailscale_impersonate_") {
			t.Errorf("metric %s does not have the plugin's prefix", family.GetName())
		}
		for _, m := range family.GetMetric() {
			for _, label := range m.GetLabel() {
				if allowed := []string{"outcome", "source", "reason", "result"}; !slices.Contains(allowed, label.GetName()) {
					t.Errorf("%s has the label %s; want one of %v", family.GetName(), label.GetName(), allowed)
				}
			}
		}
	}
	if plugin != 10 {
		t.Errorf("got %d metrics; want 10", plugin)
	}
}
