// SPDX-License-Identifier: Apache-2.0

package caddyfile

import (
	"encoding/json"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// guard looks for a reverse_proxy with transport http that requests may reach without
// passing tailscale_impersonate. Unlike transport kubernetes, that sends what the client
// sent, with the credentials that the config adds.
type guard struct {
	server *caddyhttp.Server
	// missing reports whether there is one.
	missing bool
	// invoking are the named routes that are being followed.
	invoking map[string]bool
}

// isMissing reports whether a route of server lacks tailscale_impersonate. Routes that have
// been provisioned consist of handlers, the others of their configuration.
func (g *guard) isMissing() bool {
	g.invoking = make(map[string]bool)
	g.follow(g.server.Routes, false)
	if g.server.Errors != nil {
		g.follow(g.server.Errors.Routes, false) // an error may come before the handler
	}
	return g.missing
}

// follow follows routes. passed says whether every request has passed the handler that gets
// there. It returns whether every one has that leaves them.
func (g *guard) follow(routes caddyhttp.RouteList, passed bool) bool {
	guarded := make(map[string]bool) // by matchers
	for _, r := range routes {
		matchers := ""
		if len(r.MatcherSetsRaw) > 0 {
			text, _ := json.Marshal(r.MatcherSetsRaw) // it came from JSON
			matchers = string(text)
		}
		here := passed || guarded[matchers]
		for _, config := range r.HandlersRaw {
			here = g.configured(config, here)
		}
		for _, handler := range r.Handlers {
			here = g.provisioned(handler, here)
		}
		switch {
		case matchers != "":
			guarded[matchers] = here
		case len(r.MatcherSets) == 0 && r.Group == "":
			passed = here
		}
	}
	return passed
}

// configured follows the handler that config is for.
func (g *guard) configured(config json.RawMessage, passed bool) bool {
	var handler struct {
		Handler   string              `json:"handler"`
		Name      string              `json:"name"`
		Routes    caddyhttp.RouteList `json:"routes"`
		Transport struct {
			Protocol string `json:"protocol"`
		} `json:"transport"`
	}
	if json.Unmarshal(config, &handler) != nil {
		return passed // Caddy says what is wrong with it, or it is none of these
	}
	switch handler.Handler {
	case "tailscale_impersonate":
		return true
	case "reverse_proxy":
		plain := handler.Transport.Protocol == "" || handler.Transport.Protocol == "http"
		g.missing = g.missing || plain && !passed
	case "invoke":
		return g.invoke(handler.Name, passed)
	case "subroute":
		return g.follow(handler.Routes, passed)
	}
	return passed
}

// provisioned follows handler.
func (g *guard) provisioned(handler caddyhttp.MiddlewareHandler, passed bool) bool {
	switch handler := handler.(type) {
	case *reverseproxy.Handler:
		_, plain := handler.Transport.(*reverseproxy.HTTPTransport)
		g.missing = g.missing || plain && !passed
	case *caddyhttp.Invoke:
		return g.invoke(handler.Name, passed)
	case *caddyhttp.Subroute:
		return g.follow(handler.Routes, passed)
	case caddy.Module:
		return passed || handler.CaddyModule().ID == "http.handlers.tailscale_impersonate"
	}
	return passed
}

// invoke follows a named route.
func (g *guard) invoke(name string, passed bool) bool {
	named := g.server.NamedRoutes[name]
	if named == nil || g.invoking[name] {
		return passed
	}
	g.invoking[name] = true
	defer delete(g.invoking, name)
	return g.follow(caddyhttp.RouteList{*named}, passed)
}
