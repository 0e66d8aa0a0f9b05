// SPDX-License-Identifier: Apache-2.0

// Package siteca finds the certificate authority of a site's certificate where clients do
// not know it, as with "tls internal".
package siteca

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"strings"
)

// Public reports whether this machine trusts chain, a certificate and its intermediates.
func Public(chain []*x509.Certificate) bool { return verifies(chain, nil) }

// Root returns the first of candidates that chain leads to, nil if it leads to no candidate.
func Root(chain, candidates []*x509.Certificate) *x509.Certificate {
	for _, candidate := range candidates {
		roots := x509.NewCertPool()
		roots.AddCert(candidate)
		if verifies(chain, roots) {
			return candidate
		}
	}
	return nil
}

// SelfSigned returns those of certificates that are roots. An intermediate would do for
// kubectl as well, but is soon replaced: that of Caddy's own authority within a week.
func SelfSigned(certificates []*x509.Certificate) (roots []*x509.Certificate) {
	for _, certificate := range certificates {
		if bytes.Equal(certificate.RawIssuer, certificate.RawSubject) {
			roots = append(roots, certificate)
		}
	}
	return roots
}

// verifies reports whether chain leads to one of roots, or to one of this machine's if
// roots is nil.
func verifies(chain []*x509.Certificate, roots *x509.CertPool) bool {
	if len(chain) == 0 {
		return false
	}
	intermediates := x509.NewCertPool()
	for _, certificate := range chain[1:] {
		intermediates.AddCert(certificate)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates})
	return err == nil
}

// Fingerprint returns the SHA-256 fingerprint of a certificate, as openssl prints it.
func Fingerprint(certificate *x509.Certificate) string {
	sum := sha256.Sum256(certificate.Raw)
	return strings.ReplaceAll(fmt.Sprintf("% X", sum[:]), " ", ":")
}
