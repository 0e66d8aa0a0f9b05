// SPDX-License-Identifier: Apache-2.0

package app

import (
	"context"
	"math"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

const (
	// nodesPeriod is the time between two looks at the nodes.
	nodesPeriod = 15 * time.Second
	// nodesTimeout is how long a node may take to say how it is.
	nodesTimeout = 2 * time.Second
	// downPeriod is how long a node may be down before that is logged. It takes some
	// seconds to start.
	downPeriod = time.Minute
	// expiryNotice is how long before a key expires that is logged.
	expiryNotice = 7 * 24 * time.Hour
	// remedy says what to do about a key that expires.
	remedy = "Tailscale: turn key expiry off in the admin console; Headscale: headscale nodes expire --disable --identifier <id>"
	// certRemedy says what to do where a tailnet has no certificates.
	certRemedy = "Tailscale: turn on HTTPS certificates on the page DNS of the admin console; Headscale has none: configure another certificate, or tls internal"
)

// nodes watches the tailnet nodes of one config. A node whose key has expired tells
// nobody: its callers time out.
type nodes struct {
	logger *zap.Logger
	// names are the names of sites whose certificates come from Tailscale.
	names []string

	mu sync.Mutex
	// states are how the nodes are, by their names in the config.
	states map[string]*nodeState
}

// nodeState is how a node is.
type nodeState struct {
	tailnet.Status
	// down is since when the node is down, zero while it is up.
	down time.Time
	// logged reports whether it was logged that the node is down.
	logged bool
	// noticed is the expiry of the key that was announced.
	noticed time.Time
	// certless reports whether it was logged that the tailnet has no certificates.
	certless bool
}

// watch looks at all until ctx is done.
func (n *nodes) watch(ctx context.Context, all []*tailnet.Node) {
	ticker := time.NewTicker(nodesPeriod)
	defer ticker.Stop()
	for {
		n.update(ask(ctx, all), time.Now())
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

// ask returns how the nodes are, by their names. Each handler has nodes of its own, and
// nodes of several tailnets may have the same name: that of a name is how the worst is.
func ask(ctx context.Context, all []*tailnet.Node) map[string]tailnet.Status {
	states := make(map[string]tailnet.Status)
	for _, node := range all {
		askCtx, cancel := context.WithTimeout(ctx, nodesTimeout)
		status, err := node.Status(askCtx)
		cancel()
		if err != nil {
			status = tailnet.Status{State: "no answer: " + err.Error()}
		}
		if other, ok := states[node.Name]; !ok || status.WorseThan(other) {
			states[node.Name] = status
		}
	}
	return states
}

// update records and logs how the nodes are at now.
func (n *nodes) update(current map[string]tailnet.Status, now time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.states == nil {
		n.states = make(map[string]*nodeState)
	}
	for name, status := range current {
		state, ok := n.states[name]
		if !ok {
			state = new(nodeState)
			n.states[name] = state
		}
		state.Status = status
		n.log(name, state, now)
	}
}

func (n *nodes) log(name string, s *nodeState, now time.Time) {
	node, expiry := zap.String("node", name), zap.Time("expiry", s.KeyExpiry)
	if s.Up() {
		if s.logged {
			n.logger.Info("a tailnet node is connected again", node)
		}
		s.down, s.logged = time.Time{}, false
		if !s.KeyExpiry.IsZero() && s.KeyExpiry.Sub(now) < expiryNotice && !s.noticed.Equal(s.KeyExpiry) {
			s.noticed = s.KeyExpiry
			n.logger.Warn("the key of a tailnet node expires soon, and callers will time out", node, expiry, zap.String("remedy", remedy))
		}
		n.logCertificates(node, s)
		return
	}
	if s.down.IsZero() {
		s.down = now
	}
	switch {
	case s.logged:
	case s.Expired(now):
		s.logged = true
		n.logger.Error("the key of a tailnet node has expired, and callers time out", node, expiry, zap.String("remedy", remedy))
	case now.Sub(s.down) >= downPeriod:
		s.logged = true
		n.logger.Error("a tailnet node is not connected, and callers time out", node, zap.String("state", s.State), zap.Strings("health", s.Health))
	}
}

// logCertificates logs, once, that sites of the tailnet of a node need certificates that the
// tailnet does not have.
func (n *nodes) logCertificates(node zap.Field, s *nodeState) {
	if len(s.CertDomains) > 0 {
		s.certless = false
		return
	}
	_, tailnet, _ := strings.Cut(s.DNSName, ".")
	var sites []string
	for _, name := range n.names {
		if _, domain, _ := strings.Cut(name, "."); tailnet != "" && strings.EqualFold(domain, tailnet) {
			sites = append(sites, name)
		}
	}
	if len(sites) == 0 || s.certless {
		return
	}
	s.certless = true
	n.logger.Error("sites need certificates from Tailscale, and the tailnet has none, so that TLS handshakes fail", node, zap.Strings("sites", sites), zap.String("remedy", certRemedy))
}

// up reports whether all nodes are up. Until they have been asked, none is.
func (n *nodes) up() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, s := range n.states {
		if !s.Up() {
			return false
		}
	}
	return n.states != nil
}

var (
	nodeUp = prometheus.NewDesc(
		prometheus.BuildFQName(metrics.Namespace, metrics.Subsystem, "node_up"),
		"Whether a tailnet node is connected, by its name in the config.",
		[]string{"node"}, nil)
	nodeKeyExpiry = prometheus.NewDesc(
		prometheus.BuildFQName(metrics.Namespace, metrics.Subsystem, "node_key_expiry_timestamp_seconds"),
		"When the key of a tailnet node expires, +Inf if never, by the node's name in the config.",
		[]string{"node"}, nil)
)

// Describe implements [prometheus.Collector].
func (n *nodes) Describe(to chan<- *prometheus.Desc) {
	to <- nodeUp
	to <- nodeKeyExpiry
}

// Collect implements [prometheus.Collector].
func (n *nodes) Collect(to chan<- prometheus.Metric) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for name, s := range n.states {
		up, expiry := 0.0, math.Inf(1)
		if s.Up() {
			up = 1
		}
		if !s.KeyExpiry.IsZero() {
			expiry = float64(s.KeyExpiry.Unix())
		}
		to <- prometheus.MustNewConstMetric(nodeUp, prometheus.GaugeValue, up, name)
		to <- prometheus.MustNewConstMetric(nodeKeyExpiry, prometheus.GaugeValue, expiry, name)
	}
}
