// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"tailscale.com/tailcfg"
	"tailscale.com/tsnet"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

func init() {
	caddy.RegisterNetwork(network, listen)
}

const (
	network = "tailscale-service"
	// nodes is the network of caddy-tailscale.
	nodes = "tailscale"
)

// shared holds what configs share, by key: Caddy starts a new config before it stops the
// one that it replaces.
var shared = caddy.NewUsagePool()

type key struct {
	node    *tsnet.Server
	service tailcfg.ServiceName
	port    uint16
}

// listen opens "tailscale-service/<node>/<service>:<port>". It waits neither until the node
// has joined its tailnet, nor until it may host the service.
func listen(ctx context.Context, _, address, portRange string, portOffset uint, config net.ListenConfig) (any, error) {
	node, service, err := parse(address)
	if err != nil {
		return nil, err
	}
	first, _, _ := strings.Cut(portRange, "-")
	start, err := strconv.ParseUint(first, 10, 16)
	port := start + uint64(portOffset)
	if err != nil || port < 1 || port > 65535 {
		return nil, fmt.Errorf("port %q of Tailscale Service %q is not a number from 1 to 65535", portRange, service)
	}
	anchor, server, err := open(ctx, node, config)
	if err != nil {
		return nil, err
	}
	k := key{server, service, uint16(port)}
	value, _, err := shared.LoadOrNew(k, func() (caddy.Destructor, error) {
		return host(k, node), nil
	})
	if err != nil {
		return nil, errors.Join(err, anchor.Close())
	}
	return &listener{hosting: value.(*hosting), anchor: anchor, closed: make(chan struct{})}, nil
}

// parse returns the node and the service that host, "<node>/<service>", names.
func parse(host string) (node string, service tailcfg.ServiceName, err error) {
	node, name, ok := strings.Cut(host, "/")
	if !ok {
		return "", "", fmt.Errorf("%s/%s names no service; want %[1]s/<node>/<service>, such as %[1]s/k8s/k8s-api", network, host)
	}
	// Caddy takes the colon of "svc:k8s-api" for that of a port, and leaves "svc".
	if name == "svc" {
		return "", "", fmt.Errorf("%s/%s names a service with the prefix %q, which ends an address of Caddy; leave the prefix out, as in %[1]s/%[4]s/k8s-api", network, host, "svc:", node)
	}
	service = tailcfg.ServiceName("svc:" + strings.TrimPrefix(name, "svc:"))
	if err := service.Validate(); err != nil {
		return "", "", fmt.Errorf("%s/%s: the service %q: %w; want %[1]s/<node>/<service>, such as %[1]s/k8s/k8s-api", network, host, name, err)
	}
	return node, service, nil
}

// Name returns the name of the service that a site with this address listens on, without
// the prefix, and whether it is one.
func Name(address caddy.NetworkAddress) (name string, ok bool) {
	if address.Network != network {
		return "", false
	}
	_, service, err := parse(address.Host)
	if err != nil {
		return "", false
	}
	return service.WithoutPrefix(), true
}

// open has Caddy open a listener of caddy-tailscale on node, and returns that and the tsnet
// server below it. The listener keeps the node running. Nothing accepts what it gets: tsnet
// picks a free port for it, and closes what connects there.
func open(ctx context.Context, node string, config net.ListenConfig) (net.Listener, *tsnet.Server, error) {
	opened, err := caddy.NetworkAddress{Network: nodes, Host: node}.Listen(ctx, 0, config)
	if err != nil {
		return nil, nil, fmt.Errorf("opening tailnet node %q (is caddy-tailscale part of this Caddy?): %w", node, err)
	}
	ln, ok := opened.(net.Listener)
	if !ok {
		return nil, nil, fmt.Errorf("tailnet node %q: the network %q gave a %T, which is no listener", node, nodes, opened)
	}
	server := tailnet.ServerOf(ln)
	if server == nil {
		return nil, nil, errors.Join(
			fmt.Errorf("tailnet node %q: the network %q gave a %T, which is no listener of tsnet", node, nodes, ln), ln.Close())
	}
	return ln, server, nil
}

// listener is the listener of one config.
type listener struct {
	*hosting
	anchor net.Listener
	closed chan struct{}
	once   sync.Once
	err    error
}

// Accept returns the next connection to the service.
func (l *listener) Accept() (net.Conn, error) {
	for {
		select {
		case <-l.closed:
			return nil, &net.OpError{Op: "accept", Net: network, Addr: l.Addr(), Err: net.ErrClosed}
		default:
		}
		select {
		case <-l.closed:
		case c := <-l.conns:
			select {
			case <-l.closed:
				// It is for the config that replaces this one.
				go l.deliver(c)
			default:
				return c, nil
			}
		}
	}
}

// Close closes the listener. With its last listener, a service is no longer hosted.
func (l *listener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		_, err := shared.Delete(l.key)
		// That may close the node.
		l.err = errors.Join(err, l.anchor.Close())
	})
	return l.err
}

// Addr returns an address that no listener of a node has. What is done to the one that
// waits at the address of a listener, once a config has ended, must not happen to the
// node's own: Close wakes Accept.
func (l *listener) Addr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.IPv4Unspecified(), l.port))
}

// Server returns the node that hosts the service.
func (l *listener) Server() *tsnet.Server { return l.node }

// Interface guards
var (
	_ net.Listener     = (*listener)(nil)
	_ tailnet.Service  = (*listener)(nil)
	_ caddy.Destructor = (*hosting)(nil)
)
