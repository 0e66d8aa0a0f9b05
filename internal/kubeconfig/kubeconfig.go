// SPDX-License-Identifier: Apache-2.0

// Package kubeconfig writes what kubectl needs to reach an API server through the
// proxy: where it is. Who somebody is, is not in it, as the tailnet says that.
package kubeconfig

import (
	"errors"
	"fmt"
	"net/url"
	"strings"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// token stands where kubectl wants credentials: without any it would ask for a user
// name and a password. The proxy removes it.
const token = "unused"

// New returns a kubeconfig for the proxy at the URL server, with one context. If
// name is empty, that is called like the server's host.
func New(server, name string) (*api.Config, error) {
	u, err := url.Parse(server)
	if err != nil {
		return nil, fmt.Errorf("server: %w", err)
	}
	if (u.Scheme != "https" && u.Scheme != "http") || u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("server %q: must be a URL such as https://k8s.example.ts.net", server)
	}
	if name == "" {
		name = u.Hostname()
	}
	config := api.NewConfig()
	config.Clusters[name] = &api.Cluster{Server: u.Scheme + "://" + u.Host}
	config.AuthInfos[name] = &api.AuthInfo{Token: token}
	config.Contexts[name] = &api.Context{Cluster: name, AuthInfo: name}
	config.CurrentContext = name
	return config, nil
}

// Write returns config as the file that kubectl reads.
func Write(config *api.Config) ([]byte, error) { return clientcmd.Write(*config) }

// ErrTaken is returned by [Merge] if a name that it needs stands for something else.
var ErrTaken = errors.New("stands for something else already")

// Merge adds what config holds to the files that kubectl reads by default: to those
// that KUBECONFIG names, or to ~/.kube/config. What is in there stays as it is, the
// current context included if there is one. It returns that context.
func Merge(config *api.Config) (current string, err error) {
	files := clientcmd.NewDefaultPathOptions()
	into, err := files.GetStartingConfig()
	if err != nil {
		return "", err
	}
	if err := errors.Join(
		add("cluster", into.Clusters, config.Clusters, func(a, b *api.Cluster) bool { return a.Server == b.Server }),
		add("user", into.AuthInfos, config.AuthInfos, func(a, b *api.AuthInfo) bool { return a.Token == b.Token }),
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

// add adds entries to those of into. One that is there already stays, if it is the
// same as far as same can tell.
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
