// SPDX-License-Identifier: Apache-2.0

// Package testcontrol tests, against the control server of Tailscale's own tests,
// what Headscale does not have: devices that were shared in from another tailnet.
// The nodes are real ones.
package testcontrol
