// SPDX-License-Identifier: Apache-2.0

package requestinfo_test

import (
	"net/http"
	"net/url"
	"path"
	"strings"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

// FuzzParse checks that every program on the way interprets a path in the same way if
// that is not ambiguous, however it is written.
func FuzzParse(f *testing.F) {
	for _, target := range []string{
		"/", "//", "/version", "/api/v1/pods?watch=1&fieldSelector=metadata.name%3Dp",
		"/api/v1/namespaces/a/pods/p/%65xec", "/api/v1/namespaces/a/secrets%2Fname/",
		"/api/v1/namespaces/a/pods/p/proxy//a/./b%2F..", "/apis/g/v1/watch/namespaces/a/x/y/proxy/",
		"/api/v1/nodes/%2e%2e/proxy/run/", "/api/v1/proxy/nodes/n/x", "x:/api/v1//pods", "http://h/api/./v1/pods", "*",
	} {
		f.Add(http.MethodGet, target)
		f.Add(http.MethodPost, target)
	}
	f.Fuzz(func(t *testing.T, method, target string) {
		u, err := url.ParseRequestURI(target)
		if err != nil {
			t.Skip(err)
		}
		parse := func(u *url.URL) requestinfo.Info {
			return requestinfo.Parse(&http.Request{Method: method, URL: u})
		}
		got := parse(u)
		if got.Ambiguous {
			if got.Class() != requestinfo.Ambiguous {
				t.Errorf("got class %s of an ambiguous path", got.Class())
			}
			return
		}

		// As sent by a client that encodes only what it must, and as forwarded by a
		// proxy.
		if other := parse(&url.URL{Path: u.Path, RawQuery: u.RawQuery}); other != got {
			t.Errorf("got %+v; decoded and encoded again %+v", got, other)
		}
		sent, err := url.ParseRequestURI(u.RequestURI())
		if err != nil {
			t.Fatalf("forwarded, it is no URL: %v", err)
		}
		if other := parse(sent); other != got {
			t.Errorf("got %+v; forwarded %+v", got, other)
		}

		// A slash at its end makes no difference.
		other := parse(&url.URL{Path: u.Path + "/", RawPath: u.EscapedPath() + "/", RawQuery: u.RawQuery})
		other.Path = got.Path
		if other != got {
			t.Errorf("got %+v; with a slash at its end %+v", got, other)
		}

		// Cleaning the path does not change it, except after a proxy subresource.
		if got.Subresource == "proxy" {
			if got.Class() != requestinfo.Interactive {
				t.Errorf("got class %s of a proxy subresource", got.Class())
			}
			return
		}
		trimmed := "/" + strings.Trim(got.Path, "/")
		if cleaned := path.Clean(got.Path); cleaned != trimmed {
			t.Errorf("%q is not ambiguous, but cleaned it is %q", got.Path, cleaned)
		}
		if strings.Contains(strings.ToLower(u.EscapedPath()), "%2f") {
			t.Errorf("%q is not ambiguous, but has an encoded slash", u.EscapedPath())
		}
	})
}
