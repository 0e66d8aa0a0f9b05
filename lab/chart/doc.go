// SPDX-License-Identifier: Apache-2.0

// Package chart tests the Helm chart in charts/caddy-tailscale-impersonate with a real
// Helm, a real API server and the lab's Caddy. The lab has no node, so no pod runs.
package chart
