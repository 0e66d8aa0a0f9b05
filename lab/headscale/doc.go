// SPDX-License-Identifier: Apache-2.0

// Package headscale runs a tailnet on the loopback interface: the real Headscale as
// its control server, in a process of its own, a DERP relay and a STUN server.
// Several tailnets can run side by side. Each numbers its nodes from 100.64.0.1, so
// they use the same addresses, but share nothing else.
//
// Headscale reads Tailscale's policy file and passes the rules of grants to nodes
// unchanged, so WhoIs returns what it would return with Tailscale's own control
// server.
//
// Nodes of the tailnet should run with TS_NO_LOGS_NO_SUPPORT=true, so that they do
// not send their logs to Tailscale.
package headscale
