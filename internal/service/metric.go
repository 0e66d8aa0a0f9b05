// SPDX-License-Identifier: Apache-2.0

package service

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
)

// Metric reports how many ports of services this Caddy hosts, and how many it is configured
// to host and does not.
var Metric prometheus.Collector = metric{}

type metric struct{}

var services = prometheus.NewDesc(
	prometheus.BuildFQName(metrics.Namespace, metrics.Subsystem, "services"),
	"How many ports of Tailscale Services sites bind, by whether they are hosted.",
	[]string{"result"}, nil)

// Describe implements [prometheus.Collector].
func (metric) Describe(to chan<- *prometheus.Desc) { to <- services }

// Collect implements [prometheus.Collector].
func (metric) Collect(to chan<- prometheus.Metric) {
	count := map[string]float64{"hosted": 0, "not_hosted": 0}
	shared.Range(func(_, value any) bool {
		if _, addrs := value.(*hosting).Service(); len(addrs) > 0 {
			count["hosted"]++
		} else {
			count["not_hosted"]++
		}
		return true
	})
	for result, n := range count {
		to <- prometheus.MustNewConstMetric(services, prometheus.GaugeValue, n, result)
	}
}
