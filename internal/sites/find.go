// SPDX-License-Identifier: Apache-2.0

package sites

import (
	"context"
	"net/http"
	neturl "net/url"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/rewrite"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/service"
)

// find returns where the sites are to be found. Their config has been provisioned.
func find(sites []Site, httpPort int) (places []*place) {
	// claimed are doors that lead to another handler. The first in the config answers.
	type claim struct {
		server *caddyhttp.Server
		door   door
	}
	claimed := make(map[claim]bool)
	for _, site := range sites {
		p := &place{Site: site}
		w := &walk{server: site.Server, handler: site.Handler, whoami: site.Whoami}
		w.routes(site.Server.Routes, way{}, 0)
		for _, d := range w.doors(ports(site, httpPort)) {
			if at := (claim{site.Server, d}); !claimed[at] && len(p.doors) < maxDoors {
				claimed[at] = true
				p.doors = append(p.doors, d)
			}
		}
		if len(p.doors) > 0 {
			places = append(places, p)
		}
	}
	return places
}

// ports returns the ports on which a site listens on its tailnet nodes, and on services that
// they host.
func ports(site Site, httpPort int) (doors []authn.Door) {
	for _, listen := range site.Server.Listen {
		address, err := caddy.ParseNetworkAddress(listen)
		if err != nil || address.IsUnixNetwork() || address.IsFdNetwork() {
			continue
		}
		// A plain socket is of the host, and not of a node, unless the host is the node.
		if strings.HasPrefix(address.Network, "tcp") != site.Auth.HostSockets {
			continue
		}
		port := uint16(address.StartPort) //nolint:gosec // it was parsed as such
		tls := len(site.Server.TLSConnPolicies) > 0 && int(port) != httpPort
		name, _ := service.Name(address)
		if d := (authn.Door{Port: port, TLS: tls, Service: name}); !slices.Contains(doors, d) {
			doors = append(doors, d)
		}
	}
	return doors
}

// walk looks for ways to a handler.
type walk struct {
	server  *caddyhttp.Server
	handler caddyhttp.MiddlewareHandler
	whoami  string
	found   []way
}

// way is a way to a place in the config.
type way struct {
	// hosts are the names that lead here, nil for any.
	hosts []string
	// prefix is what has been removed from the start of the path.
	prefix string
	paths  []condition
}

// condition is on what is left of the path where prefix has been removed.
type condition struct {
	prefix string
	match  caddyhttp.MatchPath
}

// maxDepth is how deep routes are followed. Named routes can invoke one another.
const maxDepth = 32

// routes follows routes. It leaves out what lies behind matchers other than those for hosts
// and paths: they are about the request, such as where it comes from.
func (w *walk) routes(routes caddyhttp.RouteList, at way, depth int) {
	if depth > maxDepth {
		return
	}
	for _, route := range routes {
		for _, here := range at.through(route.MatcherSets) {
			after, ok := w.handlers(route.Handlers, here, depth)
			if len(route.MatcherSets) > 0 {
				continue
			}
			if !ok {
				return // all that follows has a path that is not known
			}
			at.prefix = after.prefix
		}
	}
}

// handlers follows the handlers of one route. It returns how the request leaves them, and
// whether that is known.
func (w *walk) handlers(handlers []caddyhttp.MiddlewareHandler, at way, depth int) (way, bool) {
	for _, handler := range handlers {
		if handler == w.handler {
			w.found = append(w.found, at)
			return at, true
		}
		switch handler := handler.(type) {
		case *rewrite.Rewrite:
			prefix := handler.StripPathPrefix
			if strings.Contains(prefix, "{") || handler.URI != "" || handler.StripPathSuffix != "" || len(handler.URISubstring) > 0 || len(handler.PathRegexp) > 0 {
				return at, false
			}
			if prefix != "" {
				at.prefix += escaped(prefix)
			}
		case *caddyhttp.Subroute:
			w.routes(handler.Routes, at, depth+1)
		case *caddyhttp.Invoke:
			if named := w.server.NamedRoutes[handler.Name]; named != nil {
				w.routes(caddyhttp.RouteList{*named}, at, depth+1)
			}
		}
	}
	return at, true
}

// escaped returns a path as it is written in a URL.
func escaped(path string) string {
	if plain, err := neturl.PathUnescape(path); err == nil {
		path = plain
	}
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	return (&neturl.URL{Path: path}).EscapedPath()
}

// through returns the ways that lead through matchers.
func (at way) through(sets caddyhttp.MatcherSets) (ways []way) {
	if len(sets) == 0 {
		return []way{at}
	}
	for _, set := range sets {
		if here, ok := at.matching(set); ok {
			ways = append(ways, here)
		}
	}
	return ways
}

// matching returns the way through a set of matchers.
func (at way) matching(set caddyhttp.MatcherSet) (way, bool) {
	at.paths = slices.Clone(at.paths)
	for _, matcher := range set {
		switch m := matcher.(type) {
		case *caddyhttp.MatchHost:
			at.hosts = both(at.hosts, *m)
		case *caddyhttp.MatchPath:
			at.paths = append(at.paths, condition{at.prefix, *m})
		default:
			return at, false
		}
	}
	return at, at.hosts == nil || len(at.hosts) > 0
}

// both returns the hosts that are in a and b. It is not nil.
func both(a, b []string) []string {
	if a == nil {
		return append([]string{}, b...)
	}
	return slices.DeleteFunc(slices.Clone(a), func(host string) bool { return !slices.Contains(b, host) })
}

// doors returns the URLs of the site at these ports.
func (w *walk) doors(ports []authn.Door) (doors []door) {
	for _, at := range w.found {
		if !at.leadsTo(w.whoami) {
			continue
		}
		hosts := at.hosts
		if hosts == nil {
			hosts = []string{""}
		}
		for _, host := range hosts {
			if host != "" && !isName(host) {
				continue
			}
			for _, d := range ports {
				d.Host = host
				doors = append(doors, door{d, at.prefix})
			}
		}
	}
	return doors
}

// isName reports whether other devices may use host: it is neither a pattern nor the name of
// the device itself.
func isName(host string) bool {
	return !strings.ContainsAny(host, "*{") && host != "localhost" && !strings.HasSuffix(host, ".localhost")
}

// leadsTo reports whether requests for a path, below what is removed, go this way.
func (at way) leadsTo(path string) bool {
	ctx := context.WithValue(context.Background(), caddy.ReplacerCtxKey, caddy.NewReplacer())
	for _, c := range at.paths {
		raw := strings.TrimPrefix(at.prefix, c.prefix) + path
		plain, err := neturl.PathUnescape(raw)
		if err != nil {
			return false
		}
		r := (&http.Request{Method: http.MethodGet, URL: &neturl.URL{Path: plain, RawPath: raw}}).WithContext(ctx)
		if ok, err := c.match.MatchWithError(r); !ok || err != nil {
			return false
		}
	}
	return true
}
