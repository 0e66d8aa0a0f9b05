// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/pin"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

const (
	chromium   = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/156.0.0.0 Safari/537.36"
	powerShell = "Mozilla/5.0 (Windows NT 10.0; Microsoft Windows 10.0.26100; en-US) PowerShell/7.5.0"
	api        = "/api/v1/namespaces/default/secrets"
	app        = "/api/v1/namespaces/default/services/web/proxy/"
)

var webSocket = []string{"Connection", "Upgrade", "Upgrade", "websocket", "Sec-Websocket-Version", "13", "Sec-Websocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="}

// asPage returns the request of a page: a browser sends it. kind is a method, or WS for a
// WebSocket.
func asPage(kind, target string, headers ...string) *http.Request {
	method := kind
	if kind == "WS" {
		method, headers = "GET", slices.Concat(headers, webSocket)
	}
	return proxytest.NewRequest(method, target, headers...)
}

// TestCheckOrigin is the table of checkOrigin. The node is not asked about a request that
// is refused.
func TestCheckOrigin(t *testing.T) {
	const (
		none = ""
		read = "GET"
		http = "GET POST"
		ws   = "WS"
		all  = "GET POST WS"

		allowed = "https://dashboard.example.com"
		evil    = "https://evil.example.com"
	)
	browser := func(headers ...string) []string { return append([]string{"User-Agent", chromium}, headers...) }
	for _, tt := range []struct {
		name    string
		scheme  string // https if empty
		headers []string
		// Which kinds of requests may reach the API, and an application.
		api, app string
	}{
		// Pages of allowed origins.
		{"allowed origin", "", browser("Origin", allowed), all, all},
		{"allowed origin, cross-site", "", browser("Origin", allowed, "Sec-Fetch-Site", "cross-site"), all, all},
		{"allowed origin to http", "http", browser("Origin", allowed), all, all},
		{"allowed origin with any name and port", "", browser("Origin", "https://a1b2.renderer.example.app:40123", "Sec-Fetch-Site", "same-origin"), all, all},
		{"allowed origin with any port", "", browser("Origin", "http://localhost:4466"), all, all},
		{"allowed desktop application", "", browser("Origin", "file://"), all, all},
		{"allowed page, through a local program", "", browser("Sec-Fetch-Site", "same-origin", "Referer", "https://a1b2.renderer.example.app:40123/x"), all, all},
		{"allowed origin's port", "", browser("Origin", allowed+":8443"), none, none},
		{"allowed origin over http", "", browser("Origin", "http://dashboard.example.com"), none, none},
		{"allowed origin's subdomain", "", browser("Origin", "https://x.dashboard.example.com"), none, none},
		{"allowed origin as a prefix", "", browser("Origin", allowed+".evil.example.com"), none, none},
		{"allowed origin in upper case", "", browser("Origin", strings.ToUpper(allowed)), none, none},
		{"no name where any is allowed", "", browser("Origin", "https://renderer.example.app:40123"), none, none},
		{"no port where any is allowed", "", browser("Origin", "https://a1b2.renderer.example.app"), none, none},
		{"allowed origin as a path", "", browser("Origin", "https://evil.example.com/.renderer.example.app:1"), none, none},
		{"second origin", "", browser("Origin", allowed, "Origin", evil), none, none},
		{"first origin", "", browser("Origin", evil, "Origin", allowed), none, none},
		{"origins in one value", "", browser("Origin", evil+", https://a1b2.renderer.example.app:40123"), none, none},
		{"another page, through a local program", "", browser("Sec-Fetch-Site", "cross-site", "Referer", allowed), none, none},

		// Programs.
		{"kubectl", "", []string{"User-Agent", "kubectl/v1.37.2"}, all, all},
		{"kubectl over http", "http", []string{"User-Agent", "kubectl/v1.37.2"}, all, all},
		{"no header", "", nil, all, all},
		{"Node's fetch", "", []string{"User-Agent", "node", "Sec-Fetch-Mode", "cors"}, all, all},
		{"PowerShell", "", []string{"User-Agent", powerShell}, all, none},
		{"Python's websocket-client", "", []string{"Origin", "http://k8s"}, all, all},
		{"Python's websocket-client over http", "http", []string{"Origin", "http://k8s"}, ws, ws},
		{"newer websocket-client", "", []string{"Origin", "https://k8s"}, all, all},
		{"with a port", "", []string{"Origin", "https://k8s:443"}, all, all},
		{"in upper case", "", []string{"Origin", "HTTPS://K8S."}, all, all},
		{"Headlamp", "", []string{"Origin", "k8s"}, all, all},
		{"Headlamp, with a port", "", []string{"Origin", "k8s:443"}, all, all},
		{"fabric8", "", []string{"User-Agent", "fabric8-kubernetes-client/7.4.0", "Origin", "https://k8s"}, all, all},
		{"Kubernetes' own tests", "", []string{"Origin", "http://localhost"}, all, all},
		{"through a local proxy", "", []string{"Origin", "http://127.0.0.1:8001"}, all, all},
		{"through a local proxy over IPv6", "", []string{"Origin", "http://[::1]:8001"}, all, all},
		{"embedded browser with a name of its own", "", []string{"User-Agent", "Reader/1.0", "Origin", evil}, none, none},
		{"embedded browser, null origin", "", []string{"Origin", "null"}, none, none},
		{"embedded browser, empty origin", "", []string{"Origin", ""}, none, none},
		{"embedded browser, sibling", "", []string{"Origin", "https://sub.k8s"}, none, none},
		{"embedded browser, second origin", "", []string{"Origin", "https://k8s", "Origin", evil}, none, none},

		// Browsers that do not say which page sends a request.
		{"page over http", "http", browser(), all, none},
		{"old browser", "", browser(), all, none},
		{"page over http with a body", "http", browser("Origin", "http://k8s"), none, ws},

		// WebSockets of this site's pages, and old browsers.
		{"own origin", "", browser("Origin", "https://k8s"), none, ws},
		{"own origin over http", "", browser("Origin", "http://k8s"), none, none},
		{"own origin with a port", "", browser("Origin", "https://k8s:8443"), none, none},
		{"own origin in upper case", "", browser("Origin", "https://K8S"), none, none},
		{"sibling", "", browser("Origin", "https://sub.k8s"), none, none},
		{"local page", "", browser("Origin", "http://localhost:8080"), none, none},
		{"desktop application", "", browser("Origin", "app://."), none, none},
		{"other origin", "", browser("Origin", evil), none, none},
		{"other origin to http", "http", browser("Origin", evil), none, none},
		{"null origin", "", browser("Origin", "null"), none, none},
		{"empty origin", "", browser("Origin", ""), none, none},
		{"Firefox's WebSocket", "", browser("Origin", evil, "Sec-Fetch-Site", "same-origin"), none, http},

		// What browsers say.
		{"typed into the address bar", "", browser("Sec-Fetch-Site", "none"), all, all},
		{"extension", "", browser("Sec-Fetch-Site", "none", "Origin", "chrome-extension://abcdefgh"), none, none},
		{"own page", "", browser("Sec-Fetch-Site", "same-origin"), none, all},
		{"own page with a body", "", browser("Sec-Fetch-Site", "same-origin", "Origin", "https://k8s"), none, all},
		{"own page, form without a referrer", "", browser("Sec-Fetch-Site", "same-origin", "Origin", "null"), none, http},
		{"own page opens a window", "", browser("Sec-Fetch-Site", "same-origin", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document"), none, all},
		{"own page, no User-Agent", "", []string{"Sec-Fetch-Site", "same-origin"}, none, all},
		{"own page, another User-Agent", "", []string{"User-Agent", "kubectl/v1.37.2", "Sec-Fetch-Site", "same-origin", "Origin", "https://k8s"}, none, all},
		{"own page installs a service worker", "", browser("Sec-Fetch-Site", "same-origin", "Sec-Fetch-Dest", "serviceworker", "Service-Worker", "script"), none, none},
		{"kubectl proxy's page", "", browser("Sec-Fetch-Site", "same-origin", "Origin", "http://127.0.0.1:8001"), none, http},
		{"kubectl proxy's page reads", "", browser("Sec-Fetch-Site", "same-origin", "Referer", "http://127.0.0.1:8001/"), none, all},
		{"cross-site", "", browser("Sec-Fetch-Site", "cross-site"), none, none},
		{"cross-site, through a local program", "", browser("Sec-Fetch-Site", "cross-site", "Origin", "http://k8s"), none, none},
		{"sandboxed frame", "", browser("Sec-Fetch-Site", "cross-site", "Origin", "null"), none, none},
		{"same site", "", browser("Sec-Fetch-Site", "same-site"), none, none},
		{"unknown site", "", browser("Sec-Fetch-Site", "future-value"), none, none},
		{"empty site", "", browser("Sec-Fetch-Site", ""), none, none},
		{"second site", "", browser("Sec-Fetch-Site", "none", "Sec-Fetch-Site", "cross-site"), none, none},
		{"cross-site, another User-Agent", "", []string{"User-Agent", "kubectl/v1.37.2", "Sec-Fetch-Site", "cross-site"}, none, none},
		{"link on another site", "", browser("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document"), none, "GET WS"},
		{"link on another site, fetched ahead", "", browser("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document", "Sec-Purpose", "prefetch;prerender"), none, none},
		{"form on another site", "", browser("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document", "Origin", evil), none, none},
		{"frame on another site", "", browser("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "iframe"), none, none},
		{"image on another site", "", browser("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors", "Sec-Fetch-Dest", "image"), none, none},
		{"script on another site, as a document", "", browser("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors", "Sec-Fetch-Dest", "document"), none, none},
	} {
		for _, kind := range strings.Fields(all) {
			for path, want := range map[string]string{api: tt.api, app: tt.app} {
				t.Run(tt.name+"/"+kind+" "+path, func(t *testing.T) {
					scheme := "https"
					if tt.scheme != "" {
						scheme = tt.scheme
					}
					pass := slices.Contains(strings.Fields(want), kind)
					node := proxytest.AliceNode()
					if !pass {
						node = proxytest.SilentNode(t)
					}
					s := newServer(t, Options{AllowOrigins: []string{allowed, "https://*.renderer.example.app:*", "http://localhost:4466", "file://"}}, node)
					resp, got := proxytest.Serve(t, s, asPage(kind, scheme+"://k8s"+path, tt.headers...))
					if pass {
						if got == nil {
							t.Fatalf("refused: %v", resp.Status)
						}
						return
					}
					if got != nil {
						t.Error("the next handler was called")
					}
					proxytest.CheckRefused(t, resp, proxytest.Forbidden)
				})
			}
		}
	}
}

// A page of this site reaches what pods serve, and nothing else.
func TestCheckOrigin_OwnPageReachesApplicationsOnly(t *testing.T) {
	for path, pass := range map[string]bool{
		app:             true,
		app + "a/b?c=d": true,
		"/api/v1/namespaces/default/services/https:web:8443/proxy/x": true,
		"/api/v1/namespaces/default/pods/web/proxy/x":                true,
		"/api/v1/namespaces/default/pods/web:8080/proxy":             true,
		app + "a//b%2Fc": true,

		"/":       false,
		"/api":    false,
		"/whoami": false, // the option whoami is off
		"/api/v1/namespaces/default/services/web":              false,
		"/api/v1/namespaces/default/pods/web/exec?command=sh":  false,
		"/api/v1/namespaces/default/pods/web/portforward":      false,
		"/api/v1/namespaces/default/pods/web/log":              false,
		"/api/v1/nodes/n/proxy/run/default/web/main":           false,
		"/api/v1/namespaces/default/configmaps/web/proxy":      false,
		"/apis/example.com/v1/namespaces/d/services/web/proxy": false,
		"/apis/metrics.k8s.io/v1beta1/pods/web/proxy":          false,
		"/api/v1/proxy/namespaces/default/services/web/x":      false,
		"/api/v1/namespaces/default/services/web%2Fproxy/":     false,
		"/api/v1//namespaces/default/services/web/proxy/":      false,
		"/x/api/v1/namespaces/default/services/web/proxy/":     false,
		app + "..%2F..%2Fsecrets":                              false,
		app + "%2e%2e/secrets":                                 false,
	} {
		t.Run(path, func(t *testing.T) {
			for _, kind := range []string{"GET", "POST", "DELETE", "WS"} {
				resp, got := proxytest.Serve(t, newServer(t, Options{}, proxytest.AliceNode()), asPage(kind, "https://k8s"+path, "Sec-Fetch-Site", "same-origin", "Origin", "https://k8s"))
				if (got != nil) != pass {
					t.Errorf("%s: %s; want passed: %t", kind, resp.Status, pass)
				}
			}
			// An operator who serves a user interface can decide otherwise.
			options := Options{AllowOrigins: []string{"https://k8s", "http://k8s"}}
			for _, r := range []*http.Request{
				asPage("POST", "https://k8s"+path, "Sec-Fetch-Site", "same-origin", "Origin", "https://k8s"),
				asPage("GET", "https://k8s"+path, "Sec-Fetch-Site", "same-origin", "User-Agent", chromium),
				asPage("GET", "https://k8s"+path, "Sec-Fetch-Site", "same-origin", "Service-Worker", "script"),
				asPage("WS", "https://k8s"+path, "Origin", "https://k8s", "User-Agent", chromium),
				asPage("GET", "http://k8s"+path, "User-Agent", chromium),
			} {
				if resp, got := proxytest.Serve(t, newServer(t, options, proxytest.AliceNode()), r); got == nil {
					t.Errorf("%s %s: %s with the own origin in allow_origins", r.Method, r.URL, resp.Status)
				}
			}
		})
	}
}

// A browser that does not say which page sends a request gets no page that may have been
// made by a pod, or by a node.
func TestCheckOrigin_PageIsNotLoadedOverPlainHTTP(t *testing.T) {
	for path, pass := range map[string]bool{
		"/version": true,
		api:        true,
		"/api/v1/namespaces/default/pods/web/log": true,

		app: false,
		"/api/v1/namespaces/default/pods/web:8080/proxy/x":    false,
		"/api/v1/nodes/n/proxy/logs/":                         false,
		"/api/v1//namespaces/default/services/web/proxy/":     false,
		"/api/v1/namespaces/default/services/web%2Fproxy/":    false,
		"/api/v1/namespaces/default/services/./web/proxy/a/b": false,
	} {
		resp, got := proxytest.Serve(t, newServer(t, Options{}, proxytest.AliceNode()), proxytest.NewRequest("GET", "http://k8s"+path, "User-Agent", chromium))
		if (got != nil) != pass {
			t.Errorf("%s: %s; want passed: %t", path, resp.Status, pass)
		}
	}
}

// A config must not turn what a page may reach into what it may not.
func TestCheckOrigin_RequestThatIsRewrittenIsNotSent(t *testing.T) {
	for _, tt := range []struct {
		name, target, sent string
		headers            []string
		refused            bool
	}{
		{"own page", "https://k8s" + app, app, []string{"Sec-Fetch-Site", "same-origin"}, false},
		{"own page", "https://k8s" + app, api, []string{"Sec-Fetch-Site", "same-origin"}, true},
		{"page over http", "http://k8s/cluster" + api, api, []string{"User-Agent", chromium}, false},
		{"page over http", "http://k8s/cluster" + app, app, []string{"User-Agent", chromium}, true},
		{"page over http", "http://k8s/node", "/api/v1/nodes/n/proxy/logs/", []string{"User-Agent", chromium}, true},
	} {
		t.Run(tt.name+"/"+tt.sent, func(t *testing.T) {
			r := proxytest.NewRequest("GET", tt.target, tt.headers...)
			if _, got := proxytest.Serve(t, newServer(t, Options{}, proxytest.AliceNode()), r); got == nil {
				t.Fatal("refused at once")
			}
			out := httptest.NewRequest("GET", tt.sent, nil).WithContext(r.Context())
			if err := pin.Check(out); (err != nil) != tt.refused {
				t.Errorf("got %v; want refused: %t", err, tt.refused)
			}
		})
	}
	t.Run("not recorded", func(t *testing.T) {
		for _, headers := range [][]string{{"User-Agent", chromium}, {"Sec-Fetch-Site", "same-origin"}} {
			r := proxytest.NewRequest("GET", "http://k8s"+app, headers...)
			caddyhttp.SetVar(r.Context(), "tailscale_impersonate.decided", "a config's")
			resp, got := proxytest.Serve(t, newServer(t, Options{}, proxytest.SilentNode(t)), r)
			if got != nil {
				t.Errorf("%q: %s; want a refusal", headers, resp.Status)
			}
		}
	})
}

// A refusal says what whoever reads it can do.
func TestCheckOrigin_RefusalNamesRemedy(t *testing.T) {
	for _, tt := range []struct {
		name string
		r    *http.Request
		want []string
	}{
		{"another site's page", asPage("POST", "https://k8s"+api, "User-Agent", chromium, "Origin", "https://evil.example.com"), []string{`"https://evil.example.com"`, "allow_origins"}},
		{"page of no origin", asPage("POST", "https://k8s"+api, "User-Agent", chromium, "Origin", "null"), []string{"without an origin", "serve the page from an origin"}},
		{"link", asPage("GET", "https://k8s"+api, "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "document"), []string{"another site", "enter it in the browser"}},
		{"own page", asPage("GET", "https://k8s"+api, "Sec-Fetch-Site", "same-origin"), []string{"this site", "/proxy/", `"https://k8s"`, "allow_origins"}},
		{"local application", asPage("GET", "https://k8s"+api, "Sec-Fetch-Site", "same-origin", "Referer", "http://localhost:4466/c/x"), []string{`"http://localhost:4466"`, "allow_origins"}},
		{"program", asPage("WS", "https://k8s"+api, "Origin", "https://other"), []string{"program", "no Origin", `"https://k8s"`, `"https://other"`, "allow_origins"}},
		{"plain HTTP", asPage("GET", "http://k8s"+app, "User-Agent", chromium), []string{"https", "current browser"}},
		{"service worker", asPage("GET", "https://k8s"+app, "Sec-Fetch-Site", "same-origin", "Service-Worker", "script"), []string{"service worker", `"https://k8s"`, "allow_origins"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, got := proxytest.Serve(t, newServer(t, Options{}, proxytest.SilentNode(t)), tt.r)
			if got != nil {
				t.Error("the next handler was called")
			}
			proxytest.CheckRefused(t, resp, proxytest.Forbidden, tt.want...)
		})
	}
}
