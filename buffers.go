// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"encoding/json"
	"slices"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
)

// warnOfBuffers warns of handlers in a route of tailscale_impersonate that keep
// back what a watch or a followed log says, until there is more of it.
//
// It reads the routes as they are configured: the handlers of the route that is
// being provisioned do not exist yet. Those of others are gone from there already,
// or not of this handler.
func warnOfBuffers(logger *zap.Logger, server *caddyhttp.Server) {
	for _, route := range server.Routes {
		var config any
		raw, err := json.Marshal(route.HandlersRaw)
		if err != nil || json.Unmarshal(raw, &config) != nil {
			continue // Caddy says what is wrong with it
		}
		var found []string
		ours := false
		objects(config, func(o map[string]any) {
			switch o["handler"] {
			case "tailscale_impersonate":
				ours = true
			case "encode":
				found = append(found, "encode")
			case "reverse_proxy":
				for _, option := range []string{"request_buffers", "response_buffers"} {
					if o[option] != nil {
						found = append(found, option+" of reverse_proxy")
					}
				}
			}
		})
		if !ours || len(found) == 0 {
			continue
		}
		slices.Sort(found)
		logger.Warn("a route of tailscale_impersonate buffers: watches and followed logs may come late or not at all",
			zap.Strings("because_of", slices.Compact(found)))
	}
}

// objects calls f for every JSON object in v.
func objects(v any, f func(map[string]any)) {
	switch v := v.(type) {
	case []any:
		for _, element := range v {
			objects(element, f)
		}
	case map[string]any:
		f(v)
		for _, element := range v {
			objects(element, f)
		}
	}
}
