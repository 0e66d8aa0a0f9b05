// SPDX-License-Identifier: Apache-2.0

// Package tailnet answers which tailnet node accepted a connection, and passes
// that node the question who is at the other end.
//
// A Caddy server can listen on several tailnet nodes and on plain sockets at
// once, and an address means nothing by itself: two tailnets hand out the same
// ones, and anybody can give a local interface an address out of 100.64.0.0/10.
// So the answer is taken from the accepted connection, never from the request:
//
//   - [ConnContext] looks at every connection as the server accepts it. Only one
//     that ends in a tsnet node's own network stack counts ([Conn]); a socket of
//     the host, or a wrapper that may have rewritten the addresses, does not.
//   - [FromListeners] finds the tsnet nodes that the server listens on.
//   - [Nodes.Accepting] picks the one that owns the address the peer dialled.
//
// Whatever is in doubt on that way is an error, and an error is a refused
// request.
package tailnet
