// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
)

// tokenAges reports to Prometheus how old the tokens are that the transports of
// this process use. One that nobody renews any more gets older than others do, long
// before it expires.
var tokenAges = &ages{clusters: make(map[*cluster]bool)}

type ages struct {
	mu       sync.Mutex
	clusters map[*cluster]bool
}

func (a *ages) add(c *cluster) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.clusters[c] = true
}

func (a *ages) remove(c *cluster) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.clusters, c)
}

var tokenAge = prometheus.NewDesc(
	prometheus.BuildFQName(metrics.Namespace, metrics.Subsystem, "upstream_token_age_seconds"),
	"Time since the bearer token that is in use for a cluster was written to its file, by the cluster's address.",
	[]string{"cluster"}, nil)

// Describe implements prometheus.Collector.
func (a *ages) Describe(to chan<- *prometheus.Desc) { to <- tokenAge }

// Collect implements prometheus.Collector. Of several tokens for one cluster, as
// there are while Caddy replaces a config, the oldest counts.
func (a *ages) Collect(to chan<- prometheus.Metric) {
	oldest := make(map[string]time.Time)
	a.mu.Lock()
	for c := range a.clusters {
		written := c.token.lastWritten()
		if before, ok := oldest[c.base.Host]; !written.IsZero() && (!ok || written.Before(before)) {
			oldest[c.base.Host] = written
		}
	}
	a.mu.Unlock()
	for host, written := range oldest {
		to <- prometheus.MustNewConstMetric(tokenAge, prometheus.GaugeValue, time.Since(written).Seconds(), host)
	}
}

// lastWritten returns when the last good token was written, zero if there has been
// none.
func (f *tokenFile) lastWritten() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.written
}
