// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/siteca"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

// TestMain lets this machine trust the certificate of httptest.
func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		panic(err)
	}
	site := httptest.NewTLSServer(nil)
	roots := filepath.Join(dir, "roots.pem")
	if err := errors.Join(
		os.WriteFile(roots, []byte(pemOf(site.Certificate())), 0o600),
		os.Setenv("SSL_CERT_FILE", roots),
		os.Setenv("SSL_CERT_DIR", dir),
	); err != nil {
		panic(err)
	}
	site.Close()
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// newSite starts a site whose certificate is from a root that it does not send, as that of
// "tls internal". Its whoami page, if it has one, names root, if that is not nil.
func newSite(t *testing.T, page bool, root *x509.Certificate) (site *httptest.Server, issuer *x509.Certificate) {
	t.Helper()
	issue := func(template, from *x509.Certificate, signer *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if signer == nil {
			signer = key
		}
		template.SerialNumber = big.NewInt(time.Now().UnixNano())
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		der, err := x509.CreateCertificate(rand.Reader, template, from, &key.PublicKey, signer)
		if err != nil {
			t.Fatal(err)
		}
		certificate, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return certificate, key
	}
	template := &x509.Certificate{Subject: pkix.Name{CommonName: "Test Root"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	issuer, signer := issue(template, template, nil)
	leaf, key := issue(&x509.Certificate{DNSNames: []string{"k8s.example.com"}}, issuer, signer)
	if page && root == nil {
		root = issuer
	}
	site = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !page || r.URL.Path != "/whoami" {
			http.NotFound(w, r)
			return
		}
		if err := whoami.Serve(w, r, &whoami.Facts{Server: "https://k8s.example.com", CA: root}); err != nil {
			t.Error(err)
		}
	}))
	site.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{leaf.Raw}, PrivateKey: key}}}
	site.StartTLS()
	t.Cleanup(site.Close)
	return site, issuer
}

// clusterCA returns the CA in a kubeconfig.
func clusterCA(t *testing.T, text string) []byte {
	t.Helper()
	config, err := clientcmd.Load([]byte(text))
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return config.Clusters[config.CurrentContext].CertificateAuthorityData
}

func pemOf(certificate *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Raw}))
}

// The user compares the fingerprint before kubectl trusts the authority.
func TestKubeconfig_PrivateCANeedsFingerprint(t *testing.T) {
	site, root := newSite(t, true, nil)
	fingerprint := siteca.Fingerprint(root)
	out, err := run(t, "kubeconfig", "--server", site.URL)
	if err == nil || out != "" || !strings.Contains(err.Error(), "--ca-fingerprint "+fingerprint) || !strings.Contains(err.Error(), "Test Root") {
		t.Errorf("without the fingerprint: printed %q and %v; want the fingerprint, and no kubeconfig", out, err)
	}
	for _, given := range []string{fingerprint, strings.ToLower(strings.ReplaceAll(fingerprint, ":", ""))} {
		out, err := run(t, "kubeconfig", "--server", site.URL, "--ca-fingerprint", given)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(clusterCA(t, out)); got != pemOf(root) {
			t.Errorf("%s: got CA %s", given, got)
		}
	}
	for _, other := range []string{fingerprint[3:], strings.Replace(fingerprint, fingerprint[:2], "00", 1) + "00", "00"} {
		if out, err := run(t, "kubeconfig", "--server", site.URL, "--ca-fingerprint", other); err == nil || !strings.Contains(err.Error(), "has another fingerprint: "+fingerprint) {
			t.Errorf("%s: printed %q, and error %v", other, out, err)
		}
	}
}

func TestKubeconfig_CAHasToBeThatOfTheCertificate(t *testing.T) {
	other, otherRoot := newSite(t, true, nil)
	other.Close()
	for name, newSite := range map[string]func() (*httptest.Server, *x509.Certificate){
		"no page":                    func() (*httptest.Server, *x509.Certificate) { return newSite(t, false, nil) },
		"a page with another's root": func() (*httptest.Server, *x509.Certificate) { return newSite(t, true, otherRoot) },
	} {
		site, root := newSite()
		for _, fingerprint := range []string{siteca.Fingerprint(root), siteca.Fingerprint(otherRoot)} {
			out, err := run(t, "kubeconfig", "--server", site.URL, "--ca-fingerprint", fingerprint)
			if err == nil || !strings.Contains(err.Error(), "add --ca with") {
				t.Errorf("%s: printed %q, and error %v; want advice", name, out, err)
			}
		}
		file := filepath.Join(t.TempDir(), "root.crt")
		if err := os.WriteFile(file, []byte(pemOf(root)), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := run(t, "kubeconfig", "--server", site.URL, "--ca", file)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(clusterCA(t, out)); got != pemOf(root) {
			t.Errorf("%s: with --ca: got CA %s", name, got)
		}
	}
}

// Caddy's own authority is trusted by the machine that Caddy runs on, and the kubeconfig
// may be meant for another.
func TestKubeconfig_TrustedCAIsLeftOutWithoutFingerprint(t *testing.T) {
	site := httptest.NewTLSServer(http.NotFoundHandler())
	defer site.Close()
	out, err := run(t, "kubeconfig", "--server", site.URL)
	if err != nil {
		t.Fatal(err)
	}
	if got := clusterCA(t, out); got != nil {
		t.Errorf("got CA %s; want none", got)
	}
	out, err = run(t, "kubeconfig", "--server", site.URL, "--ca-fingerprint", siteca.Fingerprint(site.Certificate()))
	if err != nil {
		t.Fatal(err)
	}
	if got := string(clusterCA(t, out)); got != pemOf(site.Certificate()) {
		t.Errorf("got CA %s", got)
	}
}

// The kubeconfig can be written before the site exists.
func TestKubeconfig_UnreachableSiteIsAWarning(t *testing.T) {
	site := httptest.NewTLSServer(nil)
	site.Close()
	out, err := run(t, "kubeconfig", "--server", site.URL)
	if err != nil {
		t.Fatal(err)
	}
	warning, config, _ := strings.Cut(out, "\n")
	if !strings.HasPrefix(warning, "Warning: cannot reach the site: ") || clusterCA(t, config) != nil {
		t.Errorf("printed %s", out)
	}
	if _, err := run(t, "kubeconfig", "--server", site.URL, "--ca-fingerprint", "00"); !errors.Is(err, errUnreachable) {
		t.Errorf("with a fingerprint to check: got error %v; want that the site cannot be reached", err)
	}
}
