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

// FuzzParse checks what has to hold of every path that is not ambiguous: that it
// is what every program on the way takes it for, however it is written.
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

		// As a client sends it that leaves out what need not be encoded, and as
		// it arrives behind a proxy.
		if other := parse(&url.URL{Path: u.Path, RawQuery: u.RawQuery}); other != got {
			t.Errorf("got %+v; decoded and encoded again %+v", got, other)
		}
		sent, err := url.ParseRequestURI(u.RequestURI())
		if err != nil {
			t.Fatalf("sent on, it is no URL: %v", err)
		}
		if other := parse(sent); other != got {
			t.Errorf("got %+v; sent on %+v", got, other)
		}

		// With a slash at its end it is the same.
		other := parse(&url.URL{Path: u.Path + "/", RawPath: u.EscapedPath() + "/", RawQuery: u.RawQuery})
		other.Path = got.Path
		if other != got {
			t.Errorf("got %+v; with a slash at its end %+v", got, other)
		}

		// No program that tidies paths up makes another one of it, but for what is
		// behind a proxy subresource.
		if got.Subresource == "proxy" {
			if got.Class() != requestinfo.Interactive {
				t.Errorf("got class %s of a proxy subresource", got.Class())
			}
			return
		}
		trimmed := "/" + strings.Trim(got.Path, "/")
		if cleaned := path.Clean(got.Path); cleaned != trimmed {
			t.Errorf("%q is not ambiguous, and can be taken for %q", got.Path, cleaned)
		}
		if strings.Contains(strings.ToLower(u.EscapedPath()), "%2f") {
			t.Errorf("%q is not ambiguous, and holds an encoded slash", u.EscapedPath())
		}
	})
}
