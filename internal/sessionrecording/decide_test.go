// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import "testing"

func TestDecide(t *testing.T) {
	const pod = "/api/v1/namespaces/default/pods/web"
	for _, tt := range []struct {
		method, target string
		upgrade        bool
		want           decision
	}{
		{"GET", pod + "/exec?command=sh", true, decision{exec, "default", "web", ""}},
		{"POST", pod + "/exec", false, decision{exec, "default", "web", ""}},
		{"GET", pod + "/attach", true, decision{attach, "default", "web", ""}},
		{"GET", pod + "/portforward", true, decision{forward, "default", "web", ""}},

		// Other ways to a shell.
		{"POST", pod + "/ephemeralcontainers", false, decision{unrecordable, "default", "web", ""}},
		{"DELETE", pod + "/ephemeralcontainers", false, decision{unrecordable, "default", "web", ""}},
		{"GET", pod + "/proxy/", false, decision{unrecordable, "default", "web", ""}},
		{"GET", "/api/v1/namespaces/default/services/s/proxy/", false, decision{unrecordable, "default", "s", ""}},
		{"POST", "/api/v1/nodes/n/proxy/run/default/web/main", false, decision{unrecordable, "", "n", ""}},
		{"GET", "/api/v1/namespaces/default/services/s/exec", true, decision{unrecordable, "default", "s", ""}},
		{"GET", "/apis/example.com/v1/namespaces/default/pods/web/exec", true, decision{unrecordable, "default", "web", ""}},
		{"GET", "/shell", true, decision{kind: unrecordable}},
		{"GET", "/api/v1/namespaces/default/pods/web%2Fexec", true, decision{ambiguous, "default", "web/exec", ""}},

		{"PATCH", pod + "/ephemeralcontainers", false, decision{kind: ordinary}},
		{"PUT", pod + "/ephemeralcontainers", false, decision{kind: ordinary}},
		{"GET", pod + "/ephemeralcontainers", false, decision{kind: ordinary}},
		{"GET", pod + "/log?follow=true", false, decision{kind: ordinary}},
		{"GET", pod + "?watch=true", false, decision{kind: ordinary}},
		{"GET", "/version", false, decision{kind: ordinary}},
	} {
		r := request(t, tt.method, tt.target)
		if tt.upgrade {
			r.Header.Set("Connection", "Upgrade")
			r.Header.Set("Upgrade", "websocket")
		}
		got := decide(r)
		if got.kind != ordinary && got.query != r.URL.RawQuery {
			t.Errorf("%s %s: got the query %q", tt.method, tt.target, got.query)
		}
		got.query = ""
		if got.kind == ambiguous { // where the names are not defined
			got.namespace, got.name = tt.want.namespace, tt.want.name
		}
		if got != tt.want {
			t.Errorf("%s %s: got %+v; want %+v", tt.method, tt.target, got, tt.want)
		}
	}
}
