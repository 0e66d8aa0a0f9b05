// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
	"tailscale.com/client/local"
	"tailscale.com/ipn"
	"tailscale.com/tailcfg"
)

const (
	// period is the time between two looks at the node. The node tells when its rights
	// change, but not when another program changes its serve config.
	period = 15 * time.Second
	// timeout is how long the node may take to answer. It answers from memory.
	timeout = 2 * time.Second
)

// hosting is one port of a service on one node, for all configs that listen on it.
type hosting struct {
	key
	name  string // of the node, in the config
	conns chan net.Conn
	// addrs are the addresses and the port on which connections are accepted.
	addrs atomic.Pointer[[]netip.AddrPort]
	// had holds every address on which connections were ever accepted. The control server
	// gives a service another one when an administrator does.
	had sync.Map // netip.Addr -> true
	// drained is whether the service must not be advertised any more.
	drained atomic.Bool

	client    *local.Client
	listeners map[netip.Addr]net.Listener
	last      state // what was logged last

	stop context.CancelFunc
	over chan struct{} // closed when follow has returned
	done chan struct{} // closed when no connection is accepted any more
}

// host begins to host the service of k.
func host(k key, name string) *hosting {
	ctx, cancel := context.WithCancel(context.Background())
	h := &hosting{
		key: k, name: name,
		conns:     make(chan net.Conn),
		listeners: make(map[netip.Addr]net.Listener),
		stop:      cancel,
		over:      make(chan struct{}),
		done:      make(chan struct{}),
	}
	h.addrs.Store(new([]netip.AddrPort))
	go h.follow(ctx)
	return h
}

// Service returns the name of the service and the addresses on which connections to it are
// accepted.
func (h *hosting) Service() (name string, addrs []netip.AddrPort) {
	return h.service.WithoutPrefix(), *h.addrs.Load()
}

// Had reports whether connections to addr are or were accepted.
func (h *hosting) Had(addr netip.Addr) bool {
	_, had := h.had.Load(addr)
	return had
}

// Drain makes the node no longer offer itself as a host of the service, so that the control
// server sends new connections to others. Those that still come are accepted.
func (h *hosting) Drain(ctx context.Context) error {
	h.drained.Store(true)
	client, err := h.node.LocalClient()
	if err != nil {
		return err
	}
	return advertise(ctx, client, h.service, never)
}

// never is what a service that is drained or gone tells [advertise].
func never() bool { return false }

// Destruct takes everything back.
func (h *hosting) Destruct() error {
	h.stop()
	<-h.over
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	h.closeAll()
	close(h.done)
	if h.client == nil {
		return nil
	}
	last, err := unserve(ctx, h.client, h.service, h.port)
	if err == nil && last {
		err = advertise(ctx, h.client, h.service, never)
	}
	if err != nil {
		logger := h.logger()
		logger.Error("a Tailscale Service that this Caddy no longer serves is still in its node's settings", zap.Error(err))
	}
	return nil // Caddy cannot do anything about it
}

// follow does what the node may do until ctx is done.
func (h *hosting) follow(ctx context.Context) {
	defer close(h.over)
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	changes := make(chan struct{}, 1)
	var watching sync.WaitGroup
	defer watching.Wait()
	for {
		if h.client == nil {
			// This starts the node.
			client, err := h.node.LocalClient()
			if err != nil {
				h.report(state{err: &problem{"the node does not start", err, "see what the log says about the node"}})
			} else {
				h.client = client
				watching.Go(func() { watch(ctx, client, changes) })
			}
		}
		if h.client != nil {
			h.report(h.update(ctx))
		}
		select {
		case <-changes:
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

// watch sends to changes whenever the node has changed, until ctx is done.
func watch(ctx context.Context, client *local.Client, changes chan<- struct{}) {
	for ctx.Err() == nil {
		watcher, err := client.WatchIPNBus(ctx, ipn.NotifyInitialState)
		for err == nil {
			var n ipn.Notify
			if n, err = watcher.Next(); err == nil && (n.State != nil || n.SelfChange != nil || n.Prefs != nil) {
				select {
				case changes <- struct{}{}:
				default:
				}
			}
		}
		if watcher != nil {
			_ = watcher.Close()
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
}

// state is how the service stands.
type state struct {
	addrs []netip.Addr
	// waiting is whether the node is not connected, which is logged elsewhere.
	waiting bool
	err     *problem
}

// problem says why a service is not hosted.
type problem struct {
	what   string
	cause  error
	remedy string
}

func (p *problem) Error() string { return p.what }

// update makes the node host the service, as far as it may.
func (h *hosting) update(ctx context.Context) state {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	status, err := h.client.StatusWithoutPeers(ctx)
	if err != nil {
		return state{err: &problem{"the node does not answer", err, "see what the log says about the node"}}
	}
	if status.BackendState != ipn.Running.String() || status.Self == nil {
		// Its addresses are still those that it had, if it had any.
		return state{waiting: true}
	}
	if status.Self.Tags == nil || status.Self.Tags.Len() == 0 {
		h.closeAll()
		return state{err: &problem{what: "the node has no tag, and only tagged nodes may host a service", remedy: "give the node a tag, by its auth key or by tags in the option tailscale"}}
	}
	if err := serve(ctx, h.client, h.service, h.port); err != nil {
		// Then the node answers on the port itself, or with what another program set.
		h.closeAll()
		if p := new(problem); errors.As(err, &p) {
			return state{err: p}
		}
		return state{err: &problem{"the node does not take the serve config", err, "see the error"}}
	}
	if err := advertise(ctx, h.client, h.service, func() bool { return !h.drained.Load() }); err != nil {
		return state{err: &problem{"the node does not offer itself as a host", err, "see the error"}}
	}
	addrs, err := mayHost(status.Self.CapMap, h.service)
	if err != nil {
		h.closeAll()
		return state{err: &problem{"the control server sent addresses that cannot be read", err, "see the error"}}
	}
	if len(addrs) == 0 {
		h.closeAll()
		return state{err: &problem{what: "the control server does not let the node host the service", remedy: "Tailscale: define the service on the page Services of the admin console, with this port, and approve the node as its host there or by autoApprovers in the policy file; Headscale has no Services"}}
	}
	if err := h.listen(addrs); err != nil {
		return state{addrs: addrs, err: &problem{"an address of the service is in use on the node", err, "let only one program in this process listen on it"}}
	}
	return state{addrs: addrs}
}

// mayHost returns the addresses of service, none if the node, which has caps, may not host
// it.
func mayHost(caps tailcfg.NodeCapMap, service tailcfg.ServiceName) (addrs []netip.Addr, err error) {
	hosted, err := tailcfg.UnmarshalNodeCapJSON[tailcfg.ServiceIPMappings](caps, tailcfg.NodeAttrServiceHost)
	if err != nil {
		return nil, err
	}
	// The node itself takes no notice of several.
	if len(hosted) != 1 {
		return nil, nil
	}
	for _, addr := range hosted[0][service] {
		if addr.IsValid() {
			addrs = append(addrs, addr)
		}
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs), nil
}

// listen accepts connections on addrs, and on no other address.
func (h *hosting) listen(addrs []netip.Addr) error {
	for addr, ln := range h.listeners {
		if !slices.Contains(addrs, addr) {
			delete(h.listeners, addr)
			_ = ln.Close()
		}
	}
	var errs []error
	var open []netip.AddrPort
	for _, addr := range addrs {
		dialled := netip.AddrPortFrom(addr, h.port)
		if h.listeners[addr] == nil {
			ln, err := h.node.Listen("tcp", dialled.String())
			if err != nil {
				errs = append(errs, err)
				continue
			}
			h.listeners[addr] = ln
			defer func() { go h.accept(ln) }()
		}
		open = append(open, dialled)
		h.had.Store(addr, true)
	}
	// Before the first connection is accepted, it has to be known whose address that is.
	h.addrs.Store(&open)
	return errors.Join(errs...)
}

// closeAll accepts connections on no address.
func (h *hosting) closeAll() { _ = h.listen(nil) } // only to open one can fail

// accept passes on what ln accepts.
func (h *hosting) accept(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return // it is closed
		}
		h.deliver(c)
	}
}

// deliver passes c on to the next call of Accept.
func (h *hosting) deliver(c net.Conn) {
	select {
	case h.conns <- c:
	case <-h.done:
		_ = c.Close()
	}
}

// report logs s, unless that was logged already.
func (h *hosting) report(s state) {
	if s.waiting || h.drained.Load() {
		return
	}
	last := h.last
	h.last = s
	same := (s.err == nil) == (last.err == nil) && (s.err == nil || s.err.what == last.err.what)
	if same && slices.Equal(s.addrs, last.addrs) {
		return
	}
	logger := h.logger()
	if s.err == nil {
		logger.Info("a Tailscale Service is hosted", zap.Stringers("addresses", s.addrs))
		return
	}
	fields := []zap.Field{zap.String("reason", s.err.what), zap.String("remedy", s.err.remedy)}
	if s.err.cause != nil {
		fields = append(fields, zap.NamedError("cause", s.err.cause))
	}
	logger.Error("a Tailscale Service is not hosted", fields...)
}

// logger is that of the process, as the service is hosted for several configs.
func (h *hosting) logger() *zap.Logger {
	return caddy.Log().Named("tailscale_service").With(
		zap.String("service", string(h.service)), zap.Uint16("port", h.port), zap.String("node", h.name))
}
