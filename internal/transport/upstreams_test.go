// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

func TestUpstreams_DialCluster(t *testing.T) {
	for server, want := range map[string]string{
		"https://192.0.2.1:6443":           "192.0.2.1:6443",
		"https://192.0.2.1":                "192.0.2.1:443",
		"https://k8s.example.com/prefix/x": "k8s.example.com:443",
		"https://[2001:db8::1]:6443":       "[2001:db8::1]:6443",
	} {
		u := &Upstreams{Source: Source{Kubeconfig: kubeconfig{server: server, user: token}.write(t)}}
		provisionUpstreams(t, u)
		upstreams, err := u.GetUpstreams(httptest.NewRequest("GET", "/", nil))
		if err != nil || len(upstreams) != 1 || upstreams[0].Dial != want {
			t.Errorf("%s: got upstreams %v, %v; want %s", server, upstreams, err, want)
		}
	}
}

func TestUpstreams_NewForEachRequest(t *testing.T) {
	u := &Upstreams{Source: Source{Kubeconfig: kubeconfig{server: "https://192.0.2.1", user: token}.write(t)}}
	provisionUpstreams(t, u)
	r := httptest.NewRequest("GET", "/", nil)
	first, err := u.GetUpstreams(r)
	if err != nil {
		t.Fatal(err)
	}
	second, err := u.GetUpstreams(r)
	if err != nil {
		t.Fatal(err)
	}
	if first[0] == second[0] {
		t.Error("two requests share an upstream, which reverse_proxy writes to")
	}
}

func TestUpstreams_ErrorWithoutCluster(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	u := &Upstreams{Source: Source{InCluster: true}}
	provisionUpstreams(t, u)
	if upstreams, err := u.GetUpstreams(httptest.NewRequest("GET", "/", nil)); err == nil || !strings.Contains(err.Error(), "not in a pod") {
		t.Errorf("got upstreams %v, %v; want an error that says why", upstreams, err)
	}
}

func provisionUpstreams(t *testing.T, u *Upstreams) {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	t.Cleanup(cancel)
	if err := u.Provision(ctx); err != nil {
		t.Fatal(err)
	}
}
