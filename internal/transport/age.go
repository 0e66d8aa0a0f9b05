// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
)

// tokenAges reports the ages of the tokens that the transports of one config use. A
// token that is no longer renewed grows older than others do, long before it expires.
type tokenAges struct {
	mu       sync.Mutex
	clusters []*cluster
}

var tokenAge = prometheus.NewDesc(
	prometheus.BuildFQName(metrics.Namespace, metrics.Subsystem, "upstream_token_age_seconds"),
	"Time since the bearer token that is in use for a cluster was written to its file, by the cluster's address.",
	[]string{"cluster"}, nil)

// reportAge makes registry, which belongs to one config, report the age of c's token.
func reportAge(registry *prometheus.Registry, c *cluster) error {
	ages := new(tokenAges)
	if err := registry.Register(ages); err != nil {
		// Another transport of the config has registered its collector.
		var registered prometheus.AlreadyRegisteredError
		if !errors.As(err, &registered) {
			return fmt.Errorf("registering the metric of token ages: %w", err)
		}
		existing, ok := registered.ExistingCollector.(*tokenAges)
		if !ok {
			return fmt.Errorf("[unexpected] registering the metric of token ages: %w", err)
		}
		ages = existing
	}
	ages.mu.Lock()
	defer ages.mu.Unlock()
	ages.clusters = append(ages.clusters, c)
	return nil
}

// Describe implements [prometheus.Collector].
func (a *tokenAges) Describe(to chan<- *prometheus.Desc) { to <- tokenAge }

// Collect implements [prometheus.Collector]. If a config uses several tokens for one
// cluster, it reports the age of the oldest.
func (a *tokenAges) Collect(to chan<- prometheus.Metric) {
	oldest := make(map[string]time.Time)
	a.mu.Lock()
	for _, c := range a.clusters {
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
