// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"k8s.io/client-go/tools/clientcmd"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/siteca"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

// siteTimeout is how long a site may take to show its certificate.
const siteTimeout = 10 * time.Second

// errUnreachable is returned for a site that does not answer.
var errUnreachable = errors.New("cannot reach the site")

// site is what a site shows of itself. All of it may come from an impostor, until ca has
// returned no error.
type site struct {
	// chain is the site's certificate with its intermediates, nil for plain HTTP.
	chain []*x509.Certificate
	// facts are the facts of its whoami page, the zero value if it has none.
	facts whoami.Facts
	// named are the authorities in the kubeconfig of that page.
	named []*x509.Certificate
}

// ca returns the authority of the certificate of the site at the URL server. It is nil
// if this machine trusts the certificate, unless a fingerprint is given.
//
// It trusts nothing on first use: whoever answers could name any authority, so the
// fingerprint has to come from the user.
func (s *site) ca(server, fingerprint string) (*x509.Certificate, error) {
	if s.chain == nil || fingerprint == "" && siteca.Public(s.chain) {
		return nil, nil
	}
	ca := siteca.Root(s.chain, append(siteca.SelfSigned(s.chain), s.named...))
	if ca == nil {
		return nil, fmt.Errorf("this machine does not trust the certificate of %s, and %s/whoami does not name its authority: add --ca with the file of the authority's certificate", server, server)
	}
	switch got := siteca.Fingerprint(ca); {
	case fingerprint == "":
		return nil, fmt.Errorf("this machine does not trust the authority of the certificate of %s, %q. Compare its SHA-256 fingerprint with what an administrator of the proxy tells you, and add --ca-fingerprint %s", server, ca.Subject.CommonName, got)
	case !sameFingerprint(fingerprint, got):
		return nil, fmt.Errorf("the authority of the certificate of %s, %q, has another fingerprint: %s", server, ca.Subject.CommonName, got)
	}
	return ca, nil
}

// isFrom reports whether the certificate of the site is from ca, or one that this machine
// trusts if ca is nil. A site over plain HTTP has the tailnet's word.
func (s *site) isFrom(ca *x509.Certificate) bool {
	switch {
	case s == nil:
		return false
	case s.chain == nil:
		return true
	case ca == nil:
		return siteca.Public(s.chain)
	}
	return siteca.Root(s.chain, []*x509.Certificate{ca}) != nil
}

// look returns what the site at the URL server shows of itself.
func look(ctx context.Context, server string) (*site, error) {
	ctx, cancel := context.WithTimeout(ctx, siteTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, server+"/whoami", nil)
	if err != nil {
		return nil, err
	}
	r.Header.Set("Accept", "application/json")
	client := &http.Client{
		Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, // as kubectl does
			TLSClientConfig: &tls.Config{
				InsecureSkipVerify: true, //nolint:gosec // what is received is not trusted, and nothing secret is sent
			},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	defer client.CloseIdleConnections()
	resp, err := client.Do(r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnreachable, err)
	}
	defer resp.Body.Close()
	s := new(site)
	if resp.TLS != nil {
		s.chain = resp.TLS.PeerCertificates
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&s.facts); err != nil {
		return &site{chain: s.chain}, nil // the site has no such page
	}
	config, err := clientcmd.Load([]byte(s.facts.Kubeconfig))
	if err != nil {
		return s, nil
	}
	for _, cluster := range config.Clusters {
		if ca, err := parseCertificate(cluster.CertificateAuthorityData); err == nil {
			s.named = append(s.named, ca)
		}
	}
	return s, nil
}

// readCA returns the certificate in a PEM file.
func readCA(file string) (*x509.Certificate, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	ca, err := parseCertificate(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return ca, nil
}

func parseCertificate(text []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("no PEM certificate")
	}
	return x509.ParseCertificate(block.Bytes)
}

// sameFingerprint compares fingerprints as programs print them: with or without colons, in
// upper or lower case.
func sameFingerprint(a, b string) bool {
	plain := func(s string) string { return strings.ReplaceAll(s, ":", "") }
	return strings.EqualFold(plain(a), plain(b))
}
