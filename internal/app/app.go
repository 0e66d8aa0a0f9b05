// SPDX-License-Identifier: Apache-2.0

// Package app holds the Caddy app tailscale_impersonate, which connects the handlers
// of a config with one another and with those of earlier configs.
//
// All state of the process is in one place, a [Process] in a [caddy.UsagePool]. What
// has to outlive a config is in there: streams go on after a reload, and must still be
// checked, listed and dropped. Each config's app holds a reference, and so does every
// tracker of open requests, so that the last of them takes the state away.
package app

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddytls"
	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/outbox"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/quota"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordings"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/revocation"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/service"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/sessionrecording"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/sites"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

func init() {
	caddy.RegisterModule(new(App))
}

// The events of Caddy that the app handles.
const (
	started  = "started"
	stopping = "stopping"
)

// name is the app's name in a config, which need not mention it.
const name = "tailscale_impersonate"

// retireTimeout is how long a reload waits for the tailnet listeners of the config that
// it replaces. They take less than a millisecond, unless their node is closed too.
const retireTimeout = 2 * time.Second

// App is the part of this module that each config has once. It has no options, and
// need not be configured: handlers load it.
type App struct {
	ctx        caddy.Context
	process    *Process
	generation *revocation.Generation
	nodes      *nodes
	// watch watches the nodes while the config runs.
	watch    func([]*tailnet.Node)
	starting []func()
	sites    sites.Directory
	running  []*authn.Authenticator
	retire   sync.Once
	kept     keeping
	// servers are the config's servers that have had connections.
	servers sync.Map // *http.Server -> true
}

// CaddyModule returns the Caddy module information.
func (*App) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  name,
		New: func() caddy.Module { return new(App) },
	}
}

// Of returns the app of the config that ctx belongs to.
func Of(ctx caddy.Context) (*App, error) {
	app, err := ctx.App(name)
	if err != nil {
		return nil, err
	}
	return app.(*App), nil
}

// Provision sets up the app.
func (a *App) Provision(ctx caddy.Context) error {
	events, err := ctx.App("events")
	if err != nil {
		return fmt.Errorf("getting the events app: %w", err)
	}
	a.ctx = ctx
	a.process = Acquire()
	a.generation = a.process.Requests.NewGeneration()
	a.nodes = &nodes{logger: ctx.Logger()}
	a.sites.HTTPPort = a.httpPort
	a.watch = func(all []*tailnet.Node) { a.nodes.watch(ctx, all) }
	metrics.Register(ctx.GetMetricsRegistry(), &a.process.Requests, &a.process.Memory, &a.process.Outboxes, a.nodes, service.Metric)
	return events.(*caddyevents.App).Subscribe(&caddyevents.Subscription{
		Events:   []string{started, stopping},
		Handlers: []caddyevents.Handler{a},
	})
}

// Generation returns the trackers of the config's handlers.
func (a *App) Generation() *revocation.Generation { return a.generation }

// Recordings returns the directories that the process records to.
func (a *App) Recordings() *sessionrecording.Dirs { return &a.process.Recordings }

// Indexes returns the indexes of recordings of the process.
func (a *App) Indexes() *recordings.Indexes { return &a.process.Indexes }

// Memory returns what bounds the memory of the process that callers make it hold.
func (a *App) Memory() *quota.Budget { return &a.process.Memory }

// Sites returns the sites of the config that list one another.
func (a *App) Sites() *sites.Directory { return &a.sites }

// httpPort returns the port on which no server of the config speaks TLS.
func (a *App) httpPort() int {
	servers, err := a.ctx.AppIfConfigured("http")
	if err != nil {
		return caddyhttp.DefaultHTTPPort
	}
	return cmp.Or(servers.(*caddyhttp.App).HTTPPort, caddyhttp.DefaultHTTPPort)
}

// OnStarted calls start once Caddy has started all apps of the config, and from then
// on lists the authenticator among the running ones.
func (a *App) OnStarted(authenticator *authn.Authenticator, start func()) {
	a.starting = append(a.starting, start)
	a.running = append(a.running, authenticator)
}

// Handle handles the events of Caddy about the config.
func (a *App) Handle(_ context.Context, event caddy.Event) error {
	switch event.Name() {
	case started:
		a.started()
	case stopping:
		if caddy.Exiting() {
			a.drain()
			a.newStop(func() { os.Exit(caddy.ExitCodeFailedQuit) }).run()
		} else {
			a.leaveNodes()
			a.retireListeners(retireTimeout)
		}
	}
	return nil
}

// started runs the config's handlers. Only now is the list of a server's listeners
// complete, and safe to read: Caddy may still add to it while the first listener serves
// a request.
func (a *App) started() {
	// Before anything is deleted for its age.
	for dir, settings := range a.kept.stores {
		a.process.Outboxes.Of(dir).Start(a.ctx, settings)
	}
	for _, start := range a.starting {
		start()
	}
	a.generation.Run()
	a.process.add(a)
	var all []*tailnet.Node
	for _, authenticator := range a.running {
		all = append(all, authenticator.Nodes()...)
	}
	a.nodes.names = tailscaleNames(a.ctx)
	go a.watch(all)
}

// tailscaleNames returns the names of the config's sites for which Caddy asks Tailscale for
// certificates, as it does for names below ts.net unless the config says otherwise.
func tailscaleNames(ctx caddy.Context) (names []string) {
	app, err := ctx.AppIfConfigured("tls")
	if err != nil || app.(*caddytls.TLS).Automation == nil {
		return nil // no site has a certificate, or none that Caddy looks after
	}
	for _, policy := range app.(*caddytls.TLS).Automation.Policies {
		for _, manager := range policy.Managers {
			switch manager.(type) {
			case caddytls.Tailscale, *caddytls.Tailscale:
				names = append(names, policy.Subjects()...)
			}
		}
	}
	return names
}

// retireListeners leaves new connections to the config that replaces this one. That is
// best done before Caddy stops the servers: what they still accept now is answered, and
// learns of the stop. Further calls do nothing.
//
// The last listener of a tailnet node closes the node, which may hang. Caddy would wait for
// that without a limit, whatever its grace_period is. Afterwards it has no such listener
// left to close.
func (a *App) retireListeners(limit time.Duration) {
	a.retire.Do(func() { a.doRetireListeners(limit) })
}

func (a *App) doRetireListeners(limit time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if hanging := tailnet.RetireListeners(ctx, a.listeners()); len(hanging) > 0 {
		logger := a.ctx.Logger()
		logger.Warn("tailnet nodes take long to close, and Caddy does not wait for them", zap.Strings("nodes", hanging))
	}
}

// listeners returns the listeners of all servers of the config, also of those without a
// handler of ours, such as those that redirect to https.
func (a *App) listeners() []net.Listener {
	servers, err := a.ctx.AppIfConfigured("http")
	if err != nil {
		return nil // it could not be provisioned
	}
	var listeners []net.Listener
	for _, server := range servers.(*caddyhttp.App).Servers {
		listeners = append(listeners, server.Listeners()...)
	}
	return listeners
}

// Start does nothing: see [App.Handle].
func (*App) Start() error { return nil }

// Stop does nothing: see [App.Handle].
func (*App) Stop() error { return nil }

// Cleanup releases the state of the process.
func (a *App) Cleanup() error {
	if a.process == nil { // it could not be provisioned
		return nil
	}
	// A config that failed to start, after some of its servers had, was not told to stop.
	a.retireListeners(retireTimeout)
	a.process.remove(a)
	a.process.Release()
	return nil
}

// Process is the state of this process, across configs.
type Process struct {
	// Requests knows the open requests.
	Requests revocation.Registry
	// Recordings knows the directories with recordings.
	Recordings sessionrecording.Dirs
	// Outboxes send recordings to storages.
	Outboxes outbox.Outboxes
	// Indexes knows the indexes of recordings.
	Indexes recordings.Indexes
	// Memory bounds what callers make the process hold.
	Memory quota.Budget

	mu sync.Mutex
	// running are the apps of the running config, and of those that it replaces.
	running []*App
}

var pool = caddy.NewUsagePool()

// Acquire returns the state of the process. Release must be called when it is no
// longer needed.
func Acquire() *Process {
	value, _, _ := pool.LoadOrNew(name, func() (caddy.Destructor, error) {
		p := &Process{Memory: quota.Budget{Size: quota.OfProcess()}}
		p.Requests.Hold = func() { Acquire() }
		p.Requests.Release = p.Release
		return p, nil
	})
	return value.(*Process)
}

// Release gives up one reference to the state.
func (*Process) Release() {
	_, _ = pool.Delete(name) // Destruct returns no error
}

// Destruct implements caddy.Destructor. Nothing is left that refers to the state.
func (*Process) Destruct() error { return nil }

// Running returns the authenticators of the running config. While Caddy replaces one
// config by another, it returns those of both.
func (p *Process) Running() (authenticators []*authn.Authenticator) {
	for _, a := range p.apps() {
		authenticators = append(authenticators, a.running...)
	}
	return authenticators
}

func (p *Process) apps() []*App {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.running)
}

func (p *Process) add(a *App) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running = append(p.running, a)
}

// remove removes a, which may never have been added.
func (p *Process) remove(a *App) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running = slices.DeleteFunc(p.running, func(other *App) bool { return other == a })
}

// Interface guards
var (
	_ caddy.App           = (*App)(nil)
	_ caddy.Provisioner   = (*App)(nil)
	_ caddy.CleanerUpper  = (*App)(nil)
	_ caddyevents.Handler = (*App)(nil)
	_ caddy.Destructor    = (*Process)(nil)
)
