// SPDX-License-Identifier: Apache-2.0

package requestinfo_test

import (
	"strings"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

func TestKind(t *testing.T) {
	const pod = "/api/v1/namespaces/a/pods/p"
	websocket := []string{"Connection: Upgrade", "Upgrade: websocket"}
	for _, tt := range []struct {
		line    string
		headers []string
		guess   requestinfo.Kind
		exact   requestinfo.Kind
	}{
		{"GET /", nil, requestinfo.Short, requestinfo.Short},
		{"GET /version", nil, requestinfo.Short, requestinfo.Short},
		{"GET /api/v1/pods?limit=500", nil, requestinfo.Short, requestinfo.Short},
		{"GET /api/v1/pods?watch=false", nil, requestinfo.Short, requestinfo.Short},
		{"GET /api/v1/pods?allowWatchBookmarks=true&watch=true", nil, requestinfo.Watch, requestinfo.Watch},
		{"GET " + pod, nil, requestinfo.Short, requestinfo.Short},
		{"GET /api/v1/pods?watch=true", nil, requestinfo.Watch, requestinfo.Watch},
		{"GET /api/v1/pods?watch=1", websocket, requestinfo.Watch, requestinfo.Watch},
		{"GET " + pod + "/log?follow=true", nil, requestinfo.Log, requestinfo.Log},
		{"GET " + pod + "/log?follow=true", websocket, requestinfo.Log, requestinfo.Log},
		{"GET " + pod + "/exec?command=sh", websocket, requestinfo.Exec, requestinfo.Exec},
		{"GET " + pod + "/attach", websocket, requestinfo.Attach, requestinfo.Attach},
		{"POST " + pod + "/portforward", []string{"Connection: upgrade", "Upgrade: SPDY/3.1"}, requestinfo.PortForward, requestinfo.PortForward},
		{"GET /api/v1/namespaces/a/services/s/proxy/", websocket, requestinfo.Upgrade, requestinfo.Upgrade},
		{"GET /apis/subresources.kubevirt.io/v1/namespaces/a/virtualmachineinstances/v/vnc", websocket, requestinfo.Upgrade, requestinfo.Upgrade},

		// Where the guess is wrong.
		{"GET " + pod + "/%65xec/", websocket, requestinfo.Upgrade, requestinfo.Exec},
		{"GET " + pod + "/exec", nil, requestinfo.Short, requestinfo.Exec},
		{"GET " + pod + "/exec", []string{"Connection: Upgrade"}, requestinfo.Short, requestinfo.Exec},
		{"GET " + pod + "/log", nil, requestinfo.Short, requestinfo.Log},
		{"GET /api/v1/watch/pods", nil, requestinfo.Short, requestinfo.Watch},
		{"GET /apis/example.com/v1/namespaces/a/things/t/exec", websocket, requestinfo.Exec, requestinfo.Upgrade},
		{"GET /api/v1/namespaces/a/services/s/proxy/", nil, requestinfo.Short, requestinfo.Upgrade},
		{"GET /exec", websocket, requestinfo.Exec, requestinfo.Upgrade},

		{"PATCH " + pod + "/ephemeralcontainers", nil, requestinfo.Short, requestinfo.Short},
		{"PUT " + pod + "/ephemeralcontainers", nil, requestinfo.Short, requestinfo.Short},
		{"POST " + pod + "/ephemeralcontainers", nil, requestinfo.Short, requestinfo.Upgrade},
		{"PATCH /apis/example.com/v1/namespaces/a/things/t/ephemeralcontainers", nil, requestinfo.Short, requestinfo.Upgrade},
	} {
		t.Run(strings.Join(append([]string{tt.line}, tt.headers...), ", "), func(t *testing.T) {
			r := read(t, tt.line, tt.headers...)
			if got := requestinfo.KindOf(r); got != tt.guess {
				t.Errorf("KindOf: got %s; want %s", got, tt.guess)
			}
			if got := requestinfo.Parse(r).Kind(); got != tt.exact {
				t.Errorf("Kind: got %s; want %s", got, tt.exact)
			}
		})
	}
}
