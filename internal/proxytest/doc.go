// SPDX-License-Identifier: Apache-2.0

// Package proxytest has what tests of the proxy share: a tailnet in memory, nodes
// that answer WhoIs as a test wants, an API server that records what it receives,
// clients that send raw HTTP/1.1 and HTTP/2, exec sessions over both protocols, and
// a Caddy between them. Only tests import it.
//
// The tailnet is a gvisor network stack, as tsnet uses it, on which the node and
// all peers are one host. So a connection of these tests has the type that the proxy
// looks for. Only the answers to WhoIs are made up.
package proxytest
