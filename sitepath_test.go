// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// Redirects of applications below .../proxy/ keep the path of the site. All else is left as
// it is.
func TestHandler_RedirectsKeepPathOfSite(t *testing.T) {
	const app = "/api/v1/namespaces/default/services/http:web:80/proxy"
	var location string
	api := proxytest.NewAPIServer(t, func(server *httptest.Server) {
		usual := server.Config.Handler
		server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "/selfsubjectaccessreviews") {
				usual.ServeHTTP(w, r)
				return
			}
			w.Header().Set("Location", location)
			w.Header().Set("Content-Location", app+"/x")
			w.Header().Set("Refresh", "0; url="+app+"/x")
			w.WriteHeader(http.StatusFound)
			_, _ = io.WriteString(w, app+"/x")
		})
	})
	s := proxytest.Config{
		API:   api,
		Nodes: []*tailnet.Node{proxytest.AliceNode()},
		Body:  "handle_path /cluster-a/* {\n" + proxytest.ToKubernetes + "\n}\nroute {\n" + proxytest.ToKubernetes + "\n}",
	}.Start(t)
	for _, tt := range []struct{ path, location, want string }{
		{"/cluster-a" + app, app + "/", "/cluster-a" + app + "/"},
		{"/cluster-a" + app + "/a/b?c=d", app + "/login?next=%2Fa#x", "/cluster-a" + app + "/login?next=%2Fa#x"},
		{"/cluster-a" + app + "/", app, "/cluster-a" + app},
		{"/cluster-a" + app + "/", "http://k8s" + app + "/a%20b", "http://k8s/cluster-a" + app + "/a%20b"},
		{"/cluster-a" + app + "/", "//k8s" + app + "/a", "//k8s/cluster-a" + app + "/a"},
		{"/cluster-a/api/v1/nodes/n/proxy/logs", "/api/v1/nodes/n/proxy/logs/", "/cluster-a/api/v1/nodes/n/proxy/logs/"},
		{"/cluster-a/api/v1/namespaces/a/pods/p/proxy/", "/api/v1/namespaces/a/pods/p/proxy/x", "/cluster-a/api/v1/namespaces/a/pods/p/proxy/x"},
		// Not within the application.
		{"/cluster-a" + app + "/", "login", "login"},
		{"/cluster-a" + app + "/", "../x", "../x"},
		{"/cluster-a" + app + "/", "?a=b", "?a=b"},
		{"/cluster-a" + app + "/", "https://login.example.com" + app + "/", "https://login.example.com" + app + "/"},
		{"/cluster-a" + app + "/", "/login", "/login"},
		{"/cluster-a" + app + "/", app + "x", app + "x"},
		{"/cluster-a" + app + "/", "/cluster-a" + app + "/x", "/cluster-a" + app + "/x"},
		{"/cluster-a" + app + "/", "http:" + app + "/x", "http:" + app + "/x"},
		{"/cluster-a" + app + "/", "//" + app + "/x", "//" + app + "/x"},
		{"/cluster-a" + app + "/", "http://user@k8s" + app + "/x", "http://user@k8s" + app + "/x"},
		{"/cluster-a" + app + "/", app + "/%zz", app + "/%zz"},
		// Of no application, and of a site without a path.
		{"/cluster-a/api/v1/namespaces/a/services/web", app + "/", app + "/"},
		{"/cluster-a/version", app + "/", app + "/"},
		{app + "/", app + "/x", app + "/x"},
	} {
		location = tt.location
		resp := s.Get(t, tt.path, "")
		if got := resp.Header.Get("Location"); got != tt.want || resp.StatusCode != http.StatusFound {
			t.Errorf("%s to %s: answered %s to %q; want %q", tt.path, tt.location, resp.Status, got, tt.want)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil || string(body) != app+"/x" || resp.Header.Get("Content-Location") != app+"/x" || resp.Header.Get("Refresh") != "0; url="+app+"/x" {
			t.Errorf("%s: more than the redirect has changed: %v, %s", tt.path, resp.Header, body)
		}
	}
}
