// SPDX-License-Identifier: Apache-2.0

package revocation

import (
	"cmp"
	"net/netip"
	"slices"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// Registry knows all open requests of the process, whatever config they began under.
// It is also a Prometheus collector that reports how many streams are open.
type Registry struct {
	// Hold is called when a tracker gets its first request, Release when it has been
	// checked without one: between the two, the registry must not be replaced.
	// Neither may call the registry.
	Hold, Release func()

	// mu guards what follows, and what trackers and requests say it guards.
	mu sync.Mutex
	// trackers are those of the running config, and those of earlier configs that
	// still have requests.
	trackers []*Tracker
	// open counts the open requests by kind.
	open [requestinfo.Kinds]int
	// stopping is set by Stop.
	stopping bool
}

// NewGeneration returns a set of trackers for a new Caddy config.
func (r *Registry) NewGeneration() *Generation { return &Generation{registry: r} }

// Client is a device with open requests.
type Client struct {
	// Remote is the client's address, Local the node's address that it dialled.
	Remote, Local netip.Addr
	// Identity is that of the client's latest request.
	Identity *impersonate.Identity
	// Open counts its open requests by kind.
	Open map[requestinfo.Kind]int
}

// Clients returns every device with open requests, sorted by address.
func (r *Registry) Clients() []Client {
	// Two tailnets may give the same addresses to different devices.
	type device struct {
		remote, local netip.Addr
		name          string
	}
	var clients []Client
	index := make(map[device]int)
	r.mu.Lock()
	for _, t := range r.trackers {
		for req := t.open; req != nil; req = req.next {
			key := device{req.conn.Remote.Addr(), req.conn.Local, req.ID.Node}
			i, ok := index[key]
			if !ok { // the list starts with the latest request
				i, index[key] = len(clients), len(clients)
				clients = append(clients, Client{Remote: key.remote, Local: key.local, Identity: req.ID, Open: make(map[requestinfo.Kind]int)})
			}
			clients[i].Open[req.kind]++
		}
	}
	r.mu.Unlock()
	slices.SortFunc(clients, func(a, b Client) int {
		return cmp.Or(a.Remote.Compare(b.Remote), a.Local.Compare(b.Local))
	})
	return clients
}

// Drop ends all requests that the named device, at the address remote, has open on
// local, and returns how many, by kind. detail is the reason in full.
func (r *Registry) Drop(remote, local netip.Addr, device, detail string) map[requestinfo.Kind]int {
	dropped := make(map[requestinfo.Kind]int)
	revoked := &Revoked{Reason: Dropped, Detail: detail, Remote: remote}
	conns := make(map[*tailnet.Conn]bool)
	var report func(*Revoked)
	r.mu.Lock()
	for _, t := range r.trackers {
		for req := t.open; req != nil; req = req.next {
			if req.ended || req.conn.Remote.Addr() != remote || req.conn.Local != local || req.ID.Node != device {
				continue
			}
			req.ended = true
			revoked.User = req.ID.User
			revoked.Requests++
			dropped[req.kind]++
			conns[req.conn] = true
			report = t.policies[0].Revoked
		}
	}
	r.mu.Unlock()
	for conn := range conns {
		conn.End(revoked)
	}
	if report != nil {
		revocations.With(Dropped).Add(float64(revoked.Requests))
		report(revoked)
	}
	return dropped
}

var openStreams = prometheus.NewDesc(
	prometheus.BuildFQName(metrics.Namespace, metrics.Subsystem, "open_streams"),
	"Open requests that last: watches, followed logs, exec and the like, by kind.",
	[]string{"kind"}, nil)

// Describe implements prometheus.Collector.
func (r *Registry) Describe(to chan<- *prometheus.Desc) { to <- openStreams }

// Collect implements prometheus.Collector.
func (r *Registry) Collect(to chan<- prometheus.Metric) {
	r.mu.Lock()
	counts := r.open
	r.mu.Unlock()
	for kind := requestinfo.Short + 1; kind < requestinfo.Kinds; kind++ {
		to <- prometheus.MustNewConstMetric(openStreams, prometheus.GaugeValue, float64(counts[kind]), kind.String())
	}
}

// Interface guards
var _ prometheus.Collector = (*Registry)(nil)
