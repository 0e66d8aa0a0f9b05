// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

func TestSource_ContradictingOptions(t *testing.T) {
	path := kubeconfig{server: "https://127.0.0.1:6443", user: token}.write(t)
	for _, tr := range []*Transport{
		{Source: Source{InCluster: true, Kubeconfig: path}},
		{Source: Source{InCluster: true, Context: "c"}},
		{Source: Source{Context: "c"}},
		{Source: Source{Kubeconfig: path}, Credentials: "both"},
	} {
		if _, err := provision(t, tr); err == nil {
			t.Errorf("%+v: no error", tr)
		}
	}
}

// The named context is used, not the current one.
func TestSource_Context(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	k := trusting(s, token)
	k.current = "gone"
	tr, err := provision(t, &Transport{Source: Source{Kubeconfig: k.write(t), Context: "c"}})
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, tr, newRequest(s, "/api"))
	s.One(t)
}

// The path of a kubeconfig may have placeholders. An unset one is an error, not an empty
// path.
func TestSource_KubeconfigPlaceholders(t *testing.T) {
	path := kubeconfig{server: "https://127.0.0.1:6443", user: token}.write(t)
	t.Setenv("TRANSPORT_TEST_DIR", filepath.Dir(path))
	if _, err := provision(t, &Transport{Source: Source{Kubeconfig: "{env.TRANSPORT_TEST_DIR}/kubeconfig"}}); err != nil {
		t.Error(err)
	}
	for _, path := range []string{"{env.TRANSPORT_TEST_UNSET}", "{no.such.placeholder}/kubeconfig"} {
		if _, err := provision(t, &Transport{Source: Source{Kubeconfig: path}}); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: got error %v; want one that names it", path, err)
		}
	}
}

// Outside of a pod, the config is an error without options, and with in_cluster every
// request is refused.
func TestSource_OutsideOfAPod(t *testing.T) {
	for name, host := range map[string]string{"not in a cluster": "", "no service account": "192.0.2.1"} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("KUBERNETES_SERVICE_HOST", host)
			t.Setenv("KUBERNETES_SERVICE_PORT", "443")
			if _, err := provision(t, &Transport{}); err == nil || !strings.Contains(err.Error(), "kubeconfig <path>") {
				t.Errorf("default: got error %v; want one that says what to do", err)
			}
			tr, err := provision(t, &Transport{Source: Source{InCluster: true}})
			if err != nil {
				t.Fatalf("in_cluster: %v", err)
			}
			s, logs := proxytest.NewAPIServer(t), logOf(tr)
			proxytest.CheckRefused(t, roundTrip(t, tr, newRequest(s, "/api")), proxytest.Unavailable, "no configuration of the cluster")
			checkCause(t, logs, "not in a pod")
			proxytest.CheckRefused(t, roundTrip(t, tr, newRequest(s, "/api").WithContext(t.Context())), proxytest.Forbidden, "no identity")
			s.CheckNone(t)
		})
	}
}
