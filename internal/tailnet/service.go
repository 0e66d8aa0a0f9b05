// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"tailscale.com/tsnet"
)

// Service is a listener for a Tailscale Service on a tsnet node. A service has addresses
// and a name of its own, and can have several nodes as its hosts.
//
// Only the listener that a server has can make a connection to such an address count: the
// control server also tells a node the addresses of services on which nothing listens.
type Service interface {
	// Service returns the name of the service, such as "k8s-api", and the addresses and
	// port on which its connections are accepted now. There are none while the node may
	// not host the service.
	Service() (name string, addrs []netip.AddrPort)
	// Had reports whether addr is, or was earlier, one of these addresses.
	Had(addr netip.Addr) bool
	// Drain makes the control server send new connections to other hosts of the service.
	// Those that still come are accepted.
	Drain(ctx context.Context) error
}

// Drain drains the services that the server hosts on the nodes.
func (nodes Nodes) Drain(ctx context.Context) error {
	var errs []error
	for _, n := range nodes {
		for _, s := range n.Services {
			if err := s.Drain(ctx); err != nil {
				name, _ := s.Service()
				errs = append(errs, fmt.Errorf("service %q of tailnet node %q: %w", name, n.Name, err))
			}
		}
	}
	return errors.Join(errs...)
}

// servicesOf returns those of listeners that listen on node for a service, and whether none
// listens on the node's own addresses.
func servicesOf(node *tsnet.Server, listeners []net.Listener) (services []Service, only bool) {
	only = true
	for _, ln := range listeners {
		layer := bottom(ln)
		if layer == nil || layer.Server() != node {
			continue
		}
		if s, ok := layer.(Service); ok {
			services = append(services, s)
		} else {
			only = false
		}
	}
	return services, only
}

// hosts reports whether addr is that of a service that the server hosts on the node.
func (n *Node) hosts(addr netip.Addr) bool {
	return addr != netip.Addr{} && slices.ContainsFunc(n.Services, func(s Service) bool { return isAt(s, addr) })
}

// isAt reports whether connections to s are accepted on addr.
func isAt(s Service, addr netip.Addr) bool {
	_, addrs := s.Service()
	return slices.ContainsFunc(addrs, func(a netip.AddrPort) bool { return a.Addr() == addr })
}

// had reports whether addr is or was that of a service that the server hosts on the node.
// What a caller sent before the node lost the service can still be unread.
func (n *Node) had(addr netip.Addr) bool {
	return slices.ContainsFunc(n.Services, func(s Service) bool { return s.Had(addr) })
}

// namesService reports whether host is the name of a service that the server hosts on the
// node, whose tailnet name is fqdn: services are named in the same domain.
func (n *Node) namesService(fqdn, host string) bool {
	domain := domainOf(fqdn)
	return slices.ContainsFunc(n.Services, func(s Service) bool {
		name, _ := s.Service()
		return domain != "" && names(name+"."+domain, host)
	})
}

// ServiceAt returns the name of the service with the address addr that the server hosts on the
// node, empty if there is none.
func (n *Node) ServiceAt(addr netip.Addr) string {
	for _, s := range n.Services {
		if isAt(s, addr) {
			name, _ := s.Service()
			return name
		}
	}
	return ""
}

// Hosts reports whether the server listens on the node for the service of that name, on that
// port, and returns the addresses at which connections are accepted now. The port may be
// unknown while there are none.
func (n *Node) Hosts(service string, port uint16) (addrs []netip.Addr, ok bool) {
	for _, s := range n.Services {
		name, accepted := s.Service()
		if name != service {
			continue
		}
		ok = true
		for _, a := range accepted {
			if a.Port() == port && !slices.Contains(addrs, a.Addr()) {
				addrs = append(addrs, a.Addr())
			}
		}
	}
	return addrs, ok
}

// LeadsTo reports whether a client that dials host can arrive at the service of that name,
// or at the node itself if service is empty. A name that the tailnet does not give to either
// leads wherever DNS says.
func (n *Node) LeadsTo(ctx context.Context, host, service string) (bool, error) {
	if len(n.Services) == 0 {
		return service == "", nil
	}
	host = Hostname(host)
	if addr, err := netip.ParseAddr(host); err == nil {
		return n.ServiceAt(addr.Unmap()) == service, nil
	}
	fqdn, err := n.FQDN(ctx)
	if err != nil {
		return false, err
	}
	switch {
	case names(fqdn, host):
		return service == "", nil
	case n.namesService(fqdn, host):
		return service != "" && names(service+"."+domainOf(fqdn), host), nil
	}
	return true, nil
}

// ServiceFQDN returns the tailnet name of a service, empty if the node has none itself.
func (n *Node) ServiceFQDN(ctx context.Context, service string) (string, error) {
	fqdn, err := n.FQDN(ctx)
	if domain := domainOf(fqdn); domain != "" && err == nil {
		return service + "." + domain, nil
	}
	return "", err
}

// domainOf returns the domain in which the tailnet names nodes and services.
func domainOf(fqdn string) string {
	_, domain, _ := strings.Cut(strings.ToLower(fqdn), ".")
	return domain
}

// ServiceAddrs returns the addresses of the services that the server hosts on the node, each
// once.
func (n *Node) ServiceAddrs() (all []netip.Addr) {
	for _, s := range n.Services {
		_, addrs := s.Service()
		for _, a := range addrs {
			if !slices.Contains(all, a.Addr()) {
				all = append(all, a.Addr())
			}
		}
	}
	return all
}

// ServerOf returns the tsnet server that ln listens on, or nil.
func ServerOf(ln net.Listener) *tsnet.Server { return server(ln) }
