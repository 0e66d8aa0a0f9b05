// SPDX-License-Identifier: Apache-2.0

package requestinfo_test

import (
	"strings"
	"testing"

	"tailscale.com/tstest/deptest"
)

func TestDependencies(t *testing.T) {
	const why = "what a request asks for depends on the request alone, " +
		"and users should build the API server's parser but not the server"
	parser := false
	deptest.DepChecker{
		OnDep: func(dep string) {
			switch {
			case dep == "k8s.io/apiserver/pkg/endpoints/request":
				parser = true
			case dep == "k8s.io/apiserver/pkg/authentication/user":
			case strings.HasSuffix(dep, "/internal/upgrade"), strings.HasSuffix(dep, "/internal/clip"):
			case strings.HasPrefix(dep, "k8s.io/apiserver/"), strings.HasPrefix(dep, "github.com/caddyserver/"), strings.HasPrefix(dep, "github.com/tailscale-impersonate/"):
				t.Errorf("package requestinfo depends on %s; reason against it: %s", dep, why)
			}
		},
	}.Check(t)
	if !parser {
		t.Error("got no dependency on the API server's parser; the check saw nothing")
	}
}
