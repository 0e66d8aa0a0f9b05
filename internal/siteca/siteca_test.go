// SPDX-License-Identifier: Apache-2.0

package siteca_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	// Where the Caddy of the test keeps its files.
	_ "github.com/caddyserver/caddy/v2/modules/filestorage"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/siteca"
)

// issued is a certificate and its key.
type issued struct {
	*x509.Certificate
	key *ecdsa.PrivateKey
}

// issue returns a certificate from an authority, from itself if that is nil. Without host,
// it is an authority.
func issue(t testing.TB, from *issued, name, host string) *issued {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour * 365),
	}
	if host == "" {
		template.IsCA, template.BasicConstraintsValid = true, true
		template.KeyUsage = x509.KeyUsageCertSign
	} else {
		template.DNSNames = []string{host}
		template.KeyUsage, template.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	if from == nil {
		from = &issued{template, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, from.Certificate, &key.PublicKey, from.key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &issued{certificate, key}
}

// write writes a chain and the key of its first certificate to files.
func write(t testing.TB, chain ...*issued) (certificates, key string) {
	t.Helper()
	dir := t.TempDir()
	certificates, key = filepath.Join(dir, "chain.pem"), filepath.Join(dir, "key.pem")
	var text []byte
	for _, certificate := range chain {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Raw})...)
	}
	der, err := x509.MarshalECPrivateKey(chain[0].key)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		os.WriteFile(certificates, text, 0o600),
		os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	return certificates, key
}

// told is a handler that tells the CA of its site.
type told struct{ site *siteca.Site }

func init() { caddy.RegisterModule(new(told)) }

func (*told) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.siteca_test", New: func() caddy.Module { return new(told) }}
}

func (h *told) Provision(ctx caddy.Context) error {
	h.site = siteca.Of(ctx, ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server))
	return nil
}

func (h *told) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	ca, err := h.site.CA(r)
	if err != nil {
		return err
	}
	name := "none"
	if ca != nil {
		name = ca.Subject.CommonName
	}
	w.Header().Set("CA", name)
	return nil
}

// Caddy serves certificates of each kind.
func TestSite_NamesCAThatClientsLack(t *testing.T) {
	public, private, own := issue(t, nil, "public", ""), issue(t, nil, "private", ""), issue(t, nil, "own", "")
	// Caddy adds its own root to those of its host.
	roots, _ := write(t, public, own)
	t.Setenv("SSL_CERT_FILE", roots)
	t.Setenv("SSL_CERT_DIR", t.TempDir())
	intermediate := issue(t, private, "intermediate", "")

	var files []map[string]string
	load := func(chain ...*issued) {
		certificates, key := write(t, chain...)
		files = append(files, map[string]string{"certificate": certificates, "key": key})
	}
	load(issue(t, public, "", "public.example.com"))
	load(issue(t, public, "", "public-with-root.example.com"), public)
	load(issue(t, intermediate, "", "with-root.example.com"), intermediate, private)
	load(issue(t, intermediate, "", "without-root.example.com"), intermediate)
	load(issue(t, nil, "self-signed", "self-signed.example.com"))
	ownCertificate, ownKey := write(t, own)

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	type object = map[string]any
	config, err := json.Marshal(object{
		"admin":   object{"disabled": true},
		"logging": object{"logs": object{"default": object{"writer": object{"output": "discard"}}}},
		"storage": object{"module": "file_system", "root": t.TempDir()},
		"apps": object{
			"http": object{"servers": object{"main": object{
				"listen":                  []string{address},
				"automatic_https":         object{"disable": true},
				"tls_connection_policies": []object{{"client_authentication": object{"mode": "require"}}},
				"routes":                  []object{{"handle": []object{{"handler": "siteca_test"}}}},
			}}},
			"tls": object{
				"certificates": object{"automate": []string{"internal.example.com"}, "load_files": files},
				"automation":   object{"policies": []object{{"subjects": []string{"internal.example.com"}, "issuers": []object{{"module": "internal"}}}}},
			},
			"pki": object{"certificate_authorities": object{"local": object{
				"install_trust": false,
				"root":          object{"certificate": ownCertificate, "private_key": ownKey, "format": "pem_file"},
			}}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := caddy.Load(config, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
	client := issue(t, nil, "client", "client")
	identity := tls.Certificate{Certificate: [][]byte{client.Raw}, PrivateKey: client.key}
	for host, want := range map[string]string{
		"internal.example.com":         "own",
		"public.example.com":           "none",
		"public-with-root.example.com": "none",
		"with-root.example.com":        "private",
		"without-root.example.com":     "none",
		"self-signed.example.com":      "self-signed",
	} {
		visitor := &http.Client{Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, network, address)
			},
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{identity}},
		}}
		var resp *http.Response
		var err error
		// Caddy issues a certificate in the background.
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			if resp, err = visitor.Get("https://" + host); err == nil || time.Now().After(deadline) {
				break
			}
		}
		if err != nil {
			t.Fatalf("%s: %v", host, err)
		}
		_ = resp.Body.Close()
		if got := resp.Header.Get("CA"); resp.StatusCode != http.StatusOK || got != want {
			t.Errorf("%s: %s with CA %q; want %q", host, resp.Status, got, want)
		}
	}
}

func TestSite_PlainHTTPHasNoCA(t *testing.T) {
	r, err := http.NewRequest(http.MethodGet, "http://k8s", nil)
	if err != nil {
		t.Fatal(err)
	}
	if ca, err := new(siteca.Site).CA(r); ca != nil || err != nil {
		t.Errorf("got %v, %v; want neither", ca, err)
	}
}

func TestFingerprint_AsOpenSSLPrintsIt(t *testing.T) {
	// openssl x509 -noout -sha256 -fingerprint prints the SHA-256 sum of the DER.
	got := siteca.Fingerprint(&x509.Certificate{Raw: []byte("abc")})
	if want := "BA:78:16:BF:8F:01:CF:EA:41:41:40:DE:5D:AE:22:23:B0:03:61:A3:96:17:7A:9C:B4:10:FF:61:F2:00:15:AD"; got != want {
		t.Errorf("got %s; want %s", got, want)
	}
}
