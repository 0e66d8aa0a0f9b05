// SPDX-License-Identifier: Apache-2.0

// Package install tests what a user installs: the container image and the Helm chart, on
// a real node. Its replicas are pods that run the image as the chart says, and join a
// tailnet. The image has the lab's stand-in for caddy-tailscale.
package install
