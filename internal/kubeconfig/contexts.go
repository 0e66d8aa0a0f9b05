// SPDX-License-Identifier: Apache-2.0

package kubeconfig

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"strings"

	"k8s.io/client-go/tools/clientcmd/api"
)

// Choices are the groups that a caller can choose among.
type Choices struct {
	// User is the caller's Kubernetes user.
	User string
	// OnRequest are groups that requests use only if they ask for them.
	OnRequest []string
	// ReadOnly is a group of the caller for reading only, empty if there is none.
	ReadOnly string
}

// AddContexts adds a context to config, which [New] has returned, for each group that
// choices name: the context of the site with the group behind it. Its requests use that
// group and no other. The context for reading only becomes the current one.
func AddContexts(config *api.Config, choices Choices) {
	config.CurrentContext = addContexts(config, config.CurrentContext, choices)
}

// addContexts adds the contexts of choices to those of a site. It returns the one to use by
// default.
func addContexts(config *api.Config, site string, choices Choices) (current string) {
	cluster := config.Contexts[site].Cluster
	add := func(suffix string, group string) (name string) {
		name = site + "-" + suffix
		if _, taken := config.Contexts[name]; taken { // "k8s" with the group "b", and a site "k8s-b"
			name += hashSuffix(group)
		}
		config.AuthInfos[name] = &api.AuthInfo{Token: token, Impersonate: choices.User, ImpersonateGroups: []string{group}}
		config.Contexts[name] = &api.Context{Cluster: cluster, AuthInfo: name}
		return name
	}
	bySuffix := suffixes(choices.OnRequest)
	for _, suffix := range slices.Sorted(maps.Keys(bySuffix)) {
		add(suffix, bySuffix[suffix])
	}
	if choices.ReadOnly != "" {
		return add(readOnly, choices.ReadOnly)
	}
	return site
}

// readOnly is the suffix of the context for reading only.
const readOnly = "read-only"

// suffixes returns the groups by what they add to the name of a context. A group that does
// not have its suffix to itself gets one that depends on nothing but its name.
func suffixes(groups []string) map[string]string {
	plain := map[string][]string{readOnly: {""}}
	for _, group := range groups {
		plain[plainSuffix(group)] = append(plain[plainSuffix(group)], group)
	}
	out := make(map[string]string)
	for _, suffix := range slices.Sorted(maps.Keys(plain)) {
		for _, group := range plain[suffix] {
			switch {
			case group == "":
			case len(plain[suffix]) == 1:
				out[suffix] = group
			default:
				out[suffix+hashSuffix(group)] = group
			}
		}
	}
	return out
}

// hashSuffix returns a suffix that depends on nothing but the name of a group.
func hashSuffix(group string) string {
	return fmt.Sprintf("-%x", sha256.Sum256([]byte(group)))[:9]
}

// plainSuffix returns group with hyphens for what a shell might not take literally.
func plainSuffix(group string) string {
	return strings.Map(func(r rune) rune {
		if strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_", r) {
			return r
		}
		return '-'
	}, group)
}
