// SPDX-License-Identifier: Apache-2.0

// Package tailscaled tests the plugin with a Tailscale daemon of the host, which
// here has a network interface in a network namespace that ends with the test.
package tailscaled
