// SPDX-License-Identifier: Apache-2.0

// Package headscale runs a tailnet on the loopback interface: the real
// Headscale as its control server, in a process of its own, a DERP relay and a
// STUN server. Several tailnets can run side by side. As each of them numbers its
// nodes from 100.64.0.1 on, they share addresses and nothing else.
//
// Headscale reads the policy file of Tailscale and hands the rules of a grant to
// the nodes as they are, so what a node learns from WhoIs here is what it would
// learn from Tailscale's own control server.
//
// Nodes of the tailnet should run with TS_NO_LOGS_NO_SUPPORT=true, so that they
// do not send their logs to Tailscale.
package headscale
