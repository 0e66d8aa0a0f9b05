// SPDX-License-Identifier: Apache-2.0

package caddyfile

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
)

// route says what the handlers of one of a server's routes are, those that they
// contain included.
type route struct {
	authenticates bool     // tailscale_impersonate
	authorizes    bool     // the same with client_impersonation authorize
	logins        bool     // tailscale_auth, of caddy-tailscale
	proxies       bool     // reverse_proxy
	reviews       bool     // the same with transport kubernetes
	invokes       bool     // invoke, whose handlers are unknown here
	buffers       []string // what holds back parts of an answer
}

// scan returns what the routes of server are.
//
// It reads their configuration: the handlers of the route that is being provisioned
// do not exist yet. Caddy has already removed the configuration of the routes that
// are provisioned.
func scan(server *caddyhttp.Server) (routes []route) {
	for _, configured := range server.Routes {
		var config any
		raw, err := json.Marshal(configured.HandlersRaw)
		if err != nil || json.Unmarshal(raw, &config) != nil {
			continue // Caddy says what is wrong with it
		}
		var r route
		r.add(config)
		routes = append(routes, r)
	}
	return routes
}

// add adds to r the handlers in v, a part of a JSON config.
func (r *route) add(v any) {
	switch v := v.(type) {
	case []any:
		for _, element := range v {
			r.add(element)
		}
	case map[string]any:
		r.addHandler(v)
		for _, element := range v {
			r.add(element)
		}
	}
}

// addHandler adds the handler that the object o configures, if it does.
func (r *route) addHandler(o map[string]any) {
	switch o["handler"] {
	case "tailscale_impersonate":
		r.authenticates = true
		r.authorizes = r.authorizes || o["client_impersonation"] == Authorize
	case "reverse_proxy":
		r.proxies = true
		transport, _ := o["transport"].(map[string]any)
		r.reviews = r.reviews || transport["protocol"] == "kubernetes"
		for _, option := range []string{"request_buffers", "response_buffers"} {
			if o[option] != nil {
				r.buffers = append(r.buffers, option+" of reverse_proxy")
			}
		}
	case "authentication":
		providers, _ := o["providers"].(map[string]any)
		_, tailscale := providers["tailscale"]
		r.logins = r.logins || tailscale
	case "encode":
		r.buffers = append(r.buffers, "encode")
	case "invoke":
		r.invokes = true
	}
}

// CheckRoutes returns an error if c lets clients impersonate and a route of server
// cannot ask the API server whether they may. It logs what else in server's config
// works differently from what one may expect.
//
// It sees the routes as they are configured, and not those that they invoke. A
// request that reaches another transport nevertheless cannot be sent: see
// [impersonate.Identity.SetHeaders].
func (c *Config) CheckRoutes(logger *zap.Logger, server *caddyhttp.Server) error {
	warnOfHTTP3(logger, server)
	if g := (&guard{server: server}); g.isMissing() {
		logger.Warn("a reverse_proxy with transport http can be reached without passing tailscale_impersonate: clients choose the Impersonate headers that it sends; if it leads to an API server, use transport kubernetes")
	}
	routes := scan(server)
	for _, r := range routes {
		if r.authenticates && r.logins {
			logger.Warn("a route of tailscale_impersonate has tailscale_auth too: tagged devices are answered with 401 and no reason")
		}
		if !r.authenticates || len(r.buffers) == 0 {
			continue
		}
		slices.Sort(r.buffers)
		logger.Warn("a route of tailscale_impersonate buffers: watches and followed logs may come late or not at all",
			zap.Strings("because_of", slices.Compact(r.buffers)))
	}
	if c.ClientImpersonation != Authorize {
		return nil
	}
	for _, r := range routes {
		if r.authorizes && r.proxies && !r.reviews && !r.invokes {
			return errors.New("client_impersonation authorize needs transport kubernetes in reverse_proxy, as its account asks the API server whether callers may act as other users")
		}
	}
	if !slices.ContainsFunc(server.ExpectedDotHeaders, func(name string) bool {
		return strings.HasPrefix(strings.ToLower(name), "impersonate-extra-")
	}) {
		logger.Info("extra fields that clients ask for with kubectl --as are dropped by Caddy if their key has a dot; name them in expected_dot_headers of the servers option if you use them")
	}
	return nil
}

// warnOfHTTP3 logs which of server's listeners offer HTTP/3 on a tailnet node. Each is a
// UDP socket of the node's address, for which caddy-tailscale waits without a limit.
func warnOfHTTP3(logger *zap.Logger, server *caddyhttp.Server) {
	if len(server.TLSConnPolicies) == 0 {
		return // HTTP/3 needs TLS
	}
	for i, listen := range server.Listen {
		protocols := server.Protocols
		if i < len(server.ListenProtocols) && server.ListenProtocols[i] != nil {
			protocols = server.ListenProtocols[i]
		}
		address, err := caddy.ParseNetworkAddress(listen)
		if err == nil && address.Network == "tailscale" && slices.Contains(protocols, "h3") {
			logger.Warn("a tailnet listener offers HTTP/3, which is refused: Caddy cannot start before the node is on its tailnet; write protocols h1 h2 in the servers option",
				zap.String("listen", listen))
		}
	}
}
