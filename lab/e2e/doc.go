// SPDX-License-Identifier: Apache-2.0

// Package e2e tests the plugin between a real kubectl on a tailnet and a real API
// server. The tests share one lab, with one Caddy whose sites differ in the handlers
// around the plugin's; see sites_test.go.
package e2e
