// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"crypto/tls"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/google/go-cmp/cmp"
	"k8s.io/client-go/rest"
)

// requestingCertificates is an API server that a client can show a certificate to.
func requestingCertificates(t *testing.T) *apiServer {
	return newAPIServer(t, func(s *httptest.Server) { s.TLS = &tls.Config{ClientAuth: tls.RequestClientCert} })
}

// withoutIdentity returns a request as reverse_proxy hands it over for a caller
// that no handler has looked at.
func withoutIdentity(s *apiServer, target string, headers ...string) *http.Request {
	r := httptest.NewRequest("GET", target, nil)
	r.Body = nil
	r.URL.Scheme, r.URL.Host = "", s.Listener.Addr().String()
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	return r.WithContext(context.WithValue(r.Context(), caddyhttp.VarsCtxKey, map[string]any{}))
}

func TestWithClientCredentialsNothingOfTheProxysIsSent(t *testing.T) {
	cert, key := newCertificate(t)
	for name, user := range map[string]map[string]any{
		"client certificate": {"client-certificate-data": cert, "client-key-data": key},
		"token":              token,
		"token file":         {"tokenFile": writeFile(t, "token", "from-file")},
		"password":           {"username": "u", "password": "p"},
		"as":                 {"token": "proxy-token", "as": "system:admin", "as-groups": []string{"system:masters"}},
		"exec plugin": {"exec": map[string]any{
			"apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Never",
			"command": writeFile(t, "plugin", "#!/bin/sh\necho '{\"apiVersion\": \"client.authentication.k8s.io/v1\", \"kind\": \"ExecCredential\", \"status\": {\"token\": \"from-plugin\"}}'\n"),
		}},
		"none": nil,
	} {
		t.Run(name, func(t *testing.T) {
			s := requestingCertificates(t)
			tr, err := provision(t, &Transport{Source: Source{Kubeconfig: trusting(s, user).write(t)}, Credentials: Client})
			if err != nil {
				t.Fatal(err)
			}
			roundTrip(t, tr, withoutIdentity(s, "/api"))
			got := s.one(t)
			if h := protectedHeaders(got.Header); len(h) > 0 {
				t.Errorf("a client without credentials is sent on with %v", h)
			}
			if len(got.TLS.PeerCertificates) > 0 {
				t.Error("the proxy's certificate is shown")
			}

			roundTrip(t, tr, withoutIdentity(s, "/api?watch=true", "Authorization", "Bearer own", "Impersonate-User", "bob",
				"X-Remote-User", "system:admin", "x-remote-group", "system:masters", "X_Remote_Extra_Scopes", "all"))
			want := http.Header{"Authorization": {"Bearer own"}, "Impersonate-User": {"bob"}}
			if diff := cmp.Diff(want, protectedHeaders(s.one(t).Header)); diff != "" {
				t.Errorf("a client's own credentials differ (-want +got):\n%s", diff)
			}
		})
	}
}

func TestClientCredentialsBehindTheHandlerAreRefused(t *testing.T) {
	s := newAPIServer(t)
	tr, err := provision(t, &Transport{Source: Source{Kubeconfig: trusting(s, token).write(t)}, Credentials: Client})
	if err != nil {
		t.Fatal(err)
	}
	checkRefused(t, roundTrip(t, tr, newRequest(s, "/api")), http.StatusForbidden, "tailscale_impersonate")
	s.none(t)
}

// healthCheck returns a request as reverse_proxy's active health checks make it.
func healthCheck(t *testing.T, s *apiServer, method, target string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, "http://"+s.Listener.Addr().String()+target, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestHealthChecksCarryNoCredentials(t *testing.T) {
	cert, key := newCertificate(t)
	for name, user := range map[string]map[string]any{
		"client certificate": {"client-certificate-data": cert, "client-key-data": key},
		"token":              token,
	} {
		t.Run(name, func(t *testing.T) {
			s := requestingCertificates(t)
			tr := newTransport(t, trusting(s, user))
			for _, path := range []string{"/livez", "/readyz", "/healthz", "/readyz?verbose"} {
				r := healthCheck(t, s, "GET", path)
				r.Header.Set("Authorization", "Bearer other")
				r.Header.Set("Impersonate-User", "system:admin")
				if resp := roundTrip(t, tr, r); resp.StatusCode != http.StatusOK {
					t.Errorf("%s: %s; want 200", path, resp.Status)
				}
				got := s.one(t)
				if h := protectedHeaders(got.Header); len(h) > 0 {
					t.Errorf("%s is sent with %v", path, h)
				}
				if len(got.TLS.PeerCertificates) > 0 {
					t.Errorf("%s is sent with the proxy's certificate", path)
				}
			}
		})
	}
}

func TestOnlyHealthIsCheckedWithoutIdentity(t *testing.T) {
	s := newAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	for _, tt := range []struct{ method, target string }{
		{"GET", "/api"}, {"GET", "/"}, {"GET", "/livez/etcd"}, {"GET", "/livez/"}, {"GET", "//livez"}, {"GET", "/live%7A"},
		{"POST", "/livez"}, {"HEAD", "/livez"}, {"DELETE", "/healthz"},
	} {
		checkRefused(t, roundTrip(t, tr, healthCheck(t, s, tt.method, tt.target)), http.StatusForbidden, "no identity")
	}
	s.none(t)
}

func TestAClientCannotPassForAHealthCheck(t *testing.T) {
	s := newAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	received := healthCheck(t, s, "GET", "/livez")
	for name, r := range map[string]*http.Request{
		"through Caddy":            withoutIdentity(s, "/livez"),
		"through any other server": received.WithContext(context.WithValue(received.Context(), http.ServerContextKey, &http.Server{})),
	} {
		t.Run(name, func(t *testing.T) {
			checkRefused(t, roundTrip(t, tr, r), http.StatusForbidden, "no identity")
		})
	}
	s.none(t)
}

// A token that was replaced and taken back at once is read again with the next
// request, not only after a minute.
func TestA401MakesTheTokenBeReadAgain(t *testing.T) {
	path := writeFile(t, "token", "old")
	s, tr, _ := withTokenFile(t, path)
	checkToken(t, s, tr, "Bearer old")
	rewrite(t, path, "new")
	checkToken(t, s, tr, "Bearer old") // not due yet
	s.answer(http.StatusUnauthorized)
	roundTrip(t, tr, newRequest(s, "/api"))
	s.take()
	s.answer(0)
	checkToken(t, s, tr, "Bearer new")
}

func TestUpstreamIsTheCluster(t *testing.T) {
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

func TestUpstreamsAreNotShared(t *testing.T) {
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
		t.Error("two requests share an upstream, into which reverse_proxy writes")
	}
}

func TestWithoutAClusterThereIsNoUpstream(t *testing.T) {
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

func TestBlankTokenIsNoCredentials(t *testing.T) {
	k := kubeconfig{server: "https://127.0.0.1:6443", user: map[string]any{"token": "  "}}
	if _, err := provision(t, &Transport{Source: Source{Kubeconfig: k.write(t)}}); err == nil || !strings.Contains(err.Error(), "no credentials") {
		t.Errorf("got error %v; want one that says that there are no credentials", err)
	}
}

func TestServiceAccountWithoutAuthorityIsAnError(t *testing.T) {
	if _, err := ofServiceAccount(&rest.Config{Host: "https://192.0.2.1", BearerTokenFile: "/token"}); err == nil || !strings.Contains(err.Error(), "ca.crt") {
		t.Errorf("got error %v; want one that names ca.crt", err)
	}
}

func TestServiceAccountsTokenIsReadFromItsFileOnly(t *testing.T) {
	config, err := ofServiceAccount(&rest.Config{Host: "https://192.0.2.1", BearerToken: "read-once", BearerTokenFile: "/token", TLSClientConfig: rest.TLSClientConfig{CAFile: "/ca.crt"}})
	if err != nil {
		t.Fatal(err)
	}
	if config.tokenFile != "/token" || config.rest.BearerToken != "" || config.rest.BearerTokenFile != "" {
		t.Errorf("got token file %q, and client-go %q and %q; want the file alone, to be read by us", config.tokenFile, config.rest.BearerToken, config.rest.BearerTokenFile)
	}
}

// Header maps can hold names that no server would have put there.
func TestUpgradesInAnySpellingAreLookedAt(t *testing.T) {
	s := newAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	r := newRequest(s, "/api")
	r.Header["connection"], r.Header["UPGRADE"] = []string{"upgrade"}, []string{"h2c"}
	checkRefused(t, roundTrip(t, tr, r), http.StatusBadRequest, "h2c")
	s.none(t)
}
