// SPDX-License-Identifier: Apache-2.0

package testcontrol

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

// A host of a service gets a certificate for the service's name, if the control server says
// that it may: from an ACME server, with a DNS record that the control server sets. The ACME
// server is Caddy's.
func TestCertificates_HostGetsOneForTheService(t *testing.T) {
	transport := http.DefaultTransport
	t.Cleanup(func() { http.DefaultTransport = transport }) // once all nodes have ended
	l := newServiceLab(t, serviceHost)
	records := new(txtRecords)
	l.control.OnSetDNS = func(r *tailcfg.SetDNSRequest) error { records.set(r.Name, r.Value); return nil }
	acme := proxytest.FreePort(t)
	issuer := fmt.Sprintf(`
https://localhost:%d {
	bind 127.0.0.1
	tls internal
	acme_server {
		challenges dns-01
		resolvers %s
	}
}
`, acme, records.serve(t))
	l.load(issuer)
	root, err := os.ReadFile(filepath.Join(l.dir, "caddy", "pki", "authorities", "local", "root.crt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(root)
	// The nodes use these.
	t.Setenv("TS_DEBUG_ACME_DIRECTORY_URL", fmt.Sprintf("https://localhost:%d/acme/local/directory", acme))
	http.DefaultTransport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	l.load(issuer + l.site("http://", "tailscale-service/k8s/k8s-api"))

	node := l.node("k8s")
	l.allowHost(node, serviceAddr)
	l.awaitLog("a Tailscale Service is hosted")
	client, err := node.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	l.until("the node may ask for a certificate", func() error {
		status, err := client.StatusWithoutPeers(t.Context())
		if err == nil && !slices.Contains(status.CertDomains, serviceHost) {
			err = fmt.Errorf("for the names %q only", status.CertDomains)
		}
		return err
	})
	if _, _, err := client.CertPair(t.Context(), "web."+domain); err == nil || !strings.Contains(err.Error(), "invalid domain") {
		t.Errorf("for another name: got error %v; want that the domain is invalid", err)
	}
	certificate, key, err := client.CertPair(t.Context(), serviceHost)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		t.Fatal(err)
	}
	intermediates := x509.NewCertPool()
	intermediates.AppendCertsFromPEM(certificate)
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{DNSName: serviceHost, Roots: roots, Intermediates: intermediates}); err != nil {
		t.Error(err)
	}
}

// txtRecords are TXT records of a DNS server.
type txtRecords struct {
	mu     sync.Mutex
	values map[string]string
}

func (r *txtRecords) set(name, value string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.values == nil {
		r.values = make(map[string]string)
	}
	r.values[name] = value
}

// serve answers questions about them until the test is over, and returns its address.
func (r *txtRecords) serve(t *testing.T) string {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		packet := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(packet)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(packet[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			m.Response, m.Additionals = true, nil
			q := m.Questions[0]
			r.mu.Lock()
			value, ok := r.values[strings.TrimSuffix(strings.ToLower(q.Name.String()), ".")]
			r.mu.Unlock()
			if ok && q.Type == dnsmessage.TypeTXT {
				m.Answers = []dnsmessage.Resource{{
					Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class},
					Body:   &dnsmessage.TXTResource{TXT: []string{value}},
				}}
			}
			if answer, err := m.Pack(); err == nil {
				_, _ = conn.WriteTo(answer, from)
			}
		}
	}()
	return conn.LocalAddr().String()
}
