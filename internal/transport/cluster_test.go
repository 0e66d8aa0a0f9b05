// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"crypto/tls"
	"errors"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"k8s.io/client-go/rest"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

// The API server has to see the path that was decided about.
func TestCluster_PathIsSentUnchanged(t *testing.T) {
	for _, tt := range []struct{ base, target, want string }{
		{"", "/api/v1/pods?watch=true&x=%2F;y", "/api/v1/pods?watch=true&x=%2F;y"},
		{"", "/api/v1/secrets%2Fname", "/api/v1/secrets%2Fname"},
		{"", "/api/v1/s%65crets/", "/api/v1/s%65crets/"},
		{"", "//api/./x/../y", "//api/./x/../y"},
		{"", "/?", "/?"},
		{"/", "/api", "/api"},
		{"/k8s/clusters/c-1", "/api/v1/pods?limit=5", "/k8s/clusters/c-1/api/v1/pods?limit=5"},
		{"/k8s/clusters/c-1/", "/api", "/k8s/clusters/c-1/api"},
		{"/k8s/clusters/c-1", "/api/v1/secrets%2Fname", "/k8s/clusters/c-1/api/v1/secrets%2Fname"},
		{"/k8s clusters", "/a%2Fb", "/k8s%20clusters/a%2Fb"},
	} {
		t.Run(tt.base+" "+tt.target, func(t *testing.T) {
			s := proxytest.NewAPIServer(t)
			k := trusting(s, token)
			k.server += tt.base
			roundTrip(t, newTransport(t, k), newRequest(s, tt.target))
			if got := s.One(t).RequestURI; got != tt.want {
				t.Errorf("got %q; want %q", got, tt.want)
			}
		})
	}
}

// The server at whichever address is dialled needs a certificate for the cluster's name,
// and gets that name in Host.
func TestCluster_ServerName(t *testing.T) {
	// The server's certificate is for example.com and 127.0.0.1.
	for _, tt := range []struct {
		name, server, serverName string
		wantHost                 string // empty if the connection must fail
	}{
		{"the cluster's name", "https://example.com:6443", "", "example.com:6443"},
		{"without a port", "https://example.com", "", "example.com"},
		{"another name than the certificate's", "https://kubernetes.invalid:6443", "", ""},
		{"another address than the certificate's", "https://192.0.2.1:6443", "", ""},
		{"tls-server-name", "https://kubernetes.invalid:6443", "example.com", "kubernetes.invalid:6443"},
		{"wrong tls-server-name", "https://example.com:6443", "kubernetes.invalid", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := proxytest.NewAPIServer(t)
			k := trusting(s, token)
			k.server = tt.server
			if tt.serverName != "" {
				k.cluster["tls-server-name"] = tt.serverName
			}
			tr := newTransport(t, k)
			for _, upgrade := range []bool{false, true} {
				r := newRequest(s, "/api")
				r.Host = "k8s.example.ts.net"
				if upgrade {
					r.Header["Connection"], r.Header["Upgrade"] = []string{"Upgrade"}, []string{"websocket"}
				}
				resp, err := tr.RoundTrip(r)
				if tt.wantHost == "" {
					if err == nil {
						resp.Body.Close()
						t.Errorf("upgrade %v: answered %s; want an error", upgrade, resp.Status)
					}
					s.CheckNone(t)
					continue
				}
				if err != nil {
					t.Fatalf("upgrade %v: %v", upgrade, err)
				}
				resp.Body.Close()
				if got := s.One(t).Host; got != tt.wantHost {
					t.Errorf("upgrade %v: got host %q; want %q", upgrade, got, tt.wantHost)
				}
			}
		})
	}
}

// No credentials are sent to a server with a certificate of another authority.
func TestCluster_WrongAuthority(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	other, _ := newCertificate(t)
	for name, cluster := range map[string]map[string]any{
		"another": {"certificate-authority-data": other},
		"none":    nil, // the system's authorities do not include the server's either
	} {
		t.Run(name, func(t *testing.T) {
			tr := newTransport(t, kubeconfig{server: s.URL, cluster: cluster, user: token})
			for _, upgrade := range []bool{false, true} {
				r := newRequest(s, "/api")
				if upgrade {
					r.Header["Connection"], r.Header["Upgrade"] = []string{"Upgrade"}, []string{"websocket"}
				}
				if resp, err := tr.RoundTrip(r); err == nil {
					resp.Body.Close()
					t.Errorf("answered %s; want an error", resp.Status)
				}
				s.CheckNone(t)
			}
		})
	}
}

// Every kind of credentials reaches the API server, along with the identity.
func TestCluster_CredentialsOfEveryKind(t *testing.T) {
	cert, key := newCertificate(t)
	plugin := writeFile(t, "plugin", "#!/bin/sh\necho '{\"apiVersion\": \"client.authentication.k8s.io/v1\", \"kind\": \"ExecCredential\", \"status\": {\"token\": \"from-plugin\"}}'\n")
	exec := func(command string) map[string]any {
		return map[string]any{"exec": map[string]any{"apiVersion": "client.authentication.k8s.io/v1", "command": command, "interactiveMode": "Never"}}
	}
	for _, tt := range []struct {
		name          string
		user          map[string]any
		authorization []string
		certificate   bool
	}{
		{"token", token, []string{"Bearer proxy-token"}, false},
		{"token between blanks", map[string]any{"token": " proxy-token\n"}, []string{"Bearer proxy-token"}, false},
		{"token file", map[string]any{"tokenFile": writeFile(t, "token", "from-file\n")}, []string{"Bearer from-file"}, false},
		{"token file before token", map[string]any{"token": "from-kubeconfig", "tokenFile": writeFile(t, "token", "from-file")}, []string{"Bearer from-file"}, false},
		{"password", map[string]any{"username": "u", "password": "p"}, []string{"Basic dTpw"}, false},
		{"exec plugin", exec(plugin), []string{"Bearer from-plugin"}, false},
		{"client certificate", map[string]any{"client-certificate-data": cert, "client-key-data": key}, nil, true},
		{"client certificate files", map[string]any{"client-certificate": writeFile(t, "cert", string(cert)), "client-key": writeFile(t, "key", string(key))}, nil, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := proxytest.NewAPIServer(t, func(s *httptest.Server) { s.TLS = &tls.Config{ClientAuth: tls.RequestClientCert} })
			tr := newTransport(t, trusting(s, tt.user))
			for _, upgrade := range []bool{false, true} {
				r := newRequest(s, "/api", "Authorization", "Bearer other")
				if upgrade {
					r.Header["Connection"], r.Header["Upgrade"] = []string{"Upgrade"}, []string{"SPDY/3.1"}
				}
				roundTrip(t, tr, r)
				got := s.One(t)
				want := http.Header{"Impersonate-User": {"alice@example.com"}, "Impersonate-Group": {"tailnet-readers", "b"}}
				if tt.authorization != nil {
					want["Authorization"] = tt.authorization
				}
				if diff := cmp.Diff(want, protectedHeaders(got.Header)); diff != "" {
					t.Errorf("upgrade %v: headers differ (-want +got):\n%s", upgrade, diff)
				}
				if certificate := len(got.TLS.PeerCertificates) > 0; certificate != tt.certificate {
					t.Errorf("upgrade %v: client certificate sent: %v; want %v", upgrade, certificate, tt.certificate)
				}
			}
		})
	}
	t.Run("exec plugin fails", func(t *testing.T) {
		s := proxytest.NewAPIServer(t)
		tr := newTransport(t, trusting(s, exec(writeFile(t, "plugin", "#!/bin/sh\nexit 1\n"))))
		if resp, err := tr.RoundTrip(newRequest(s, "/api")); err == nil {
			resp.Body.Close()
			t.Errorf("answered %s; want an error", resp.Status)
		}
		s.CheckNone(t)
	})
}

// Pools attach no token of their own, which would be sent with requests that must not
// have one.
func TestCluster_PoolsHoldNoToken(t *testing.T) {
	for name, user := range map[string]map[string]any{
		"token":                token,
		"token file":           {"tokenFile": writeFile(t, "token", "from-file")},
		"token and token file": {"token": "from-kubeconfig", "tokenFile": writeFile(t, "token", "from-file")},
	} {
		t.Run(name, func(t *testing.T) {
			s := proxytest.NewAPIServer(t)
			tr := newTransport(t, trusting(s, user))
			for _, pool := range []http.RoundTripper{tr.cluster.http1, tr.cluster.http2, tr.cluster.streams} {
				r := newRequest(s, "/api")
				r.URL.Scheme = "https"
				resp, err := pool.RoundTrip(r)
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				if got := protectedHeaders(s.One(t).Header); len(got) > 0 {
					t.Errorf("sent with %v", got)
				}
			}
		})
	}
}

// Responses are compressed only if the client asked for that. The proxy would have to
// decompress them otherwise.
func TestCluster_AsksForNoCompression(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	for _, want := range []string{"", "gzip"} {
		r := newRequest(s, "/api")
		if want != "" {
			r.Header.Set("Accept-Encoding", want)
		}
		roundTrip(t, tr, r)
		if got := s.One(t).Header.Get("Accept-Encoding"); got != want {
			t.Errorf("got Accept-Encoding %q; want %q", got, want)
		}
	}
}

// Upgrades use HTTP/1.1, as neither SPDY nor WebSocket runs over HTTP/2. All other
// requests share HTTP/2 connections.
func TestCluster_HTTPVersion(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	const pods = "/api/v1/namespaces/default/pods"
	for _, tt := range []struct {
		path, upgrade string
		proto         string
		wantStatus    int
	}{
		{pods, "", "HTTP/2.0", http.StatusOK},
		{pods + "?watch=true", "", "HTTP/2.0", http.StatusOK},
		{pods + "/web/log?follow=true", "", "HTTP/2.0", http.StatusOK},
		{pods + "/web/exec?command=sh", "SPDY/3.1", "HTTP/1.1", http.StatusSwitchingProtocols},
		{pods + "/web/exec?command=sh", "spdy/3.1", "HTTP/1.1", http.StatusSwitchingProtocols},
		{pods + "/web/exec?command=sh", "websocket", "HTTP/1.1", http.StatusSwitchingProtocols},
		{pods + "?watch=true", "WebSocket", "HTTP/1.1", http.StatusSwitchingProtocols},
	} {
		t.Run(tt.path+" "+tt.upgrade, func(t *testing.T) {
			r := newRequest(s, tt.path)
			if tt.upgrade != "" {
				r.Header["Connection"], r.Header["Upgrade"] = []string{"Upgrade"}, []string{tt.upgrade}
			}
			resp := roundTrip(t, tr, r)
			if resp.StatusCode != tt.wantStatus {
				t.Errorf("answered %s; want %d", resp.Status, tt.wantStatus)
			}
			if got := s.One(t).Proto; got != tt.proto {
				t.Errorf("sent over %s; want %s", got, tt.proto)
			}
		})
	}
}

// reverse_proxy tries another upstream only after an error that says that nothing has
// been sent.
func TestCluster_DialErrors(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	plugin := writeFile(t, "plugin", "#!/bin/sh\necho '{\"apiVersion\": \"client.authentication.k8s.io/v1\", \"kind\": \"ExecCredential\", \"status\": {\"token\": \"t\"}}'\n")
	for name, user := range map[string]map[string]any{
		"token": token,
		"exec":  {"exec": map[string]any{"apiVersion": "client.authentication.k8s.io/v1", "command": plugin, "interactiveMode": "Never"}},
	} {
		tr := newTransport(t, trusting(s, user))
		for _, upgrade := range []bool{false, true} {
			r := newRequest(s, "/api")
			r.URL.Host = closedPort(t)
			if upgrade {
				r.Header["Connection"], r.Header["Upgrade"] = []string{"Upgrade"}, []string{"websocket"}
			}
			resp, err := tr.RoundTrip(r)
			if err == nil {
				resp.Body.Close()
			}
			if dialErr := (reverseproxy.DialError{}); !errors.As(err, &dialErr) {
				t.Errorf("%s, upgrade %v: got error %v (%T); want a DialError", name, upgrade, err, err)
			}
		}
	}
	s.CheckNone(t)
}

func TestKubeconfig_BlankTokenIsNoCredentials(t *testing.T) {
	k := kubeconfig{server: "https://127.0.0.1:6443", user: map[string]any{"token": "  "}}
	if _, err := provision(t, &Transport{Source: Source{Kubeconfig: k.write(t)}}); err == nil || !strings.Contains(err.Error(), "no credentials") {
		t.Errorf("got error %v; want one that mentions no credentials", err)
	}
}

func TestServiceAccount_NeedsAuthority(t *testing.T) {
	if _, err := ofServiceAccount(&rest.Config{Host: "https://192.0.2.1", BearerTokenFile: "/token"}); err == nil || !strings.Contains(err.Error(), "ca.crt") {
		t.Errorf("got error %v; want one that names ca.crt", err)
	}
}

func TestServiceAccount_TokenIsReadFromFile(t *testing.T) {
	config, err := ofServiceAccount(&rest.Config{Host: "https://192.0.2.1", BearerToken: "read-once", BearerTokenFile: "/token", TLSClientConfig: rest.TLSClientConfig{CAFile: "/ca.crt"}})
	if err != nil {
		t.Fatal(err)
	}
	if config.tokenFile != "/token" || config.rest.BearerToken != "" || config.rest.BearerTokenFile != "" {
		t.Errorf("got token file %q, and client-go %q and %q; want the file only, which this package reads", config.tokenFile, config.rest.BearerToken, config.rest.BearerTokenFile)
	}
}

// A cluster configuration without credentials, with two kinds of them, or that would send
// them over plain HTTP is an error when the config is loaded.
func TestKubeconfig_Errors(t *testing.T) {
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
		{"auth provider that client-go has removed", user("auth-provider", map[string]any{"name": "gcp"}), "", []string{"gcp"}},
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

// Credentials are never sent over plain HTTP, wherever the address comes from.
func TestCluster_HTTPSOnly(t *testing.T) {
	for _, host := range []string{"http://127.0.0.1:8080", "127.0.0.1:8080", "ftp://127.0.0.1"} {
		_, err := clusterConfig{rest: &rest.Config{Host: host, BearerToken: "t"}}.connect(zap.NewNop())
		if err == nil || !strings.Contains(err.Error(), host) || !strings.Contains(err.Error(), "https") {
			t.Errorf("%s: got error %v; want one that names it and asks for https", host, err)
		}
	}
}

// Paths in a kubeconfig are relative to its directory, not to Caddy's.
func TestKubeconfig_RelativePaths(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	path := kubeconfig{server: s.URL, cluster: map[string]any{"certificate-authority": "ca"}, user: map[string]any{"tokenFile": "token"}}.write(t)
	rewrite(t, filepath.Join(filepath.Dir(path), "ca"), string(s.CA()))
	rewrite(t, filepath.Join(filepath.Dir(path), "token"), "from-file")
	tr, err := provision(t, &Transport{Source: Source{Kubeconfig: path}})
	if err != nil {
		t.Fatal(err)
	}
	checkToken(t, s, tr, "Bearer from-file")
}

func TestCluster_InsecureIsLogged(t *testing.T) {
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
