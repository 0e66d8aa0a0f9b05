// SPDX-License-Identifier: Apache-2.0

// Command caddy is Caddy with the plugin, and with the lab's stand-in where
// caddy-tailscale would be. The lab's image holds it; it is never shipped.
package main

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	// Caddy's own modules.
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/tailscale-impersonate/caddy-tailscale-impersonate"
	_ "github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/standin"
)

func main() {
	caddycmd.Main()
}
