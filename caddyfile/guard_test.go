// SPDX-License-Identifier: Apache-2.0

package caddyfile_test

import (
	"encoding/json"
	"net/http"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	tailscaleimpersonate "github.com/tailscale-impersonate/caddy-tailscale-impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
)

// warnsOfUnguarded reports whether CheckRoutes warns of a reverse_proxy that the handler
// does not guard.
func warnsOfUnguarded(t *testing.T, server *caddyhttp.Server) bool {
	t.Helper()
	core, logs := observer.New(zap.WarnLevel)
	if err := new(caddyfile.Config).CheckRoutes(zap.New(core), server); err != nil {
		t.Fatal(err)
	}
	return logs.FilterMessageSnippet("without passing tailscale_impersonate").Len() > 0
}

func TestCheckRoutes_WarnsOfUnguardedProxy(t *testing.T) {
	const (
		ours       = `{"handler":"tailscale_impersonate"}`
		plain      = `{"handler":"reverse_proxy"}`
		http       = `{"handler":"reverse_proxy","transport":{"protocol":"http"}}`
		kubernetes = `{"handler":"reverse_proxy","transport":{"protocol":"kubernetes"}}`
		fastcgi    = `{"handler":"reverse_proxy","transport":{"protocol":"fastcgi"}}`
		invoke     = `{"handler":"invoke","name":"cluster"}`
		onA, onB   = `"match":[{"path":["/a"]}],`, `"match":[{"path":["/b"]}],`
	)
	route := func(match string, handlers string) string { return `{` + match + `"handle":[` + handlers + `]}` }
	sub := func(routes string) string { return `{"handler":"subroute","routes":[` + routes + `]}` }
	for _, tt := range []struct {
		name, routes, errors, named string
		want                        bool
	}{
		{"behind the handler", route("", ours+","+plain), "", "", false},
		{"in front of the handler", route("", plain+","+ours), "", "", true},
		{"in front of the handler, transport http", route("", http+","+ours), "", "", true},
		{"in front of the handler, transport kubernetes", route("", kubernetes+","+ours), "", "", false},
		{"in front of the handler, another transport", route("", fastcgi+","+ours), "", "", false},
		{"in the next route", route("", ours) + "," + route("", plain), "", "", false},
		{"in the next route, the handler has a matcher", route(onA, ours) + "," + route("", plain), "", "", true},
		{"in the next route, both have the same matcher", route(onA, ours) + "," + route(onA, plain), "", "", false},
		{"in the next route, both have other matchers", route(onA, ours) + "," + route(onB, plain), "", "", true},
		{"in the next route, the handler is in a group", route(`"group":"g",`, ours) + "," + route("", plain), "", "", true},
		{"in the route before", route(onA, plain) + "," + route("", ours), "", "", true},
		{"behind a subroute with the handler", route("", sub(route("", ours))+","+plain), "", "", false},
		{"behind a subroute that may have the handler", route("", sub(route(onA, ours))+","+plain), "", "", true},
		{"in a subroute behind the handler", route("", ours+","+sub(route(onA, plain))), "", "", false},
		{"in a subroute with the handler", route("", sub(route("", ours)+","+route(onA, plain))), "", "", false},
		{"in another site", route(onA, sub(route("", ours))) + "," + route(onB, sub(route("", plain))), "", "", true},
		{"in handle_errors", route("", ours), route("", plain), "", true},
		{"in handle_errors behind a handler", route("", ours), route("", ours+","+plain), "", false},
		{"in a named route", route("", ours) + "," + route("", invoke), "", route("", plain), false},
		{"in a named route, invoked before", route("", invoke) + "," + route("", ours), "", route("", plain), true},
		{"behind a named route with the handler", route("", invoke+","+plain), "", route("", ours), false},
		{"behind a named route without the handler", route("", invoke+","+plain), "", route("", kubernetes), true},
		{"behind a named route that does not exist", route("", invoke+","+plain), "", "", true},
		{"behind the handler and a named route that does not exist", route("", ours+","+invoke+","+plain), "", "", false},
		{"in a named route, invoked behind the handler and without", route(onA, ours+","+invoke) + "," + route(onB, invoke), "", route("", plain), true},
		{"in front of the handler, with another behind", route("", plain+","+ours+","+plain), "", "", true},
		{"behind another handler", route("", `{"handler":"headers"},`+plain), "", "", true},
		{"behind the handler and another", route("", ours+`,{"handler":"headers"},`+plain), "", "", false},
		{"behind the handler and one that is no config", route("", ours+`,{"handler":1},`+plain), "", "", false},
		{"behind one that is no config", route("", `{"handler":1},`+plain), "", "", true},
		{"in one that is no config", route("", `{"handler":"reverse_proxy","transport":1}`), "", "", false},
		{"a named route that invokes itself", route("", invoke+","+ours+","+plain), "", route("", invoke), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var server caddyhttp.Server
			config := `{"routes":[` + tt.routes + `],"errors":{"routes":[` + tt.errors + `]}}`
			if err := json.Unmarshal([]byte(config), &server); err != nil {
				t.Fatal(err)
			}
			if tt.named != "" {
				server.NamedRoutes = map[string]*caddyhttp.Route{"cluster": new(caddyhttp.Route)}
				if err := json.Unmarshal([]byte(tt.named), server.NamedRoutes["cluster"]); err != nil {
					t.Fatal(err)
				}
			}
			if got := warnsOfUnguarded(t, &server); got != tt.want {
				t.Errorf("warned: %t; want %t", got, tt.want)
			}
		})
	}
}

// Of a route that Caddy has provisioned, only the handlers are left.
func TestCheckRoutes_WarnsOfUnguardedProxyInProvisionedRoute(t *testing.T) {
	plain := &reverseproxy.Handler{Transport: new(reverseproxy.HTTPTransport)}
	named := map[string]*caddyhttp.Route{"cluster": {Handlers: []caddyhttp.MiddlewareHandler{plain}}}
	for name, tt := range map[string]struct {
		handler caddyhttp.MiddlewareHandler
		want    bool
	}{
		"transport http":    {plain, true},
		"another transport": {new(reverseproxy.Handler), false},
		"a subroute":        {&caddyhttp.Subroute{Routes: caddyhttp.RouteList{{Handlers: []caddyhttp.MiddlewareHandler{plain}}}}, true},
		"a named route":     {&caddyhttp.Invoke{Name: "cluster"}, true},
		"another handler":   {new(caddyhttp.StaticResponse), false},
	} {
		t.Run(name, func(t *testing.T) {
			server := serverWith(t, `[{"handler":"tailscale_impersonate"}]`)
			server.NamedRoutes = named
			server.Routes = append(caddyhttp.RouteList{{Handlers: []caddyhttp.MiddlewareHandler{tt.handler}}}, server.Routes...)
			if got := warnsOfUnguarded(t, server); got != tt.want {
				t.Errorf("warned: %t; want %t", got, tt.want)
			}
		})
	}
}

// notAModule is a handler that is no Caddy module.
type notAModule struct{}

func (notAModule) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	return next.ServeHTTP(w, r)
}

func TestCheckRoutes_ProvisionedHandlerGuardsWhatIsBehind(t *testing.T) {
	type handlers = []caddyhttp.MiddlewareHandler
	var (
		ours       = new(tailscaleimpersonate.Handler)
		plain      = &reverseproxy.Handler{Transport: new(reverseproxy.HTTPTransport)}
		kubernetes = new(reverseproxy.Handler)
		sub        = &caddyhttp.Subroute{Routes: caddyhttp.RouteList{{Handlers: handlers{kubernetes}}}}
		invoke     = &caddyhttp.Invoke{Name: "cluster"}
		other      = new(caddyhttp.StaticResponse)
		onGet      = caddyhttp.MatcherSets{{caddyhttp.MatchMethod{"GET"}}}
	)
	for _, tt := range []struct {
		name     string
		matchers caddyhttp.MatcherSets
		first    handlers // the next route has transport http
		want     bool
	}{
		{"the handler", nil, handlers{ours}, false},
		{"the handler for some requests", onGet, handlers{ours}, true},
		{"the handler and transport http", nil, handlers{ours, plain}, false},
		{"transport http, the handler and transport http", nil, handlers{plain, ours, plain}, true},
		{"another handler", nil, handlers{other}, true},
		{"the handler and another", nil, handlers{ours, other}, false},
		{"no module", nil, handlers{notAModule{}}, true},
		{"the handler and no module", nil, handlers{ours, notAModule{}}, false},
		{"a subroute", nil, handlers{sub}, true},
		{"the handler and a subroute", nil, handlers{ours, sub}, false},
		{"a named route", nil, handlers{invoke}, true},
		{"the handler and a named route", nil, handlers{ours, invoke}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server := serverWith(t, `[{"handler":"reverse_proxy"}]`)
			server.NamedRoutes = map[string]*caddyhttp.Route{"cluster": {Handlers: handlers{kubernetes}}}
			server.Routes = append(caddyhttp.RouteList{{MatcherSets: tt.matchers, Handlers: tt.first}}, server.Routes...)
			if got := warnsOfUnguarded(t, server); got != tt.want {
				t.Errorf("warned: %t; want %t", got, tt.want)
			}
		})
	}
}
