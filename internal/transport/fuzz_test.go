// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"bufio"
	"context"
	"net/http"
	"net/url"
	"strings"
	"testing"
)

// FuzzPath directs requests for every target that net/http accepts at a cluster with a
// path. Nothing may panic, the path that is sent has to be the requested one below the
// cluster's, and no request that a server has received is a health check.
func FuzzPath(f *testing.F) {
	for _, target := range []string{
		"/", "*", "/livez", "/%6civez", "/api/v1/secrets%2Fname", "/api//v1/./x/../y", "/%2e%2e/%2e%2e", "/a;b?c#d", "/%zz", "//other.example/x", "http://other.example", "http:api", "/\\x", "/ä", "/%C3%A4 ",
	} {
		f.Add(target)
	}
	root := &cluster{base: &url.URL{Scheme: "https", Host: "api.example:6443"}}
	below := &cluster{base: &url.URL{Scheme: "https", Host: "api.example:6443", Path: "/k8s/clusters/c 1%"}}
	f.Fuzz(func(t *testing.T, target string) {
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader("GET " + target + " HTTP/1.1\r\nHost: k8s\r\n\r\n")))
		if err != nil {
			return
		}
		before := *r.URL
		for _, c := range []*cluster{root, below} {
			out := c.request(r)
			if *r.URL != before {
				t.Fatalf("%q: the request's own URL was changed to %v", target, r.URL)
			}
			sent, err := url.PathUnescape(out.URL.EscapedPath())
			if want := c.base.Path + before.Path; err != nil || sent != want {
				t.Errorf("%q: the path is sent as %q (%v); want one that decodes to %q", target, out.URL.EscapedPath(), err, want)
			}
			if out.URL.Scheme != "https" || out.Host != "api.example:6443" {
				t.Errorf("%q: sent to %s://%s", target, out.URL.Scheme, out.Host)
			}
		}
		if isHealthCheck(r.WithContext(context.WithValue(t.Context(), http.ServerContextKey, new(http.Server)))) {
			t.Errorf("%q: a request that a server has received counts as a health check", target)
		}
	})
}
