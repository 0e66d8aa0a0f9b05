// SPDX-License-Identifier: Apache-2.0

// Package metrics creates the plugin's Prometheus metrics and registers them with each
// Caddy config.
//
// Each package owns the metrics of what it does. They belong to the process: Caddy
// makes a new registry for every config, and counts must survive a reload. Label
// values come from lists in the code, never from users, groups or devices: those
// are unbounded, and do not belong in a monitoring system.
package metrics

import "github.com/prometheus/client_golang/prometheus"

// The prefix of every metric's name is both, joined by an underscore.
const (
	Namespace = "caddy"
	Subsystem = "tailscale_impersonate"
)

// process holds the metrics that packages created during initialization. Nothing changes
// it after that.
var process []prometheus.Collector

// Counter counts events by one label, whose values have type V.
type Counter[V ~string] struct{ vec *prometheus.CounterVec }

// NewCounter returns a counter with one label. Each of values is reported as 0 from the
// start: Prometheus cannot see the first increment of a series that did not exist
// before. Call it only to initialize a package variable.
func NewCounter[V ~string](name, help, label string, values ...V) Counter[V] {
	c := Counter[V]{prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: Namespace, Subsystem: Subsystem, Name: name, Help: help,
	}, []string{label})}
	for _, value := range values {
		c.With(value)
	}
	process = append(process, c.vec)
	return c
}

// With returns the counter of one label value.
func (c Counter[V]) With(value V) prometheus.Counter { return c.vec.WithLabelValues(string(value)) }

// NewCounterVec returns a counter with several labels. Call it only to initialize a
// package variable.
func NewCounterVec(name, help string, labels ...string) *prometheus.CounterVec {
	vec := prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: Namespace, Subsystem: Subsystem, Name: name, Help: help,
	}, labels)
	process = append(process, vec)
	return vec
}

// NewHistogram returns a histogram with one label, and the name, help text and buckets
// of opts. Every one of values is reported from the start. Call it only to initialize a
// package variable.
func NewHistogram[V ~string](opts prometheus.HistogramOpts, label string, values ...V) *prometheus.HistogramVec {
	opts.Namespace, opts.Subsystem = Namespace, Subsystem
	vec := prometheus.NewHistogramVec(opts, []string{label})
	for _, value := range values {
		vec.WithLabelValues(string(value))
	}
	process = append(process, vec)
	return vec
}

// Register makes registry report the metrics of the process, and those of further.
// Several modules of one config may register the same metrics.
func Register(registry *prometheus.Registry, further ...prometheus.Collector) {
	for _, c := range append(further, process...) {
		// The only possible error is that c is registered already.
		_ = registry.Register(c)
	}
}
