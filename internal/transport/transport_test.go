// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/pin"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

// kubeconfig is a kubeconfig file with one cluster, one user and one context "c".
// The zero value has no credentials.
type kubeconfig struct {
	server  string
	cluster map[string]any // more about the cluster
	user    map[string]any
	current string // context; "c" if empty
}

func (k kubeconfig) write(t testing.TB) string {
	t.Helper()
	cluster := map[string]any{"server": k.server}
	for name, value := range k.cluster {
		cluster[name] = value
	}
	if k.current == "" {
		k.current = "c"
	}
	named := func(name, kind string, v any) []any { return []any{map[string]any{"name": name, kind: v}} }
	content, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": k.current,
		"clusters": named("k", "cluster", cluster),
		"users":    named("u", "user", k.user),
		"contexts": named("c", "context", map[string]any{"cluster": "k", "user": "u"}),
	})
	if err != nil {
		t.Fatal(err)
	}
	return writeFile(t, "kubeconfig", string(content))
}

// trusting returns the kubeconfig of a user of s.
func trusting(s *proxytest.APIServer, user map[string]any) kubeconfig {
	return kubeconfig{server: s.URL, cluster: map[string]any{"certificate-authority-data": s.CA()}, user: user}
}

func writeFile(t testing.TB, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// provision returns tr as Caddy runs it.
func provision(t testing.TB, tr *Transport) (*Transport, error) {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	t.Cleanup(cancel)
	err := tr.Provision(ctx)
	t.Cleanup(func() {
		if err := tr.Cleanup(); err != nil {
			t.Errorf("Cleanup: %v", err)
		}
	})
	return tr, err
}

// newTransport returns a transport to the cluster of k.
func newTransport(t testing.TB, k kubeconfig) *Transport {
	t.Helper()
	tr, err := provision(t, &Transport{Source: Source{Kubeconfig: k.write(t)}})
	if err != nil {
		t.Fatalf("provisioning: %v", err)
	}
	return tr
}

var alice = &impersonate.Identity{User: "alice@example.com", Groups: []string{"tailnet-readers", "b"}, Source: impersonate.SourceGrants}

// newRequest returns a request of alice's as reverse_proxy hands it over, with
// headers given as name, value, name, value.
func newRequest(s *proxytest.APIServer, target string, headers ...string) *http.Request {
	r := httptest.NewRequest("GET", target, nil)
	r.Body = nil
	r.URL.Scheme, r.URL.Host = "", s.Listener.Addr().String()
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	return r.WithContext(impersonate.NewContext(r.Context(), alice))
}

// roundTrip returns the answer to r, whose body has been read.
func roundTrip(t *testing.T, tr *Transport, r *http.Request) *http.Response {
	t.Helper()
	resp, err := tr.RoundTrip(r)
	if err != nil {
		t.Fatalf("RoundTrip: %v", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return resp
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("reading the answer: %v", err)
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp
}

var token = map[string]any{"token": "proxy-token"}

// protectedHeaders returns the headers of h that carry identity or credentials.
func protectedHeaders(h http.Header) http.Header {
	out := make(http.Header)
	for name, values := range h {
		folded := strings.NewReplacer("_", "-", ".", "-").Replace(strings.ToLower(name))
		if strings.HasPrefix(folded, "impersonate") || strings.HasPrefix(folded, "x-remote") || folded == "authorization" || folded == "sec-websocket-protocol" {
			out[name] = values
		}
	}
	return out
}

// Without an identity in the context the request is refused, whatever its headers say.
func TestRoundTrip_RefusesWithoutIdentity(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	for name, ctx := range map[string]context.Context{
		"none":         t.Context(),
		"without user": impersonate.NewContext(t.Context(), &impersonate.Identity{Groups: []string{"system:masters"}}),
	} {
		t.Run(name, func(t *testing.T) {
			r := newRequest(s, "/api", "Impersonate-User", "alice@example.com", "Authorization", "Bearer other").WithContext(ctx)
			proxytest.CheckRefused(t, roundTrip(t, tr, r), proxytest.Forbidden, "no identity", "tailscale_impersonate")
			s.CheckNone(t)
		})
	}
}

// The identity comes from the context, the credentials from the cluster configuration,
// and neither from the headers.
func TestRoundTrip_AttachesIdentityAndCredentialsLast(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	want := http.Header{
		"Impersonate-User": {"alice@example.com"}, "Impersonate-Group": {"tailnet-readers", "b"}, "Authorization": {"Bearer proxy-token"},
	}
	for _, headers := range [][]string{
		nil,
		{"Impersonate-User", "system:admin", "Impersonate-User", "root", "Impersonate-Group", "system:masters"},
		{"Impersonate-Uid", "0", "Impersonate-Extra-Scopes", "all", "Impersonate-Something", "new"},
		{"Impersonate_user", "system:admin", "Impersonate.group", "system:masters"},
		{"X-Remote-User", "system:admin", "X-Remote-Group", "system:masters"},
		{"Authorization", "Bearer other"},
		{"Authorization", "Basic b3RoZXI=", "Authorization", "Bearer other"},
		{"Sec-WebSocket-Protocol", "base64url.bearer.authorization.k8s.io.b3RoZXI"},
	} {
		t.Run(strings.Join(headers, " "), func(t *testing.T) {
			r := newRequest(s, "/api", headers...)
			r.Header["impersonate-user"] = []string{"root"} // not in canonical form
			roundTrip(t, tr, r)
			if diff := cmp.Diff(want, protectedHeaders(s.One(t).Header)); diff != "" {
				t.Errorf("headers differ (-want +got):\n%s", diff)
			}
		})
	}
	t.Run("no groups", func(t *testing.T) {
		r := newRequest(s, "/api", "Impersonate-Group", "system:masters")
		r = r.WithContext(impersonate.NewContext(r.Context(), &impersonate.Identity{User: "bob@example.com"}))
		roundTrip(t, tr, r)
		want := http.Header{"Impersonate-User": {"bob@example.com"}, "Authorization": {"Bearer proxy-token"}}
		if diff := cmp.Diff(want, protectedHeaders(s.One(t).Header)); diff != "" {
			t.Errorf("headers differ (-want +got):\n%s", diff)
		}
	})
}

// reverse_proxy uses the request again for retries and for logging, so credentials in it
// would leak.
func TestRoundTrip_LeavesRequestUnchanged(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	r := newRequest(s, "/api/a%2Fb?x=1", "Impersonate-User", "root", "Authorization", "Bearer other", "X-Kept", "1")
	r.Host = "k8s"
	r.Trailer = http.Header{"Impersonate-User": {"root"}}
	before := r.Clone(r.Context())
	roundTrip(t, tr, r)
	s.One(t)
	for _, tt := range []struct {
		name          string
		before, after any
	}{
		{"headers", before.Header, r.Header},
		{"URL", before.URL.String(), r.URL.String()},
		{"host", before.Host, r.Host},
		{"trailers", before.Trailer, r.Trailer},
	} {
		if diff := cmp.Diff(tt.before, tt.after); diff != "" {
			t.Errorf("%s changed (-before +after):\n%s", tt.name, diff)
		}
	}
}

// Trailers arrive after the headers have been checked.
func TestRoundTrip_DropsTrailers(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	r := newRequest(s, "/api")
	r.Method, r.ContentLength, r.Body = "POST", -1, io.NopCloser(strings.NewReader("body"))
	r.Trailer = http.Header{"Impersonate-User": {"root"}}
	roundTrip(t, tr, r)
	if got := s.One(t).Trailer; len(got) > 0 {
		t.Errorf("the API server got the trailers %v", got)
	}
}

// If the cluster is a path of a server, such as Rancher's, no request reaches the other
// paths with the proxy's credentials.
func TestRoundTrip_StaysBelowClusterPath(t *testing.T) {
	for _, target := range []string{
		"/../../escape", "/%2e%2e/escape", "/a%2F..%2F..%2Fescape", "/api/v1/namespaces/a/services/s/proxy/../../../../../../../../escape",
		"a:https://$HOST/v3/clusters/other", "*",
	} {
		t.Run(target, func(t *testing.T) {
			s := proxytest.NewAPIServer(t)
			k := trusting(s, token)
			k.server += "/k8s"
			r := newRequest(s, "/")
			u, err := url.ParseRequestURI(strings.ReplaceAll(target, "$HOST", r.Host))
			if err != nil {
				t.Fatal(err)
			}
			u.Scheme, u.Host = r.URL.Scheme, r.URL.Host // as reverse_proxy directs it
			r.URL = u
			proxytest.CheckRefused(t, roundTrip(t, newTransport(t, k), r), proxytest.BadRequest, "not a path below that of the cluster")
			s.CheckNone(t)
		})
	}
}

// newCertificate returns a new certificate, and its key, in PEM.
func newCertificate(t *testing.T) (cert, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}

// A connection that is authenticated as the proxy must not switch to a protocol that the
// proxy does not check.
func TestRoundTrip_RefusesUnknownUpgrades(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	for _, upgrade := range [][]string{
		nil, {""}, {"h2c"}, {"foo"}, {"SPDY/3"}, {"SPDY/3.1 "}, {"websocket2"}, {"websocket, h2c"}, {"h2c, websocket"},
		{"websocket", "h2c"}, {"h2c", "websocket"}, {"websocket", "websocket"}, {"TLS/1.0"},
	} {
		for _, connection := range [][]string{{"Upgrade"}, {"upgrade"}, {"keep-alive, Upgrade"}, {"keep-alive", "UPGRADE"}} {
			r := newRequest(s, "/api")
			r.Header["Connection"] = connection
			if upgrade != nil {
				r.Header["Upgrade"] = upgrade
			}
			proxytest.CheckRefused(t, roundTrip(t, tr, r), proxytest.BadRequest, "upgrade")
			s.CheckNone(t)
		}
	}
}

// The API server would run the command before it has received the body, and answer after.
func TestRoundTrip_RefusesUpgradeWithBody(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	for _, length := range []int64{1, -1} {
		r := newRequest(s, "/api", "Connection", "Upgrade", "Upgrade", "websocket")
		r.Body, r.ContentLength = io.NopCloser(strings.NewReader("x")), length
		proxytest.CheckRefused(t, roundTrip(t, tr, r), proxytest.BadRequest, "body")
		s.CheckNone(t)
	}
}

// logOf makes tr log to the result.
func logOf(tr *Transport) *observer.ObservedLogs {
	core, logs := observer.New(zapcore.WarnLevel)
	tr.logger = zap.New(core)
	tr.refusals = apistatus.NewLog(tr.logger)
	return logs
}

// checkCause fails t unless the latest refusal in logs has a cause with these words, which
// the caller does not get.
func checkCause(t *testing.T, logs *observer.ObservedLogs, words ...string) {
	t.Helper()
	refusals := logs.FilterMessage("request refused").All()
	if len(refusals) == 0 {
		t.Fatal("no refusal was logged")
	}
	cause, _ := refusals[len(refusals)-1].ContextMap()["error"].(string)
	for _, word := range words {
		if !strings.Contains(cause, word) {
			t.Errorf("the logged cause %q does not mention %q", cause, word)
		}
	}
}

// The transport logs its refusals as the handler does.
func TestRoundTrip_LogsRefusals(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	logs := logOf(tr)
	roundTrip(t, tr, newRequest(s, "/api/v1/pods?watch=1", "Connection", "Upgrade", "Upgrade", "h2c"))
	roundTrip(t, tr, newRequest(s, "/api").WithContext(t.Context()))
	var got []string
	for _, entry := range logs.FilterMessage("request refused").All() {
		fields := entry.ContextMap()
		got = append(got, fmt.Sprint(fields["code"], " ", fields["uri"], " ", fields["user"]))
	}
	if want := []string{"protocol /api/v1/pods?watch=1 alice@example.com", "no_handler /api <nil>"}; !slices.Equal(got, want) {
		t.Errorf("logged %q; want %q", got, want)
	}
}

// closedPort returns an address at which nothing listens.
func closedPort(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// An http.RoundTripper must close the body of every request.
func TestRoundTrip_RefusalClosesBody(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	body := &closeRecorder{Reader: strings.NewReader("body")}
	r := newRequest(s, "/api").WithContext(t.Context())
	r.Body = body
	proxytest.CheckRefused(t, roundTrip(t, tr, r), proxytest.Forbidden)
	if !body.closed {
		t.Error("the request's body is left open")
	}
	s.CheckNone(t)
}

type closeRecorder struct {
	io.Reader
	closed bool
}

func (c *closeRecorder) Close() error { c.closed = true; return nil }

// reverse_proxy cannot configure TLS, nor disable it.
func TestEnableTLS_ChangesNothing(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	if !tr.TLSEnabled() {
		t.Error("TLSEnabled: got false; want true")
	}
	if err := tr.EnableTLS(&reverseproxy.TLSConfig{InsecureSkipVerify: true, ServerName: "other"}); err != nil {
		t.Fatal(err)
	}
	k := trusting(s, token)
	k.server = "https://kubernetes.invalid"
	if resp, err := newTransport(t, k).RoundTrip(newRequest(s, "/api")); err == nil {
		resp.Body.Close()
		t.Error("EnableTLS has changed how the cluster is verified")
	}
}

// Reloading leaves no goroutine of the old config.
func TestCleanup_LeavesNoGoroutines(t *testing.T) {
	cert, key := newCertificate(t)
	plugin := writeFile(t, "plugin", "#!/bin/sh\necho '{\"apiVersion\": \"client.authentication.k8s.io/v1\", \"kind\": \"ExecCredential\", \"status\": {\"token\": \"t\"}}'\n")
	s := proxytest.NewAPIServer(t)
	var paths []string
	for _, user := range []map[string]any{
		token,
		{"tokenFile": writeFile(t, "token", "from-file")},
		{"client-certificate": writeFile(t, "cert", string(cert)), "client-key": writeFile(t, "key", string(key))},
		{"exec": map[string]any{"apiVersion": "client.authentication.k8s.io/v1", "command": plugin, "interactiveMode": "Never"}},
	} {
		k := trusting(s, user)
		k.cluster = map[string]any{"certificate-authority": writeFile(t, "ca", string(s.CA()))}
		paths = append(paths, k.write(t))
	}
	round := func() {
		for _, path := range paths {
			ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
			tr := &Transport{Source: Source{Kubeconfig: path}}
			if err := tr.Provision(ctx); err != nil {
				t.Fatal(err)
			}
			roundTrip(t, tr, newRequest(s, "/api"))
			roundTrip(t, tr, newRequest(s, "/api", "Connection", "Upgrade", "Upgrade", "websocket"))
			// Answered without an upgrade, the connection stays for another request.
			s.Answer(http.StatusForbidden)
			roundTrip(t, tr, newRequest(s, "/api", "Connection", "Upgrade", "Upgrade", "websocket"))
			s.Answer(0)
			if err := tr.Cleanup(); err != nil {
				t.Fatal(err)
			}
			cancel()
		}
		s.Take()
	}
	round()
	before := runtime.NumGoroutine()
	for range 10 {
		round()
	}
	deadline, stop := context.WithTimeout(t.Context(), 20*time.Second)
	defer stop()
	for runtime.NumGoroutine() > before+3 {
		// The goroutine that watches a client certificate's files ends when its
		// transport has been garbage collected.
		runtime.GC()
		select {
		case <-time.Tick(20 * time.Millisecond):
		case <-deadline.Done():
			stacks := make([]byte, 1<<20)
			t.Fatalf("%d goroutines are left of %d:\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
		}
	}
}

func TestRoundTrip_ChecksDecisions(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	for _, credentials := range []string{Proxy, Client} {
		t.Run(credentials, func(t *testing.T) {
			tr, err := provision(t, &Transport{Source: Source{Kubeconfig: trusting(s, token).write(t)}, Credentials: credentials})
			if err != nil {
				t.Fatal(err)
			}
			r := newRequest(s, "/api/v1/namespaces/a/pods/p")
			ctx := context.WithValue(r.Context(), caddyhttp.VarsCtxKey, make(map[string]any))
			if credentials == Client {
				ctx = impersonate.NewContext(ctx, nil)
			}
			r = r.WithContext(ctx)
			pin.On(r)
			roundTrip(t, tr, r)
			s.One(t)

			r.Method = http.MethodDelete
			proxytest.CheckRefused(t, roundTrip(t, tr, r), proxytest.Forbidden, "a matcher has decided about", `delete "/api/v1/namespaces/a/pods/p"`)
			s.CheckNone(t)
		})
	}
}

// requestingCertificates returns an API server that requests client certificates.
func requestingCertificates(t *testing.T) *proxytest.APIServer {
	return proxytest.NewAPIServer(t, func(s *httptest.Server) { s.TLS = &tls.Config{ClientAuth: tls.RequestClientCert} })
}

// withoutIdentity returns a request as reverse_proxy hands it over if it did not pass
// tailscale_impersonate.
func withoutIdentity(s *proxytest.APIServer, target string, headers ...string) *http.Request {
	r := httptest.NewRequest("GET", target, nil)
	r.Body = nil
	r.URL.Scheme, r.URL.Host = "", s.Listener.Addr().String()
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	return r.WithContext(context.WithValue(r.Context(), caddyhttp.VarsCtxKey, map[string]any{}))
}

func TestCredentialsClient_SendsNoneOfTheProxys(t *testing.T) {
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
			got := s.One(t)
			if h := protectedHeaders(got.Header); len(h) > 0 {
				t.Errorf("a client without credentials is sent on with %v", h)
			}
			if len(got.TLS.PeerCertificates) > 0 {
				t.Error("the proxy's certificate was sent")
			}

			roundTrip(t, tr, withoutIdentity(s, "/api?watch=true", "Authorization", "Bearer own", "Impersonate-User", "bob",
				"X-Remote-User", "system:admin", "x-remote-group", "system:masters", "X_Remote_Extra_Scopes", "all"))
			want := http.Header{"Authorization": {"Bearer own"}, "Impersonate-User": {"bob"}}
			if diff := cmp.Diff(want, protectedHeaders(s.One(t).Header)); diff != "" {
				t.Errorf("a client's own credentials differ (-want +got):\n%s", diff)
			}
		})
	}
}

func TestCredentialsClient_RefusesIdentity(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	tr, err := provision(t, &Transport{Source: Source{Kubeconfig: trusting(s, token).write(t)}, Credentials: Client})
	if err != nil {
		t.Fatal(err)
	}
	proxytest.CheckRefused(t, roundTrip(t, tr, newRequest(s, "/api")), proxytest.Forbidden, "tailscale_impersonate")
	s.CheckNone(t)
}

// healthCheck returns a request as reverse_proxy's active health checks make it.
func healthCheck(t *testing.T, s *proxytest.APIServer, method, target string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, "http://"+s.Listener.Addr().String()+target, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestHealthCheck_HasNoCredentials(t *testing.T) {
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
				got := s.One(t)
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

func TestHealthCheck_OtherRequestsNeedIdentity(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	for _, tt := range []struct{ method, target string }{
		{"GET", "/api"}, {"GET", "/"}, {"GET", "/livez/etcd"}, {"GET", "/livez/"}, {"GET", "//livez"}, {"GET", "/live%7A"},
		{"POST", "/livez"}, {"HEAD", "/livez"}, {"DELETE", "/healthz"},
	} {
		proxytest.CheckRefused(t, roundTrip(t, tr, healthCheck(t, s, tt.method, tt.target)), proxytest.Forbidden, "no identity")
	}
	s.CheckNone(t)
}

func TestHealthCheck_IsNeverReceived(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	received := healthCheck(t, s, "GET", "/livez")
	for name, r := range map[string]*http.Request{
		"through Caddy":            withoutIdentity(s, "/livez"),
		"through any other server": received.WithContext(context.WithValue(received.Context(), http.ServerContextKey, &http.Server{})),
	} {
		t.Run(name, func(t *testing.T) {
			proxytest.CheckRefused(t, roundTrip(t, tr, r), proxytest.Forbidden, "no identity")
		})
	}
	s.CheckNone(t)
}

// Other handlers can put header names into the map that net/http would spell otherwise.
func TestRoundTrip_RefusesOddlySpelledUpgrades(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	for _, protocol := range []string{"h2c", "websocket"} {
		r := newRequest(s, "/api")
		r.Header["connection"], r.Header["UPGRADE"] = []string{"upgrade"}, []string{protocol}
		proxytest.CheckRefused(t, roundTrip(t, tr, r), proxytest.BadRequest, protocol)
		s.CheckNone(t)
	}
}
