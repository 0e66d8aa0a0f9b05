// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"github.com/prometheus/client_golang/prometheus"
)

// revocations belongs to the process: Caddy makes a new registry for every config,
// and requests that were ended must not be forgotten with the old one.
var revocations = prometheus.NewCounterVec(prometheus.CounterOpts{
	Namespace: "caddy",
	Subsystem: "tailscale_impersonate",
	Name:      "revoked_requests_total",
	Help:      "Open requests that were ended because their caller lost access, by reason.",
}, []string{"reason"})

// recordings belongs to the process as well, as sessions outlive their config.
var recordings = prometheus.NewCounterVec(prometheus.CounterOpts{
	Namespace: "caddy",
	Subsystem: "tailscale_impersonate",
	Name:      "recordings_total",
	Help:      "Sessions that were to be recorded, by what has become of that.",
}, []string{"outcome"})

// apiEvents belongs to the process, as the others do.
var apiEvents = prometheus.NewCounterVec(prometheus.CounterOpts{
	Namespace: "caddy",
	Subsystem: "tailscale_impersonate",
	Name:      "events_total",
	Help:      "Requests that were to be sent to a recorder as events, by what has become of that.",
}, []string{"outcome"})

// registerMetrics has registry report what is counted.
func registerMetrics(registry *prometheus.Registry) {
	for _, counted := range []prometheus.Collector{revocations, recordings, apiEvents} {
		// That it is registered already, by another handler of the config, is
		// the only error there can be.
		_ = registry.Register(counted)
	}
}
