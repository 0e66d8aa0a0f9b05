// SPDX-License-Identifier: Apache-2.0

package requestinfo_test

import (
	"bufio"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

// read parses a request line and header lines as a server does.
func read(t *testing.T, line string, headers ...string) *http.Request {
	t.Helper()
	raw := line + " HTTP/1.1\r\nHost: k8s\r\n" + strings.Join(append(headers, ""), "\r\n") + "\r\n"
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(raw)))
	if err != nil {
		t.Fatalf("reading %q: %v", raw, err)
	}
	return r
}

func TestParse(t *testing.T) {
	tests := []struct {
		line string
		want requestinfo.Info
	}{
		{"GET /version", requestinfo.Info{Verb: "get", Path: "/version"}},
		{"POST /apis/apps", requestinfo.Info{Verb: "post", Path: "/apis/apps"}},
		{"GET /api/v1/pods", requestinfo.Info{
			Verb: "list", APIVersion: "v1", Resource: "pods", Path: "/api/v1/pods", IsResourceRequest: true,
		}},
		{"HEAD /api/v1/namespaces/a/pods/p", requestinfo.Info{
			Verb: "get", APIVersion: "v1", Resource: "pods", Namespace: "a", Name: "p", Path: "/api/v1/namespaces/a/pods/p", IsResourceRequest: true,
		}},
		{"GET /apis/apps/v1/namespaces/a/deployments?watch=1", requestinfo.Info{
			Verb: "watch", APIGroup: "apps", APIVersion: "v1", Resource: "deployments", Namespace: "a", Path: "/apis/apps/v1/namespaces/a/deployments", IsResourceRequest: true,
		}},
		{"GET /api/v1/secrets?fieldSelector=metadata.name%3Ds", requestinfo.Info{
			Verb: "list", APIVersion: "v1", Resource: "secrets", Name: "s", Path: "/api/v1/secrets", IsResourceRequest: true,
		}},
		{"PATCH /apis/apps/v1/namespaces/a/deployments/d/scale", requestinfo.Info{
			Verb: "patch", APIGroup: "apps", APIVersion: "v1", Resource: "deployments", Subresource: "scale", Namespace: "a", Name: "d", Path: "/apis/apps/v1/namespaces/a/deployments/d/scale", IsResourceRequest: true,
		}},
		{"PUT /api/v1/namespaces/a/finalize", requestinfo.Info{
			Verb: "update", APIVersion: "v1", Resource: "namespaces", Subresource: "finalize", Namespace: "a", Name: "a", Path: "/api/v1/namespaces/a/finalize", IsResourceRequest: true,
		}},
		{"DELETE /api/v1/namespaces/a/pods", requestinfo.Info{
			Verb: "deletecollection", APIVersion: "v1", Resource: "pods", Namespace: "a", Path: "/api/v1/namespaces/a/pods", IsResourceRequest: true,
		}},
		// The API server answers this method with 405.
		{"PROPFIND /api/v1/pods", requestinfo.Info{
			APIVersion: "v1", Resource: "pods", Path: "/api/v1/pods", IsResourceRequest: true,
		}},
		{"GET /API/v1/pods", requestinfo.Info{Verb: "get", Path: "/API/v1/pods"}},
		{"GET /api/v1/namespaces/a/s%65crets/", requestinfo.Info{
			Verb: "list", APIVersion: "v1", Resource: "secrets", Namespace: "a", Path: "/api/v1/namespaces/a/secrets/", IsResourceRequest: true,
		}},
		{"GET http://elsewhere/api/v1/pods", requestinfo.Info{
			Verb: "list", APIVersion: "v1", Resource: "pods", Path: "/api/v1/pods", IsResourceRequest: true,
		}},
	}
	for _, tt := range tests {
		t.Run(tt.line, func(t *testing.T) {
			got := requestinfo.Parse(read(t, tt.line))
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestClass(t *testing.T) {
	const (
		ordinary    = requestinfo.Ordinary
		interactive = requestinfo.Interactive
		ambiguous   = requestinfo.Ambiguous
	)
	const pod = "/api/v1/namespaces/a/pods/p"
	upgrade := []string{"Connection: keep-alive, upgrade", "Upgrade: websocket"}
	tests := []struct {
		line    string
		headers []string
		want    requestinfo.Class
	}{
		// Shells and tunnels, with any method.
		{"POST " + pod + "/exec?command=sh", nil, interactive},
		{"GET " + pod + "/exec", nil, interactive},
		{"GET " + pod + "/%65xec", nil, interactive},
		{"POST " + pod + "/exec/", nil, interactive},
		{"PROPFIND " + pod + "/exec", nil, interactive},
		{"POST " + pod + "/attach", nil, interactive},
		{"POST " + pod + "/portforward", nil, interactive},
		{"GET " + pod + "/proxy", nil, interactive},
		{"GET /api/v1/namespaces/a/services/https:s:443/proxy/x", nil, interactive},
		{"GET /api/v1/nodes/n/proxy/exec/a/p/c", nil, interactive},
		{"GET /api/v1/proxy/nodes/n/exec/a/p/c", nil, interactive},
		{"GET /api/v1/proxy/namespaces/a/pods/p", nil, interactive},
		{"GET /api/v1/watch/namespaces/a/pods/p/exec", nil, interactive},
		{"PATCH " + pod + "/ephemeralcontainers", nil, interactive},
		{"PUT " + pod + "/ephemeralcontainers", nil, interactive},
		{"GET " + pod + "/ephemeralcontainers", nil, ordinary},
		// APIs other than Kubernetes' own.
		{"GET /apis/example.com/v1/namespaces/a/machines/m/proxy/x", nil, interactive},
		{"GET /apis/subresources.kubevirt.io/v1/namespaces/a/virtualmachineinstances/m/console", upgrade, interactive},
		{"GET /apis/subresources.kubevirt.io/v1/namespaces/a/virtualmachineinstances/m/console", nil, ordinary},
		{"GET /version", upgrade, interactive},
		{"GET " + pod, upgrade, interactive},
		{"GET " + pod, []string{"Connection: upgrade"}, ordinary},
		{"GET " + pod, []string{"Upgrade: websocket"}, ordinary},
		// reverse_proxy uses the first value, and does not pass on an empty one.
		{"POST " + pod, []string{"Connection: upgrade", "Upgrade:"}, ordinary},
		{"POST " + pod, []string{"Connection: upgrade", "Upgrade:", "Upgrade: websocket"}, ordinary},
		// Browsers stream these.
		{"GET /api/v1/pods?watch=true", upgrade, ordinary},
		{"GET " + pod + "/log?follow=true", upgrade, ordinary},
		{"GET /apis/example.com/v1/namespaces/a/pods/p/log", upgrade, interactive},
		{"GET /api/v1/namespaces/a/services/s/log", upgrade, interactive},
		// These only have the same names.
		{"GET /api/v1/watch/namespaces/a/pods/p/console", upgrade, interactive},
		{"GET /apis/subresources.kubevirt.io/v1/namespaces/a/virtualmachineinstances/m/log", upgrade, interactive},

		// Paths that only resemble the above.
		{"GET /api/v1/namespaces/a/pods/exec", nil, ordinary},
		{"GET /api/v1/namespaces/proxy/configmaps/proxy", nil, ordinary},
		{"GET " + pod + "/EXEC", nil, ordinary},
		{"GET /exec", nil, ordinary},
		{"GET /", nil, ordinary},
		{"GET /api/v1/namespaces/a/pods/..p", nil, ordinary},
		{"GET /.well-known/openid-configuration", nil, ordinary},
		{"GET /apis/x%20y/v1/z%25", nil, ordinary},

		// Slashes at the end are ordinary, any number of them.
		{"GET /api/v1/pods/", nil, ordinary},
		{"GET /api/v1/pods//", nil, ordinary},
		{"GET //", nil, ordinary},

		// The API server does not interpret what follows a proxy subresource.
		{"GET " + pod + "/proxy//a/./b/../c%2Fd%2f", nil, interactive},
		{"GET " + pod + "/prox%79/%2e%2e/x", nil, interactive},

		{"GET //api/v1/pods", nil, ambiguous},
		{"GET /api//v1/pods", nil, ambiguous},
		{"GET /api/./v1/pods", nil, ambiguous},
		{"GET /api/v1/namespaces/a/../b/pods", nil, ambiguous},
		{"GET /api/v1/namespaces/a/%2e%2E/b/pods", nil, ambiguous},
		{"GET /api/v1/pods/.", nil, ambiguous},
		{"GET /api/v1/pods/..", nil, ambiguous},
		{"GET /api/v1/namespaces/a/secrets%2Fname", nil, ambiguous},
		{"GET /api/v1/namespaces/a/secrets%2fname", nil, ambiguous},
		{"GET /api/v1/pods%2F", nil, ambiguous},
		{"GET /%2Fapi/v1/pods", nil, ambiguous},
		{"GET " + pod + "/exec/../log", nil, ambiguous},
		{"GET " + pod + "//proxy/x", nil, ambiguous},
		{"GET " + pod + "%2Fproxy/x", nil, ambiguous},
		{"GET " + pod + "/proxy%2Fx", nil, ambiguous},
		{"GET /api/v1/namespaces/./pods/p/proxy/x", nil, ambiguous},
		{"GET /api/v1/namespaces/a/configmaps/proxy//x", nil, ambiguous},
		{"GET /api/v1/proxy/nodes/n//x", nil, ambiguous},
		// The API server cannot parse these.
		{"GET /api/v1/watch", nil, ambiguous},
		{"GET /api/v1/proxy/", nil, ambiguous},
		// Not a path: what follows the colon is sent instead of one.
		{"GET x:api/v1/pods", nil, ambiguous},
		{"OPTIONS *", nil, ambiguous},
	}
	for _, tt := range tests {
		t.Run(strings.Join(append([]string{tt.line}, tt.headers...), ", "), func(t *testing.T) {
			if got := requestinfo.Parse(read(t, tt.line, tt.headers...)).Class(); got != tt.want {
				t.Errorf("got %s; want %s", got, tt.want)
			}
		})
	}
}

// Other code reads Path, but net/http sends Opaque.
func TestClass_OpaqueURLIsAmbiguous(t *testing.T) {
	r := read(t, "GET /api/v1/pods")
	r.URL.Opaque = "/api/v1/secrets"
	if got := requestinfo.Parse(r).Class(); got != requestinfo.Ambiguous {
		t.Errorf("got %s; want %s", got, requestinfo.Ambiguous)
	}
}

func BenchmarkParse(b *testing.B) {
	for _, path := range []string{
		"/api/v1/namespaces/default/pods/web-0",
		"/api/v1/namespaces/default/pods",
		"/apis/apps/v1/namespaces/default/deployments?watch=true&resourceVersion=1&allowWatchBookmarks=true",
		"/api/v1/namespaces/default/pods/web-0/proxy/a%2Fb//c",
	} {
		r, err := http.NewRequest(http.MethodGet, path, nil)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(path, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				requestinfo.Parse(r)
			}
		})
	}
}

func TestIsPath(t *testing.T) {
	for target, want := range map[string]bool{
		"/":                                 true,
		"//other.example/api":               true,
		"http://k8s/api":                    true,
		"http://k8s":                        true,
		"*":                                 false,
		"a:https://k8s/api/v1/secrets":      false,
		"https:k8s/api/v1/secrets?watch=1":  false,
		"mailto:/../api/v1/namespaces/x%2F": true, // a path after all
	} {
		if got := requestinfo.IsPath(read(t, "GET "+target).URL); got != want {
			t.Errorf("%s: got %t; want %t", target, got, want)
		}
	}
}

func TestHasDotSegments(t *testing.T) {
	for target, want := range map[string]bool{
		"/":               false,
		"/a/..b/.c/d.":    false,
		"/a?x=/../":       false,
		"/..":             true,
		"/a/../b":         true,
		"/a/./b":          true,
		"/a/%2e%2E/b":     true,
		"/a%2F..%2Fb":     true,
		"/a/proxy/..%2fb": true,
	} {
		if got := requestinfo.HasDotSegments(read(t, "GET "+target).URL); got != want {
			t.Errorf("%s: got %t; want %t", target, got, want)
		}
	}
}
