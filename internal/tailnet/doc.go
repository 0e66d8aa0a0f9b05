// SPDX-License-Identifier: Apache-2.0

// Package tailnet finds the tailnet node that accepted a connection, and asks that node
// who the peer is.
//
// A Caddy server can listen on several tailnet nodes and on sockets of the host at once,
// and an address alone proves nothing: two tailnets use the same addresses, and anyone can
// give a local interface an address in 100.64.0.0/10. So the answer comes from the
// accepted connection, never from the request:
//
//   - [ConnContext] looks at every connection as the server accepts it. Only a connection
//     that ends in a tsnet node's own network stack counts ([Conn]). A socket of the host
//     does not, nor does a wrapper that may have rewritten the addresses.
//   - [FromListeners] finds the tsnet nodes that the server listens on.
//   - [Nodes.Accepting] picks the node that owns the address that the peer dialled.
//
// Any doubt is an error, and requests that end in an error are refused.
package tailnet
