// SPDX-License-Identifier: Apache-2.0

// Package service is the Caddy network tailscale-service, which listens on a Tailscale
// Service: one name and address for several nodes of a tailnet.
//
//	bind tailscale-service/<node>/<service>
//
// The node is one that caddy-tailscale runs, as with "bind tailscale/<node>". The package
// does not import that plugin: Caddy opens a listener on the node, and the listener tells
// its tsnet server.
//
// A node of tsnet ends connections to a service by itself, or passes them on to a socket of
// the host, to which every process of the host can write. Neither is of use here. With a
// port that the node's serve config names, and for which it has no handler, the node takes
// the packets and leaves the connection to a tsnet listener on the service's own address.
// It comes as one to the node's own address does, from the peer's tailnet address, and
// nothing in between can have changed it.
//
// A later "bind tailscale/<node>+<service>" of caddy-tailscale could take the place of this
// package. Only internal/sites knows the network by its name, to tell the URLs of sites. All
// else asks a listener, whatever opened it: tailnet.FromListeners looks below the layers of
// Caddy for one that has the methods of tailnet.Service, and Server of tsnet's listeners. That
// plugin's would have to have them: without the addresses of the service, requests are
// refused, as no node owns the address that the caller dialled. Its connections would have to
// come from the caller's own address, and not through a socket of the host or with a PROXY
// header, which are refused as well. And it must not take back what a config that replaces
// another still needs.
//
// What the node may host is up to the control server, which can change it at any time. So a
// listener opens at once, with or without an address, and [hosting] follows what the node
// is told.
package service
