// SPDX-License-Identifier: Apache-2.0

// Package e2e tests the module where it is used: between kubectl on a tailnet and
// a real API server. The tests share one lab, with one Caddy whose sites differ in
// what is in front of and behind the handler; see sites.go.
package e2e
