// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"k8s.io/client-go/rest"
)

// A cluster configuration that does not say who the proxy is, or says so twice, or
// sends credentials over plain HTTP, is refused as the config is loaded.
func TestKubeconfigErrors(t *testing.T) {
	cert, key := newCertificate(t)
	const server = "https://127.0.0.1:6443"
	user := func(pairs ...any) kubeconfig {
		fields := make(map[string]any)
		for i := 0; i < len(pairs); i += 2 {
			fields[pairs[i].(string)] = pairs[i+1]
		}
		return kubeconfig{server: server, user: fields}
	}
	exec := map[string]any{"apiVersion": "client.authentication.k8s.io/v1", "command": "true", "interactiveMode": "Never"}
	certificate := []any{"client-certificate-data", cert, "client-key-data", key}
	withCertificate := func(pairs ...any) kubeconfig { return user(append(pairs, certificate...)...) }
	for _, tt := range []struct {
		name       string
		kubeconfig kubeconfig
		context    string
		words      []string
	}{
		{"no such context", user("token", "t"), "other", []string{`"other"`}},
		{"no such current context", kubeconfig{server: server, user: token, current: "gone"}, "", []string{`"gone"`}},
		{"as", user("token", "t", "as", "system:admin"), "", []string{`"u"`, "as:"}},
		{"as-uid", user("token", "t", "as-uid", "0"), "", []string{"as:"}},
		{"as-groups", user("token", "t", "as-groups", []string{"system:masters"}), "", []string{"as:"}},
		{"as-user-extra", user("token", "t", "as-user-extra", map[string][]string{"scopes": {"all"}}), "", []string{"as:"}},
		{"no credentials", user(), "", []string{`"u"`, "no credentials"}},
		{"certificate and token", withCertificate("token", "t"), "", []string{"a client certificate and a token"}},
		{"certificate and token file", withCertificate("tokenFile", "/token"), "", []string{"a client certificate and a token"}},
		{"certificate file and token", user("client-certificate", "/cert", "client-key", "/key", "token", "t"), "", []string{"/cert"}},
		{"certificate and password", withCertificate("username", "u", "password", "p"), "", []string{"a client certificate and a user name and password"}},
		{"certificate and exec plugin", withCertificate("exec", exec), "", []string{"a client certificate and an exec plugin"}},
		{"token and exec plugin", user("token", "t", "exec", exec), "", []string{"a token and an exec plugin"}},
		{"token file and exec plugin", user("tokenFile", "/token", "exec", exec), "", []string{"a token and an exec plugin"}},
		{"token and password", user("token", "t", "username", "u", "password", "p"), "", []string{"more than one", "token"}},
		{"token file and password", user("tokenFile", "/token", "username", "u", "password", "p"), "", []string{"a token and a user name and password"}},
		{"auth provider that client-go has no more", user("auth-provider", map[string]any{"name": "gcp"}), "", []string{"gcp"}},
		{"http", kubeconfig{server: "http://127.0.0.1:8080", user: token}, "", nil},
		{"no scheme", kubeconfig{server: "127.0.0.1:8080", user: token}, "", nil},
		{"broken certificate authority", kubeconfig{server: server, cluster: map[string]any{"certificate-authority-data": []byte("x")}, user: token}, "", []string{server}},
		{"missing certificate authority", kubeconfig{server: server, cluster: map[string]any{"certificate-authority": "/no/such/ca.crt"}, user: token}, "", []string{"/no/such/ca.crt"}},
		{"authority and insecure", kubeconfig{server: server, cluster: map[string]any{"certificate-authority-data": cert, "insecure-skip-tls-verify": true}, user: token}, "", []string{"insecure"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := tt.kubeconfig.write(t)
			_, err := provision(t, &Transport{Source: Source{Kubeconfig: path, Context: tt.context}})
			if err == nil {
				t.Fatal("no error")
			}
			for _, word := range tt.words {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("error %q does not mention %q", err, word)
				}
			}
		})
	}
	t.Run("no current context", func(t *testing.T) {
		_, err := provision(t, &Transport{Source: Source{Kubeconfig: writeFile(t, "kubeconfig", `{"apiVersion": "v1", "kind": "Config"}`)}})
		if err == nil || !strings.Contains(err.Error(), "no current context") {
			t.Errorf("got error %v; want one that says what is missing", err)
		}
	})
	for name, content := range map[string]string{
		"no user":    `{"apiVersion": "v1", "kind": "Config", "current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "k", "user": "nobody"}}]}`,
		"no cluster": `{"apiVersion": "v1", "kind": "Config", "current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "nowhere", "user": "u"}}], "users": [{"name": "u", "user": {"token": "t"}}]}`,
		"empty":      "",
		"no YAML":    "{",
	} {
		t.Run(name, func(t *testing.T) {
			path := writeFile(t, "kubeconfig", content)
			_, err := provision(t, &Transport{Source: Source{Kubeconfig: path}})
			if err == nil || !strings.Contains(err.Error(), path) {
				t.Errorf("got error %v; want one that names the file", err)
			}
		})
	}
	t.Run("missing file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "missing")
		_, err := provision(t, &Transport{Source: Source{Kubeconfig: path}})
		if err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("got error %v; want one that names the file", err)
		}
	})
}

// Credentials are not sent over plain HTTP, wherever the address comes from.
func TestOnlyHTTPS(t *testing.T) {
	for _, host := range []string{"http://127.0.0.1:8080", "127.0.0.1:8080", "ftp://127.0.0.1"} {
		_, err := clusterConfig{rest: &rest.Config{Host: host, BearerToken: "t"}}.connect(zap.NewNop())
		if err == nil || !strings.Contains(err.Error(), host) || !strings.Contains(err.Error(), "https") {
			t.Errorf("%s: got error %v; want one that names it and asks for https", host, err)
		}
	}
}

// Options that contradict each other are an error, also in JSON.
func TestContradictingOptions(t *testing.T) {
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
func TestContextOption(t *testing.T) {
	s := newAPIServer(t)
	k := trusting(s, token)
	k.current = "gone"
	tr, err := provision(t, &Transport{Source: Source{Kubeconfig: k.write(t), Context: "c"}})
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, tr, newRequest(s, "/api"))
	s.one(t)
}

// Paths in a kubeconfig are relative to it, not to where Caddy was started.
func TestRelativePaths(t *testing.T) {
	s := newAPIServer(t)
	path := kubeconfig{server: s.URL, cluster: map[string]any{"certificate-authority": "ca"}, user: map[string]any{"tokenFile": "token"}}.write(t)
	rewrite(t, filepath.Join(filepath.Dir(path), "ca"), string(s.ca()))
	rewrite(t, filepath.Join(filepath.Dir(path), "token"), "from-file")
	tr, err := provision(t, &Transport{Source: Source{Kubeconfig: path}})
	if err != nil {
		t.Fatal(err)
	}
	checkToken(t, s, tr, "Bearer from-file")
}

// A kubeconfig's path may hold placeholders; one that is not set is an error, not
// an empty path.
func TestKubeconfigPlaceholders(t *testing.T) {
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

// Outside of a pod nothing is guessed: without options the config is refused, and
// with in_cluster every request.
func TestOutsideOfAPod(t *testing.T) {
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
			s := newAPIServer(t)
			checkRefused(t, roundTrip(t, tr, newRequest(s, "/api")), http.StatusServiceUnavailable, "not in a pod")
			checkRefused(t, roundTrip(t, tr, newRequest(s, "/api").WithContext(t.Context())), http.StatusForbidden, "no identity")
			s.none(t)
		})
	}
}

// A cluster that anybody can pretend to be is used, but not without a word.
func TestInsecureIsLogged(t *testing.T) {
	for _, insecure := range []bool{false, true} {
		core, logs := observer.New(zapcore.WarnLevel)
		k := kubeconfig{server: "https://127.0.0.1:6443", user: token, cluster: map[string]any{"insecure-skip-tls-verify": insecure}}
		config, err := fromKubeconfig(k.write(t), "")
		if err != nil {
			t.Fatal(err)
		}
		config.warnIfInsecure(zap.New(core))
		if got := logs.FilterMessageSnippet("insecure-skip-tls-verify").Len() > 0; got != insecure {
			t.Errorf("insecure %v: warned: %v", insecure, got)
		}
	}
}
