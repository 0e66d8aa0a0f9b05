// SPDX-License-Identifier: Apache-2.0

// Package replicas runs two replicas behind one name, each a Caddy in a process of its
// own, while one of them is killed, hangs or restarts. The clients are programs on a machine
// that is on the tailnet by tailscaled, with its network interface and its DNS: what they do
// about a replica that does not answer is their own.
package replicas
