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

// errUnreachable is returned for a site that does not show its certificate.
var errUnreachable = errors.New("cannot look at the site's certificate")

// siteCA returns the authority of the certificate of the site at the URL server. It is nil
// if this machine trusts the certificate, unless a fingerprint is given.
//
// It trusts nothing on first use: whoever answers could name any authority, so the
// fingerprint has to come from the user.
func siteCA(ctx context.Context, server, fingerprint string) (*x509.Certificate, error) {
	if !strings.HasPrefix(server, "https://") {
		return nil, nil
	}
	chain, named, err := look(ctx, server)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnreachable, err)
	}
	if fingerprint == "" && siteca.Public(chain) {
		return nil, nil
	}
	ca := siteca.Root(chain, append(siteca.SelfSigned(chain), named...))
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

// look returns the certificate of the site at the URL server with its intermediates, and
// the authority that its whoami page names, if any. All of it may come from an impostor.
func look(ctx context.Context, server string) (chain, named []*x509.Certificate, err error) {
	ctx, cancel := context.WithTimeout(ctx, siteTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, server+"/whoami", nil)
	if err != nil {
		return nil, nil, err
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
		return nil, nil, err
	}
	defer resp.Body.Close()
	chain = resp.TLS.PeerCertificates
	var facts whoami.Facts
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&facts); err != nil {
		return chain, nil, nil // the site has no such page
	}
	config, err := clientcmd.Load([]byte(facts.Kubeconfig))
	if err != nil {
		return chain, nil, nil
	}
	for _, cluster := range config.Clusters {
		if ca, err := parseCertificate(cluster.CertificateAuthorityData); err == nil {
			named = append(named, ca)
		}
	}
	return chain, named, nil
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
