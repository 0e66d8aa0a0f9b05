// SPDX-License-Identifier: Apache-2.0

package revocation

import (
	"net/http"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
)

// Kind says in a word what is going on in an open request. It is for people who
// look at what is open, and nothing is decided by it.
type Kind uint8

// The kinds.
const (
	Short Kind = iota // ends by itself, in a moment
	Watch
	Log // a log that is followed
	Exec
	Attach
	PortForward
	Upgrade // any other connection that became something else, such as through a service's proxy
	kinds   // how many there are
)

var kindNames = [kinds]string{"short", "watch", "log", "exec", "attach", "portforward", "upgrade"}

func (k Kind) String() string { return kindNames[k] }

// KindOf returns what r will be, from how kubectl and client-go spell it, and whether
// it asks for an upgrade of the connection, whatever it looks like. To parse it as
// package apirequest does would cost every request, most of which are over before
// anybody looks.
func KindOf(r *http.Request) (kind Kind, upgrade bool) {
	upgrade = r.Header["Connection"] != nil // which asks for one, or is gone by now
	return kindOf(r, upgrade), upgrade
}

func kindOf(r *http.Request, upgrade bool) Kind {
	query := r.URL.RawQuery
	if query != "" && (strings.Contains(query, "watch=true") || strings.Contains(query, "watch=1")) {
		return Watch
	}
	if !upgrade {
		if query != "" && strings.Contains(query, "follow=true") {
			return Log
		}
		return Short
	}
	switch path := r.URL.Path; path[strings.LastIndexByte(path, '/')+1:] {
	case "exec":
		return Exec
	case "attach":
		return Attach
	case "portforward":
		return PortForward
	case "log":
		return Log
	}
	return Upgrade
}

// open is how many requests of each kind are open in this process. It is guarded
// by mu.
var open [kinds]int

// Streams reports to Prometheus how many requests of the kinds that last are open.
type Streams struct{}

var openStreams = prometheus.NewDesc(
	prometheus.BuildFQName(metrics.Namespace, metrics.Subsystem, "open_streams"),
	"Open requests that last: watches, followed logs, exec and the like, by kind.",
	[]string{"kind"}, nil)

// Describe implements prometheus.Collector.
func (Streams) Describe(to chan<- *prometheus.Desc) { to <- openStreams }

// Collect implements prometheus.Collector.
func (Streams) Collect(to chan<- prometheus.Metric) {
	mu.Lock()
	counts := open
	mu.Unlock()
	for kind := Short + 1; kind < kinds; kind++ {
		to <- prometheus.MustNewConstMetric(openStreams, prometheus.GaugeValue, float64(counts[kind]), kind.String())
	}
}
