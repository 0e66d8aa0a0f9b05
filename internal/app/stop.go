// SPDX-License-Identifier: Apache-2.0

package app

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/revocation"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

const (
	// streamsTimeout is how long streams and other requests may take to end when Caddy
	// exits.
	streamsTimeout = 3 * time.Second
	// drainTimeout is how long nodes may take to take note that a service is drained.
	drainTimeout = 2 * time.Second
	// closeTimeout is how long tailnet nodes may then take to close. tsnet gives itself
	// as long to log out, or to send its logs.
	closeTimeout = 5 * time.Second
	// storeTimeout is how long recordings that wait for a storage may meanwhile take.
	storeTimeout = 5 * time.Second
	// overdue is how long Caddy may take to exit by itself once its grace period is over.
	overdue = time.Second
	// reportInterval is the time between two log messages about what Caddy waits for.
	reportInterval = 10 * time.Second
)

// stop is what happens when Caddy exits.
//
// With its last listener, a tailnet node leaves the tailnet: every client loses its
// connection, and is not told. So streams end before that.
type stop struct {
	requests *revocation.Registry
	logger   *zap.Logger
	// store sends recordings to their storage until ctx is done.
	store func(ctx context.Context)
	// closeNodes closes the tailnet listeners.
	closeNodes func()
	// delay is Caddy's shutdown_delay, grace its grace_period, 0 if it has none.
	delay, grace time.Duration
	// exit ends the process.
	exit func()
}

// newStop returns what happens when Caddy exits with the config of a.
func (a *App) newStop(exit func()) *stop {
	s := &stop{
		requests: &a.process.Requests,
		logger:   a.ctx.Logger(),
		store:    a.process.Outboxes.Flush,
		closeNodes: func() {
			a.closeIdle()
			a.retireListeners(closeTimeout)
		},
		exit: exit,
	}
	// An error means that there is no server.
	if server, err := a.ctx.AppIfConfigured("http"); err == nil {
		app := server.(*caddyhttp.App)
		s.delay, s.grace = time.Duration(app.ShutdownDelay), time.Duration(app.GracePeriod)
	}
	return s
}

// run ends the streams, and then closes the nodes. Without a shutdown_delay, it returns
// when that is done. With one, it happens at its end, when load balancers and probes know
// that Caddy exits.
func (s *stop) run() {
	go s.watch()
	if s.delay > streamsTimeout {
		time.AfterFunc(s.delay-streamsTimeout, s.leave)
		return
	}
	s.leave()
}

func (s *stop) leave() {
	logEnded(s.logger, revocation.Exiting, s.requests.Stop(streamsTimeout))
	ctx, cancel := context.WithTimeout(context.Background(), storeTimeout)
	defer cancel()
	stored := make(chan struct{})
	go func() {
		defer close(stored)
		s.store(ctx) // with the recordings of the sessions that have just ended
	}()
	s.closeNodes()
	<-stored
}

// drain has the control server send new connections to Tailscale Services to their other
// hosts, before anything ends here.
func (a *App) drain() {
	ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	if err := tailnet.FromListeners(a.listeners()).Drain(ctx); err != nil {
		logger := a.ctx.Logger()
		logger.Error("a Tailscale Service cannot be drained, and may get connections until its node closes", zap.Error(err))
	}
}

// leaveNodes ends the streams on nodes, and on services of nodes, that only the config of a
// listens on. With that config they close.
func (a *App) leaveNodes() {
	var staying tailnet.Nodes
	for _, other := range a.process.apps() {
		if other != a {
			staying = append(staying, tailnet.FromListeners(other.listeners())...)
		}
	}
	leaving := tailnet.FromListeners(a.listeners())
	keeps := staying.ServiceAddrs()
	services := slices.DeleteFunc(leaving.ServiceAddrs(), func(dialled netip.AddrPort) bool { return slices.Contains(keeps, dialled) })
	leaving = slices.DeleteFunc(leaving, func(n *tailnet.Node) bool {
		ip4, ip6 := n.Addrs()
		return staying.Own(ip4) || staying.Own(ip6)
	})
	if len(leaving) == 0 && len(services) == 0 {
		return
	}
	closing := func(dialled netip.AddrPort) bool {
		return leaving.Own(dialled.Addr()) || slices.Contains(services, dialled)
	}
	logEnded(a.ctx.Logger(), revocation.Leaving, a.process.Requests.EndOn(closing, revocation.Leaving, streamsTimeout))
	a.closeIdle()
}

// Serves notes the server that accepts c. It has the shape of [http.Server.ConnContext].
func (a *App) Serves(ctx context.Context, _ net.Conn) context.Context {
	if server, ok := ctx.Value(http.ServerContextKey).(*http.Server); ok {
		a.servers.LoadOrStore(server, true)
	}
	return ctx
}

// closeIdle closes the connections on which no request is open, so that no client sends one
// to a node that is gone. A node that closes hangs if it has more connections than its queue
// holds packets.
func (a *App) closeIdle() {
	open := a.process.Memory.Connections()
	for server := range a.servers.Range {
		server.(*http.Server).SetKeepAlivesEnabled(false)
	}
	if open > 0 {
		time.Sleep(revocation.DeliveryTime)
	}
}

func logEnded(logger *zap.Logger, why revocation.Stopping, ended map[requestinfo.Kind]int) {
	if len(ended) > 0 {
		logger.Info("streams ended", zap.String("reason", string(why)), zap.Any("streams", byName(ended)))
	}
}

func byName(kinds map[requestinfo.Kind]int) map[string]int {
	out := make(map[string]int)
	for kind, n := range kinds {
		out[kind.String()] = n
	}
	return out
}

// watch reports what Caddy waits for, and ends the process if its grace period is over and
// it still waits.
func (s *stop) watch() {
	var over <-chan time.Time
	if s.grace > 0 {
		over = time.After(s.delay + s.grace + overdue)
	}
	report := time.NewTicker(reportInterval)
	defer report.Stop()
	for {
		select {
		case <-report.C:
			s.logger.Warn("Caddy has not exited yet", s.waitsFor()...)
		case <-over:
			s.logger.Error("Caddy exits, as its grace period is over and it still waits", s.waitsFor()...)
			s.exit()
			return
		}
	}
}

// waitsFor returns what Caddy waits for, as far as it is known.
func (s *stop) waitsFor() []zap.Field {
	return []zap.Field{
		zap.Any("open_requests", byName(s.requests.Open())),
		zap.Duration("grace_period", s.grace),
	}
}
