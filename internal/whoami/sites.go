// SPDX-License-Identifier: Apache-2.0

package whoami

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"

	"k8s.io/client-go/tools/clientcmd/api"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/kubeconfig"
)

// Site is a site that a caller may use, and who the caller is there.
type Site struct {
	// Name is the name of its context in a kubeconfig, and Server its URL.
	Name   string `json:"name"`
	Server string `json:"server"`

	// Service is the name of the Tailscale Service that Server stands for, if it is one.
	Service string `json:"service,omitempty"`

	// User and Groups are the Kubernetes user and groups of the caller there, HeldBack the
	// groups that requests use only if they ask for them, and ReadOnly the group for
	// reading only.
	User     string   `json:"user"`
	Groups   []string `json:"groups,omitempty"`
	HeldBack []string `json:"held_back,omitempty"`
	ReadOnly string   `json:"read_only,omitempty"`

	// CertificateAuthority is the authority of the site's certificate, in PEM format,
	// empty if clients know it.
	CertificateAuthority string `json:"certificate_authority,omitempty"`
	// CA is the same.
	CA *x509.Certificate `json:"-"`
}

// NewSite returns the site at the URL server, which says f about the caller, and whose
// certificate is from ca.
func NewSite(server string, ca *x509.Certificate, f *Facts) Site {
	s := Site{Server: server, CA: ca, Service: f.Service, User: f.User, ReadOnly: f.ReadOnly, Groups: names(f.Groups), HeldBack: names(f.HeldBack)}
	if ca != nil {
		s.CertificateAuthority = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw}))
	}
	s.Name = s.kubeconfig().Name()
	return s
}

func names(groups []Group) (names []string) {
	for _, group := range groups {
		names = append(names, group.Name)
	}
	return names
}

// kubeconfig returns what a kubeconfig needs to know about s.
func (s Site) kubeconfig() kubeconfig.Site {
	choices := kubeconfig.Choices{User: s.User, ReadOnly: s.ReadOnly}
	for _, group := range s.HeldBack {
		if group != s.ReadOnly {
			choices.OnRequest = append(choices.OnRequest, group)
		}
	}
	if len(s.Groups) == 1 && s.Groups[0] == s.ReadOnly {
		choices.ReadOnly = "" // all requests use it
	}
	return kubeconfig.Site{Server: s.Server, CA: s.CA, Choices: choices}
}

// here returns the site that says f.
func (f *Facts) here() Site { return NewSite(f.Server, f.CA, f) }

// All returns the sites that the caller may use, the one that says f first. If f's refuses
// the caller and there are others, it is left out.
func (f *Facts) All() (all []kubeconfig.Site) {
	if f.Refused == "" || len(f.Sites) == 0 {
		all = append(all, f.here().kubeconfig())
	}
	for _, site := range f.Sites {
		all = append(all, site.kubeconfig())
	}
	return all
}

// kubeconfig returns the kubeconfig that r asks for: for the site that it names, or for all
// sites that the caller may use.
func (f *Facts) kubeconfig(r *http.Request) (*api.Config, error) {
	here := f.here().kubeconfig()
	if here.Name() == "" || len(f.Server) > maxServer {
		return nil, apistatus.BadRequest(apistatus.Host, "there is no kubeconfig for host %q: use the name of the site", clip.String(r.Host))
	}
	query := r.URL.Query()
	if !query.Has("kubeconfig") || !query.Has("site") {
		return kubeconfig.ForSites(f.All()...)
	}
	wanted := query.Get("site")
	if wanted == here.Name() {
		return kubeconfig.ForSites(here)
	}
	for _, site := range f.Sites {
		if site.Name == wanted {
			return kubeconfig.ForSites(site.kubeconfig())
		}
	}
	// The same whether there is no such site, or the caller may not use it.
	return nil, apistatus.NotFound(apistatus.UnknownSite, "no site %q that you may use: %s without a query lists those", clip.String(wanted), clip.String(r.URL.Path))
}

// ReadCertificates sets the CA of each site from its CertificateAuthority, which was read
// from JSON.
func (f *Facts) ReadCertificates() error {
	for i := range f.Sites {
		site := &f.Sites[i]
		if site.CertificateAuthority == "" {
			continue
		}
		block, _ := pem.Decode([]byte(site.CertificateAuthority))
		if block == nil || block.Type != "CERTIFICATE" {
			return fmt.Errorf("the certificate authority of %q is not a PEM certificate", site.Server)
		}
		var err error
		if site.CA, err = x509.ParseCertificate(block.Bytes); err != nil {
			return err
		}
	}
	return nil
}
