// SPDX-License-Identifier: Apache-2.0

// Package testcontrol tests, with the control server of Tailscale's own tests, what
// Headscale does not support: devices that were shared in from another tailnet, and
// Tailscale Services. The nodes are real.
package testcontrol
