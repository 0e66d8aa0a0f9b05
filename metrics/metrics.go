// SPDX-License-Identifier: Apache-2.0

// Package metrics counts what the plugin decides and does, for Prometheus.
//
// All of it belongs to the process: Caddy makes a new registry for every config,
// and what was counted under the old one must not be forgotten with it. Labels
// hold words from lists in the code and never a user, a group or a device, of
// which there is no end and which do not belong into a monitoring system.
package metrics

import (
	"github.com/prometheus/client_golang/prometheus"
)

// Names start with both.
const (
	Namespace = "caddy"
	Subsystem = "tailscale_impersonate"
)

// What Decisions has as outcomes.
const (
	Allowed = "allowed" // the request was sent on as its caller
	Refused = "refused" // it was not
)

// What Questions has as outcomes.
const (
	Known   = "known"   // the node knows the peer
	Unknown = "unknown" // the node knows no such peer
	Failed  = "failed"  // the node did not answer
)

// Outcomes are all that Questions has.
var Outcomes = []string{Known, Unknown, Failed}

var (
	// Decisions are counted by what came out and by where the caller's groups
	// came from, once for each request.
	Decisions = counters("decisions_total",
		"Requests by what was decided about them and by where the caller's groups came from.",
		"outcome", "source")

	// Refusals are all answers that say why a request was not sent to the API
	// server, by a reason of package refusal.
	Refusals = counters("refusals_total",
		"Requests that were answered with a refusal, by reason.",
		"reason")

	// Questions are those to tailnet nodes about who a peer is, by outcome. Most
	// answers take a tenth of a millisecond; none takes longer than the last bucket.
	Questions = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: Namespace,
		Subsystem: Subsystem,
		Name:      "whois_duration_seconds",
		Help:      "How long tailnet nodes took to say who a peer is, by outcome.",
		Buckets:   []float64{.00005, .0001, .0002, .0005, .001, .0025, .005, .01, .025, .05, .1, .25},
	}, []string{"outcome"})

	lookups = counters("cache_lookups_total",
		"Questions about who a caller is, by whether the answer was known from a moment ago (hit) or a tailnet node had to be asked (miss).",
		"result")

	// CacheHits count the answers of a moment ago that were there.
	CacheHits = lookups.WithLabelValues("hit")
	// CacheMisses count those that were not.
	CacheMisses = lookups.WithLabelValues("miss")

	// Revocations are requests that were ended because their caller lost access,
	// by a reason of package recheck.
	Revocations = counters("revoked_requests_total",
		"Open requests that were ended because their caller lost access, by reason.",
		"reason")

	// Recordings are sessions that were to be recorded, by an outcome of package
	// recording.
	Recordings = counters("recordings_total",
		"Sessions that were to be recorded, by what has become of that.",
		"outcome")

	// Events are requests that were to be sent to a recorder, by an outcome of
	// package apievents.
	Events = counters("events_total",
		"Requests that were to be sent to a recorder as events, by what has become of that.",
		"outcome")
)

// Register has registry report all of the above, and further collectors. The same
// may be registered by several modules of a config.
func Register(registry *prometheus.Registry, further ...prometheus.Collector) {
	for _, c := range append(further, Decisions, Refusals, Questions, lookups, Revocations, Recordings, Events) {
		// That it is registered already is the only error there can be.
		_ = registry.Register(c)
	}
}

func counters(name, help string, labels ...string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: Namespace,
		Subsystem: Subsystem,
		Name:      name,
		Help:      help,
	}, labels)
}
