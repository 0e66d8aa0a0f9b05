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
	"net/url"
	"path"
	"slices"
	"strings"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// token is a placeholder: without credentials, kubectl asks for a user name and a
// password. The proxy removes it.
const token = "unused"

// New returns a kubeconfig with one context, name, for the proxy at the URL server. If
// name is empty, it is the server's host and path. The proxy's certificate is from ca, or
// from one that clients know if ca is nil.
func New(server, name string, ca *x509.Certificate) (*api.Config, error) {
	u, err := url.Parse(server)
	if err != nil {
		return nil, fmt.Errorf("server: %w", err)
	}
	if (u.Scheme != "https" && u.Scheme != "http") || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("server %q: must be a URL such as https://k8s.example.ts.net", server)
	}
	below := strings.TrimRight(u.EscapedPath(), "/")
	if below != "" && path.Clean(below) != below {
		return nil, fmt.Errorf("server %q: the path must not contain //, /./ or /../", server)
	}
	if name == "" {
		name = u.Hostname() + below
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
		add("cluster", into.Clusters, config.Clusters, func(a, b *api.Cluster) bool {
			return a.Server == b.Server && (len(b.CertificateAuthorityData) == 0 || bytes.Equal(a.CertificateAuthorityData, b.CertificateAuthorityData))
		}),
		add("user", into.AuthInfos, config.AuthInfos, func(a, b *api.AuthInfo) bool {
			return a.Token == b.Token && a.Impersonate == b.Impersonate && slices.Equal(a.ImpersonateGroups, b.ImpersonateGroups)
		}),
		add("context", into.Contexts, config.Contexts, func(a, b *api.Context) bool {
			return a.Cluster == b.Cluster && a.AuthInfo == b.AuthInfo
		}),
	); err != nil {
		return "", err
	}
	if into.CurrentContext == "" {
		into.CurrentContext = config.CurrentContext
	}
	return into.CurrentContext, clientcmd.ModifyConfig(files, *into, false)
}

// add adds entries to into. It returns [ErrTaken] if into has a different entry of the same
// name, according to same.
func add[T any](kind string, into, entries map[string]*T, same func(a, b *T) bool) error {
	for name, entry := range entries {
		switch existing, ok := into[name]; {
		case !ok:
			into[name] = entry
		case !same(existing, entry):
			return fmt.Errorf("%s %q %w: choose another name with --context", kind, name, ErrTaken)
		}
	}
	return nil
}
