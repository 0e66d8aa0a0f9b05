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
	"errors"
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
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/pin"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

// apiServer is a TLS server that records what it is sent and accepts every
// upgrade.
type apiServer struct {
	*httptest.Server
	status int // what it answers, 200 if zero

	mu   sync.Mutex
	seen []*http.Request
}

func newAPIServer(t testing.TB, configure ...func(*httptest.Server)) *apiServer {
	t.Helper()
	s := &apiServer{}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			t.Errorf("reading the body: %v", err)
		}
		s.mu.Lock()
		s.seen = append(s.seen, r)
		status := s.status
		s.mu.Unlock()
		if protocol := r.Header.Get("Upgrade"); protocol != "" && status == 0 {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Errorf("hijacking: %v", err)
				return
			}
			defer conn.Close()
			fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", protocol)
			return
		}
		if status != 0 {
			w.WriteHeader(status)
		}
	}))
	s.EnableHTTP2 = true
	for _, f := range configure {
		f(s.Server)
	}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

// take returns the requests that s has seen since it was last asked.
func (s *apiServer) take() []*http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := s.seen
	s.seen = nil
	return seen
}

// one returns the one request that s has seen.
func (s *apiServer) one(t *testing.T) *http.Request {
	t.Helper()
	seen := s.take()
	if len(seen) != 1 {
		t.Fatalf("the API server saw %d requests; want 1", len(seen))
	}
	return seen[0]
}

func (s *apiServer) none(t *testing.T) {
	t.Helper()
	for _, r := range s.take() {
		t.Errorf("the API server saw a request, with the headers %v; want none", r.Header)
	}
}

func (s *apiServer) answer(status int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status = status
}

// ca returns the certificate authority of s, in PEM.
func (s *apiServer) ca() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
}

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
func trusting(s *apiServer, user map[string]any) kubeconfig {
	return kubeconfig{server: s.URL, cluster: map[string]any{"certificate-authority-data": s.ca()}, user: user}
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
func newRequest(s *apiServer, target string, headers ...string) *http.Request {
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

// checkRefused checks that resp is a Status object with this code, whose message
// holds each of the words.
func checkRefused(t *testing.T, resp *http.Response, code int, words ...string) {
	t.Helper()
	if resp.StatusCode != code {
		t.Errorf("answered %s; want %d", resp.Status, code)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var status metav1.Status
	if err := json.Unmarshal(body, &status); err != nil {
		t.Fatalf("the answer is no Status object: %v\n%s", err, body)
	}
	if status.Kind != "Status" || int(status.Code) != code {
		t.Errorf("not a Status object with the code %d: %s", code, body)
	}
	for _, word := range words {
		if !strings.Contains(status.Message, word) {
			t.Errorf("message %q does not mention %q", status.Message, word)
		}
	}
	if resp.Header.Get("Retry-After") != "" {
		t.Errorf("the answer asks to be retried, which would not help")
	}
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

// No decision in the context, no request: whatever the headers say.
func TestNoIdentityNoRequest(t *testing.T) {
	s := newAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	for name, ctx := range map[string]context.Context{
		"none":         t.Context(),
		"without user": impersonate.NewContext(t.Context(), &impersonate.Identity{Groups: []string{"system:masters"}}),
	} {
		t.Run(name, func(t *testing.T) {
			r := newRequest(s, "/api", "Impersonate-User", "alice@example.com", "Authorization", "Bearer other").WithContext(ctx)
			checkRefused(t, roundTrip(t, tr, r), http.StatusForbidden, "no identity", "tailscale_impersonate")
			s.none(t)
		})
	}
}

// Identity and credentials are those of the context and the cluster, and nothing
// that stands in the headers by then.
func TestIdentityAndCredentialsAreAttachedLast(t *testing.T) {
	s := newAPIServer(t)
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
			if diff := cmp.Diff(want, protectedHeaders(s.one(t).Header)); diff != "" {
				t.Errorf("headers differ (-want +got):\n%s", diff)
			}
		})
	}
	t.Run("no groups", func(t *testing.T) {
		r := newRequest(s, "/api", "Impersonate-Group", "system:masters")
		r = r.WithContext(impersonate.NewContext(r.Context(), &impersonate.Identity{User: "bob@example.com"}))
		roundTrip(t, tr, r)
		want := http.Header{"Impersonate-User": {"bob@example.com"}, "Authorization": {"Bearer proxy-token"}}
		if diff := cmp.Diff(want, protectedHeaders(s.one(t).Header)); diff != "" {
			t.Errorf("headers differ (-want +got):\n%s", diff)
		}
	})
}

// reverse_proxy uses a request again when it retries, and for logging: credentials
// written into it would get around.
func TestRoundTripDoesNotModifyItsRequest(t *testing.T) {
	s := newAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	r := newRequest(s, "/api/a%2Fb?x=1", "Impersonate-User", "root", "Authorization", "Bearer other", "X-Kept", "1")
	r.Host = "k8s"
	r.Trailer = http.Header{"Impersonate-User": {"root"}}
	before := r.Clone(r.Context())
	roundTrip(t, tr, r)
	s.one(t)
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

// Trailers arrive behind everything that was looked at.
func TestTrailersAreNotSent(t *testing.T) {
	s := newAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	r := newRequest(s, "/api")
	r.Method, r.ContentLength, r.Body = "POST", -1, io.NopCloser(strings.NewReader("body"))
	r.Trailer = http.Header{"Impersonate-User": {"root"}}
	roundTrip(t, tr, r)
	if got := s.one(t).Trailer; len(got) > 0 {
		t.Errorf("the API server got the trailers %v", got)
	}
}

// What a request is for is left as it is: the API server decides on the same path.
func TestWhereRequestsGo(t *testing.T) {
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
			s := newAPIServer(t)
			k := trusting(s, token)
			k.server += tt.base
			roundTrip(t, newTransport(t, k), newRequest(s, tt.target))
			if got := s.one(t).RequestURI; got != tt.want {
				t.Errorf("got %q; want %q", got, tt.want)
			}
		})
	}
}

// Of a cluster that is a part of a server, such as Rancher's, no request reaches the
// rest of it with the proxy's credentials.
func TestNoRequestLeavesTheClustersPath(t *testing.T) {
	for _, target := range []string{
		"/../../escape", "/%2e%2e/escape", "/a%2F..%2F..%2Fescape", "/api/v1/namespaces/a/services/s/proxy/../../../../../../../../escape",
		"a:https://$HOST/v3/clusters/other", "*",
	} {
		t.Run(target, func(t *testing.T) {
			s := newAPIServer(t)
			k := trusting(s, token)
			k.server += "/k8s"
			r := newRequest(s, "/")
			u, err := url.ParseRequestURI(strings.ReplaceAll(target, "$HOST", r.Host))
			if err != nil {
				t.Fatal(err)
			}
			u.Scheme, u.Host = r.URL.Scheme, r.URL.Host // as reverse_proxy directs it
			r.URL = u
			checkRefused(t, roundTrip(t, newTransport(t, k), r), http.StatusBadRequest, "no path below that of the cluster")
			s.none(t)
		})
	}
}

// Whichever address is dialled has to prove the cluster's name, and is told it.
func TestServerName(t *testing.T) {
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
			s := newAPIServer(t)
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
					s.none(t)
					continue
				}
				if err != nil {
					t.Fatalf("upgrade %v: %v", upgrade, err)
				}
				resp.Body.Close()
				if got := s.one(t).Host; got != tt.wantHost {
					t.Errorf("upgrade %v: got host %q; want %q", upgrade, got, tt.wantHost)
				}
			}
		})
	}
}

// Credentials go to nobody that another authority vouches for.
func TestWrongAuthority(t *testing.T) {
	s := newAPIServer(t)
	other, _ := newCertificate(t)
	for name, cluster := range map[string]map[string]any{
		"another": {"certificate-authority-data": other},
		"none":    nil, // the system's do not know the server either
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
				s.none(t)
			}
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

// Every kind of credentials reaches the API server, next to the identity.
func TestCredentials(t *testing.T) {
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
			s := newAPIServer(t, func(s *httptest.Server) { s.TLS = &tls.Config{ClientAuth: tls.RequestClientCert} })
			tr := newTransport(t, trusting(s, tt.user))
			for _, upgrade := range []bool{false, true} {
				r := newRequest(s, "/api", "Authorization", "Bearer other")
				if upgrade {
					r.Header["Connection"], r.Header["Upgrade"] = []string{"Upgrade"}, []string{"SPDY/3.1"}
				}
				roundTrip(t, tr, r)
				got := s.one(t)
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
		s := newAPIServer(t)
		tr := newTransport(t, trusting(s, exec(writeFile(t, "plugin", "#!/bin/sh\nexit 1\n"))))
		if resp, err := tr.RoundTrip(newRequest(s, "/api")); err == nil {
			resp.Body.Close()
			t.Errorf("answered %s; want an error", resp.Status)
		}
		s.none(t)
	})
}

// Connections carry no token of their own: it would go out with a request that
// nobody has given one.
func TestConnectionsHoldNoToken(t *testing.T) {
	for name, user := range map[string]map[string]any{
		"token":                token,
		"token file":           {"tokenFile": writeFile(t, "token", "from-file")},
		"token and token file": {"token": "from-kubeconfig", "tokenFile": writeFile(t, "token", "from-file")},
	} {
		t.Run(name, func(t *testing.T) {
			s := newAPIServer(t)
			tr := newTransport(t, trusting(s, user))
			for _, pool := range []http.RoundTripper{tr.cluster.http1, tr.cluster.http2} {
				r := newRequest(s, "/api")
				r.URL.Scheme = "https"
				resp, err := pool.RoundTrip(r)
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				if got := protectedHeaders(s.one(t).Header); len(got) > 0 {
					t.Errorf("sent with %v", got)
				}
			}
		})
	}
}

// An answer is passed on as it comes: what the client did not ask to be compressed
// is not compressed on the way to be expanded again.
func TestNoCompressionIsAskedFor(t *testing.T) {
	s := newAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	for _, want := range []string{"", "gzip"} {
		r := newRequest(s, "/api")
		if want != "" {
			r.Header.Set("Accept-Encoding", want)
		}
		roundTrip(t, tr, r)
		if got := s.one(t).Header.Get("Accept-Encoding"); got != want {
			t.Errorf("got Accept-Encoding %q; want %q", got, want)
		}
	}
}

// Neither SPDY nor a WebSocket can ride on HTTP/2. All else shares connections.
func TestWhatGoesOverWhichProtocol(t *testing.T) {
	s := newAPIServer(t)
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
			if got := s.one(t).Proto; got != tt.proto {
				t.Errorf("sent over %s; want %s", got, tt.proto)
			}
		})
	}
}

// A connection that is authenticated as the proxy must not become one of a
// protocol that nobody looks at.
func TestUnknownUpgradesAreRefused(t *testing.T) {
	s := newAPIServer(t)
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
			checkRefused(t, roundTrip(t, tr, r), http.StatusBadRequest, "upgrade")
			s.none(t)
		}
	}
}

// The API server would run a command before it has all of the body, and answer after.
func TestUpgradesWithABodyAreRefused(t *testing.T) {
	s := newAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	for _, length := range []int64{1, -1} {
		r := newRequest(s, "/api", "Connection", "Upgrade", "Upgrade", "websocket")
		r.Body, r.ContentLength = io.NopCloser(strings.NewReader("x")), length
		checkRefused(t, roundTrip(t, tr, r), http.StatusBadRequest, "body")
		s.none(t)
	}
}

// What the transport refuses is in the log as what the handler refuses is.
func TestRefusalsAreLogged(t *testing.T) {
	s := newAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	core, logs := observer.New(zapcore.WarnLevel)
	tr.logger = zap.New(core)
	roundTrip(t, tr, newRequest(s, "/api/v1/pods?watch=1", "Connection", "Upgrade", "Upgrade", "h2c"))
	roundTrip(t, tr, newRequest(s, "/api").WithContext(t.Context()))
	var got []string
	for _, entry := range logs.FilterMessage("request refused").All() {
		fields := entry.ContextMap()
		got = append(got, fmt.Sprint(fields["code"], " ", fields["uri"], " ", fields["user"]))
	}
	if want := []string{"protocol /api/v1/pods?watch=1 alice@example.com", "no_handler /api <nil>"}; !slices.Equal(got, want) {
		t.Errorf("logged is %q; want %q", got, want)
	}
}

// reverse_proxy tries another upstream only after an error of which it knows that
// nothing has been sent.
func TestDialErrors(t *testing.T) {
	s := newAPIServer(t)
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
	s.none(t)
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

// A refused request's body is closed, which a RoundTripper owes its caller.
func TestRefusalsCloseTheBody(t *testing.T) {
	s := newAPIServer(t)
	tr := newTransport(t, trusting(s, token))
	body := &closeRecorder{Reader: strings.NewReader("body")}
	r := newRequest(s, "/api").WithContext(t.Context())
	r.Body = body
	checkRefused(t, roundTrip(t, tr, r), http.StatusForbidden)
	if !body.closed {
		t.Error("the request's body is left open")
	}
	s.none(t)
}

type closeRecorder struct {
	io.Reader
	closed bool
}

func (c *closeRecorder) Close() error { c.closed = true; return nil }

// TLS is not for reverse_proxy to configure, or to leave out.
func TestTLSIsTheClusters(t *testing.T) {
	s := newAPIServer(t)
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

// Reloading a config leaves nothing behind of the old one.
func TestNoGoroutinesAreLeft(t *testing.T) {
	cert, key := newCertificate(t)
	plugin := writeFile(t, "plugin", "#!/bin/sh\necho '{\"apiVersion\": \"client.authentication.k8s.io/v1\", \"kind\": \"ExecCredential\", \"status\": {\"token\": \"t\"}}'\n")
	s := newAPIServer(t)
	var paths []string
	for _, user := range []map[string]any{
		token,
		{"tokenFile": writeFile(t, "token", "from-file")},
		{"client-certificate": writeFile(t, "cert", string(cert)), "client-key": writeFile(t, "key", string(key))},
		{"exec": map[string]any{"apiVersion": "client.authentication.k8s.io/v1", "command": plugin, "interactiveMode": "Never"}},
	} {
		k := trusting(s, user)
		k.cluster = map[string]any{"certificate-authority": writeFile(t, "ca", string(s.ca()))}
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
			s.answer(http.StatusForbidden)
			roundTrip(t, tr, newRequest(s, "/api", "Connection", "Upgrade", "Upgrade", "websocket"))
			s.answer(0)
			if err := tr.Cleanup(); err != nil {
				t.Fatal(err)
			}
			cancel()
		}
		s.take()
	}
	round()
	before := runtime.NumGoroutine()
	for range 10 {
		round()
	}
	deadline, stop := context.WithTimeout(t.Context(), 20*time.Second)
	defer stop()
	for runtime.NumGoroutine() > before+3 {
		// What watches a client certificate's files ends when the transport that
		// it is for has been collected.
		runtime.GC()
		select {
		case <-time.Tick(20 * time.Millisecond):
		case <-deadline.Done():
			stacks := make([]byte, 1<<20)
			t.Fatalf("%d goroutines are left of %d:\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
		}
	}
}

// The Caddyfile's options are the JSON's, and what it does not know it refuses.
func TestUnmarshalCaddyfile(t *testing.T) {
	for _, tt := range []struct {
		input   string
		want    Transport
		wantErr string
	}{
		{"kubernetes", Transport{}, ""},
		{"kubernetes {\nin_cluster\n}", Transport{Source: Source{InCluster: true}}, ""},
		{"kubernetes {\nkubeconfig /a/b\n}", Transport{Source: Source{Kubeconfig: "/a/b"}}, ""},
		{"kubernetes {\nkubeconfig /a/b c\n}", Transport{Source: Source{Kubeconfig: "/a/b", Context: "c"}}, ""},

		{"kubernetes x", Transport{}, `unexpected argument "x"`},
		{"kubernetes {\ntls_insecure_skip_verify\n}", Transport{}, `unknown option "tls_insecure_skip_verify"`},
		{"kubernetes {\nin_cluster\nin_cluster\n}", Transport{}, "in_cluster is given twice"},
		{"kubernetes {\nin_cluster x\n}", Transport{}, `unexpected argument "x" after in_cluster`},
		{"kubernetes {\nin_cluster {\nx\n}\n}", Transport{}, "in_cluster takes no block"},
		{"kubernetes {\nkubeconfig\n}", Transport{}, "kubeconfig has no path"},
		{"kubernetes {\nkubeconfig \"\"\n}", Transport{}, "kubeconfig has no path"},
		{"kubernetes {\nkubeconfig a b c\n}", Transport{}, `unexpected argument "c" after kubeconfig`},
		{"kubernetes {\nkubeconfig a\nkubeconfig b\n}", Transport{}, "kubeconfig is given twice"},
		{"kubernetes {\nin_cluster\nkubeconfig a\n}", Transport{}, "exclude each other"},
	} {
		t.Run(tt.input, func(t *testing.T) {
			var got Transport
			err := got.UnmarshalCaddyfile(caddyfile.NewTestDispenser(tt.input))
			if tt.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
					t.Errorf("got error %v; want one with %q", err, tt.wantErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got.InCluster != tt.want.InCluster || got.Kubeconfig != tt.want.Kubeconfig || got.Context != tt.want.Context {
				t.Errorf("got %+v; want %+v", &got, &tt.want)
			}
		})
	}
}

func TestWhatIsSentIsWhatWasDecidedAbout(t *testing.T) {
	s := newAPIServer(t)
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
			s.one(t)

			r.Method = http.MethodDelete
			checkRefused(t, roundTrip(t, tr, r), http.StatusForbidden, "a matcher has decided about", `delete "/api/v1/namespaces/a/pods/p"`)
			s.none(t)
		})
	}
}
