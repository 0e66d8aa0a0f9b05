// SPDX-License-Identifier: Apache-2.0

// Package sitepath knows the path of a site below which an API server is, as with
// handle_path, and keeps it in the redirects of proxied applications.
package sitepath

import (
	"net/http"
	"net/url"
	"regexp"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade"
)

// Of returns what the config has removed from the start of r's path, as handle_path does:
// the path of the site, as it is written in a URL.
func Of(r *http.Request) string {
	original, ok := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request)
	if !ok || original.URL.Path == r.URL.Path {
		return ""
	}
	prefix, ok := strings.CutSuffix(original.URL.EscapedPath(), r.URL.EscapedPath())
	if !ok {
		return ""
	}
	return prefix
}

// app matches the path of an application that the API server proxies, up to where the
// application's own path begins.
var app = regexp.MustCompile(`^/(?:api/[^/]+|apis/[^/]+/[^/]+)(?:/namespaces/[^/]+)?/[^/]+/[^/]+/proxy(?:/|$)`)

// KeepInRedirects returns w, which answers r, such that redirects within an application keep
// the path of the site. The API server, which does not know that path, has redirects lead to
// below its own path of the application. Nothing else changes.
func KeepInRedirects(w http.ResponseWriter, r *http.Request) http.ResponseWriter {
	prefix := Of(r)
	if prefix == "" || upgrade.Requested(r.Header) {
		return w
	}
	root := app.FindString(r.URL.Path)
	if root == "" {
		return w
	}
	return &redirects{
		ResponseWriterWrapper: &caddyhttp.ResponseWriterWrapper{ResponseWriter: w},
		prefix:                prefix, root: strings.TrimSuffix(root, "/"), host: r.Host,
	}
}

// redirects is the answer of an application.
type redirects struct {
	*caddyhttp.ResponseWriterWrapper
	prefix string // of the site, escaped
	root   string // of the application, behind it
	host   string // of the request
}

// WriteHeader implements [http.ResponseWriter].
func (w *redirects) WriteHeader(code int) {
	if location := w.Header().Values("Location"); code >= 200 && len(location) == 1 {
		location[0] = w.target(location[0])
	}
	w.ResponseWriterWrapper.WriteHeader(code)
}

// target returns where a redirect leads to.
func (w *redirects) target(location string) string {
	u, err := url.Parse(location)
	if err != nil || u.Opaque != "" || u.User != nil || u.Host != "" && !strings.EqualFold(u.Host, w.host) {
		return location
	}
	if u.Host == "" && (u.Scheme != "" || strings.HasPrefix(location, "//")) {
		return location
	}
	if rest, ok := strings.CutPrefix(u.Path, w.root); !ok || rest != "" && rest[0] != '/' {
		return location
	}
	before := ""
	if u.Host != "" {
		start := strings.Index(location, "//") + len("//") + len(u.Host)
		before, location = location[:start], location[start:]
	}
	return before + w.prefix + location
}

// Interface guards
var _ http.ResponseWriter = (*redirects)(nil)
