// SPDX-License-Identifier: Apache-2.0

// Package kubeconfig writes kubeconfigs for an API server behind the proxy. They hold the
// proxy's URL, its certificate authority where that is a private one, and no credentials, as
// the tailnet identifies callers.
package kubeconfig

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"path"
	"slices"
	"strings"
	"unicode"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// token is a placeholder: without credentials, kubectl asks for a user name and a
// password. The proxy removes it.
const token = "unused"

// New returns a kubeconfig with one context, name, for the proxy at the URL server. If
// name is empty, it is the server's host and path, with the port in between unless that is
// 443 with https. The proxy's certificate is from ca, or from one that clients know if ca
// is nil.
func New(server, name string, ca *x509.Certificate) (*api.Config, error) {
	u, err := url.Parse(server)
	if err != nil {
		return nil, fmt.Errorf("server: %w", err)
	}
	if (u.Scheme != "https" && u.Scheme != "http") || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("server %q: must be a URL such as https://k8s.example.ts.net", server)
	}
	if strings.ContainsFunc(u.Host, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return nil, fmt.Errorf("server %q: the host has characters that cannot be printed", server)
	}
	below := strings.TrimRight(u.EscapedPath(), "/")
	if below != "" && path.Clean(below) != below {
		return nil, fmt.Errorf("server %q: the path must not contain //, /./ or /../", server)
	}
	if name == "" {
		name = hostOf(u) + below
	}
	config := api.NewConfig()
	cluster := &api.Cluster{Server: u.Scheme + "://" + u.Host + below}
	if u.Scheme == "https" {
		// Otherwise kubectl proxy would neither send a server name nor check the
		// certificate on connections for exec, attach and port-forward.
		cluster.TLSServerName = u.Hostname()
		if ca != nil {
			cluster.CertificateAuthorityData = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw})
		}
	}
	config.Clusters[name] = cluster
	config.AuthInfos[name] = &api.AuthInfo{Token: token}
	config.Contexts[name] = &api.Context{Cluster: name, AuthInfo: name}
	config.CurrentContext = name
	return config, nil
}

// hostOf returns the host in u, with the port unless that is 443 with https. Two sites do
// not share what it returns and a path.
func hostOf(u *url.URL) string {
	switch {
	case u.Scheme == "https" && (u.Port() == "" || u.Port() == "443"):
		return u.Hostname()
	case u.Port() == "":
		return u.Host + ":80"
	}
	return u.Host
}

// Site is a site of a Caddy, and what a caller can choose among there.
type Site struct {
	Server  string            // its URL
	CA      *x509.Certificate // the authority of its certificate, nil if clients know it
	Choices Choices
}

// Name returns the name of the site's context, empty if its URL is invalid.
func (s Site) Name() string {
	config, err := New(s.Server, "", nil)
	if err != nil {
		return ""
	}
	return config.CurrentContext
}

// ForSites returns a kubeconfig with the contexts of all sites. The current context is one
// of the first site.
func ForSites(sites ...Site) (*api.Config, error) {
	all := api.NewConfig()
	// Names must not depend on which site is the first.
	sorted := slices.SortedFunc(slices.Values(sites), func(a, b Site) int { return strings.Compare(a.Server, b.Server) })
	for _, site := range sorted {
		config, err := New(site.Server, "", site.CA)
		if err != nil {
			return nil, err
		}
		maps.Copy(all.Clusters, config.Clusters)
		maps.Copy(all.AuthInfos, config.AuthInfos)
		maps.Copy(all.Contexts, config.Contexts)
	}
	for _, site := range sorted {
		if current := addContexts(all, site.Name(), site.Choices); site.Server == sites[0].Server {
			all.CurrentContext = current
		}
	}
	return all, nil
}

// Write returns config in the format of a kubeconfig file.
func Write(config *api.Config) ([]byte, error) { return clientcmd.Write(*config) }

// ErrTaken is returned by [Merge] if a different entry has a name that it needs.
var ErrTaken = errors.New("already exists and is different")

// Merge adds the entries of config to the files that kubectl reads by default, those in
// KUBECONFIG or ~/.kube/config. It does not change entries in them, nor the current
// context if there is one. It returns the current context.
func Merge(config *api.Config) (current string, err error) {
	files := clientcmd.NewDefaultPathOptions()
	into, err := files.GetStartingConfig()
	if err != nil {
		return "", err
	}
	if err := errors.Join(
		add("cluster", into.Clusters, config.Clusters, sameCluster),
		add("user", into.AuthInfos, config.AuthInfos, sameUser),
		add("context", into.Contexts, config.Contexts, sameContext),
	); err != nil {
		return "", fmt.Errorf("%w: choose another name with --context", err)
	}
	if into.CurrentContext == "" {
		into.CurrentContext = config.CurrentContext
	}
	return into.CurrentContext, clientcmd.ModifyConfig(files, *into, false)
}

func sameCluster(a, b *api.Cluster) bool {
	return a.Server == b.Server && (len(b.CertificateAuthorityData) == 0 || bytes.Equal(a.CertificateAuthorityData, b.CertificateAuthorityData))
}

func sameUser(a, b *api.AuthInfo) bool {
	return a.Token == b.Token && a.Impersonate == b.Impersonate && slices.Equal(a.ImpersonateGroups, b.ImpersonateGroups)
}

func sameContext(a, b *api.Context) bool { return a.Cluster == b.Cluster && a.AuthInfo == b.AuthInfo }

// add adds entries to into. It returns [ErrTaken] if into has a different entry of the same
// name, according to same.
func add[T any](kind string, into, entries map[string]*T, same func(a, b *T) bool) error {
	for name, entry := range entries {
		switch existing, ok := into[name]; {
		case !ok:
			into[name] = entry
		case !same(existing, entry):
			return fmt.Errorf("%s %q %w", kind, name, ErrTaken)
		}
	}
	return nil
}
