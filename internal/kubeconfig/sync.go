// SPDX-License-Identifier: Apache-2.0

package kubeconfig

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// extension is the name of the extension by which [Sync] knows the entries that it wrote.
const extension = "tailscale-impersonate.github.io/kubeconfig"

// mark is the value of the extension.
type mark struct {
	// From is the URL of the site that listed the entry's site.
	From string `json:"from"`
	// Name is the name that the entry was written with. An entry that its user has
	// renamed is the user's.
	Name string `json:"name"`
}

// Listing is the sites of one Caddy that a caller may use, as one of them lists them.
type Listing struct {
	// From is the URL of the site that lists them.
	From string
	// Config has the contexts of all of them.
	Config *api.Config
}

// Changes are what [Sync] has changed, by the names of contexts.
type Changes struct {
	Added, Removed []string
	// Current is the current context.
	Current string
}

// Sync makes the files that kubectl reads by default have the entries of list. It updates
// entries that it wrote before, and with prune removes those that it wrote for the same
// Caddy and that list lacks. It never changes others, and changes the current context only
// if there is none, or none any more.
//
// An entry is for the same Caddy if the site that listed it is list.From, or in list.
func Sync(list Listing, prune bool) (*Changes, error) {
	files := clientcmd.NewDefaultPathOptions()
	into, err := files.GetStartingConfig()
	if err != nil {
		return nil, err
	}
	before := slices.Collect(maps.Keys(into.Contexts))
	s := &syncing{from: list.From, known: map[string]bool{list.From: true}}
	for _, cluster := range list.Config.Clusters {
		s.known[cluster.Server] = true
	}
	if err := errors.Join(
		put(s, clusters, into.Clusters, list.Config.Clusters),
		put(s, users, into.AuthInfos, list.Config.AuthInfos),
		put(s, contexts, into.Contexts, list.Config.Contexts),
	); err != nil {
		return nil, fmt.Errorf("%w, and was not written by --all, or has been changed since: rename it (kubectl config rename-context) or remove it (kubectl config delete-context, delete-cluster, delete-user)", err)
	}
	if prune {
		s.prune(into, list.Config)
	}
	if into.Contexts[into.CurrentContext] == nil && (into.CurrentContext == "" || slices.Contains(before, into.CurrentContext)) {
		into.CurrentContext = list.Config.CurrentContext
	}
	changes := &Changes{Current: into.CurrentContext}
	for name := range into.Contexts {
		if !slices.Contains(before, name) {
			changes.Added = append(changes.Added, name)
		}
	}
	for _, name := range before {
		if into.Contexts[name] == nil {
			changes.Removed = append(changes.Removed, name)
		}
	}
	slices.Sort(changes.Added)
	slices.Sort(changes.Removed)
	return changes, clientcmd.ModifyConfig(files, *into, false)
}

// syncing is a Sync under way.
type syncing struct {
	from string
	// known are the URLs of sites of the same Caddy.
	known map[string]bool
}

// wrote reports whether Sync wrote the entry of that name and with these extensions, for
// the same Caddy.
func (s *syncing) wrote(name string, extensions map[string]runtime.Object) bool {
	unknown, ok := extensions[extension].(*runtime.Unknown)
	if !ok {
		return false
	}
	var m mark
	return json.Unmarshal(unknown.Raw, &m) == nil && m.Name == name && s.known[m.From]
}

// mark marks the entry of that name and with these extensions as written by Sync.
func (s *syncing) mark(name string, extensions *map[string]runtime.Object) error {
	text, err := json.Marshal(mark{From: s.from, Name: name})
	if err != nil {
		return err
	}
	if *extensions == nil {
		*extensions = make(map[string]runtime.Object)
	}
	(*extensions)[extension] = &runtime.Unknown{Raw: text, ContentType: runtime.ContentTypeJSON}
	return nil
}

// kind is a kind of entries.
type kind[T any] struct {
	name       string
	extensions func(*T) *map[string]runtime.Object
	same       func(existing, entry *T) bool
	// update gives existing what New and AddContexts set in entry. It returns false if a
	// user has made existing an entry for something else.
	update func(existing, entry *T) bool
}

var (
	clusters = kind[api.Cluster]{
		"cluster", func(c *api.Cluster) *map[string]runtime.Object { return &c.Extensions }, sameCluster,
		func(existing, entry *api.Cluster) bool {
			existing.CertificateAuthorityData, existing.TLSServerName = entry.CertificateAuthorityData, entry.TLSServerName
			return existing.Server == entry.Server
		},
	}
	users = kind[api.AuthInfo]{
		"user", func(u *api.AuthInfo) *map[string]runtime.Object { return &u.Extensions }, sameUser,
		func(existing, entry *api.AuthInfo) bool {
			existing.Impersonate, existing.ImpersonateGroups = entry.Impersonate, entry.ImpersonateGroups
			return existing.Token == entry.Token
		},
	}
	contexts = kind[api.Context]{
		"context", func(c *api.Context) *map[string]runtime.Object { return &c.Extensions }, sameContext, sameContext,
	}
)

// put adds entries to into, and updates those that are there.
func put[T any](s *syncing, k kind[T], into, entries map[string]*T) error {
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		entry := entries[name]
		existing, ok := into[name]
		switch {
		case !ok:
			into[name], existing = entry, entry
		case !s.wrote(name, *k.extensions(existing)):
			if !k.same(existing, entry) {
				return fmt.Errorf("%s %q %w", k.name, name, ErrTaken)
			}
			continue // it is the user's, and stays so
		case !k.update(existing, entry):
			return fmt.Errorf("%s %q %w", k.name, name, ErrTaken)
		}
		if err := s.mark(name, k.extensions(existing)); err != nil {
			return err
		}
	}
	return nil
}

// prune removes from config what Sync wrote for the same Caddy and wanted lacks. Clusters
// and users that a context still names stay.
func (s *syncing) prune(config, wanted *api.Config) {
	for name, context := range config.Contexts {
		// Sync writes contexts that have the name of their user, which begins with that of
		// their cluster. Any other is its user's.
		written := context.AuthInfo == name && strings.HasPrefix(name, context.Cluster)
		if wanted.Contexts[name] == nil && written && s.wrote(name, context.Extensions) {
			delete(config.Contexts, name)
		}
	}
	named := make(map[string]bool)
	for _, context := range config.Contexts {
		named["cluster "+context.Cluster], named["user "+context.AuthInfo] = true, true
	}
	for name, cluster := range config.Clusters {
		if wanted.Clusters[name] == nil && !named["cluster "+name] && s.wrote(name, cluster.Extensions) {
			delete(config.Clusters, name)
		}
	}
	for name, user := range config.AuthInfos {
		if wanted.AuthInfos[name] == nil && !named["user "+name] && s.wrote(name, user.Extensions) {
			delete(config.AuthInfos, name)
		}
	}
}
