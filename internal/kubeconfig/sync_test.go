// SPDX-License-Identifier: Apache-2.0

package kubeconfig_test

import (
	"errors"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/kubeconfig"
)

const (
	siteA = "https://a.example.ts.net"
	siteB = "https://b.example.ts.net"
	siteC = "https://c.example.ts.net/cluster-c"
)

// listing returns what the site from lists.
func listing(t *testing.T, from string, sites ...kubeconfig.Site) kubeconfig.Listing {
	t.Helper()
	config, err := kubeconfig.ForSites(sites...)
	if err != nil {
		t.Fatal(err)
	}
	return kubeconfig.Listing{From: from, Config: config}
}

// at returns a site whose caller can choose among groups.
func at(server string, groups ...string) kubeconfig.Site {
	return kubeconfig.Site{Server: server, Choices: kubeconfig.Choices{User: "alice", OnRequest: groups}}
}

// sync merges a listing, and fails the test on an error.
func sync(t *testing.T, list kubeconfig.Listing, prune bool) *kubeconfig.Changes {
	t.Helper()
	changes, err := kubeconfig.Sync(list, prune)
	if err != nil {
		t.Fatal(err)
	}
	return changes
}

func contextsOf(config *api.Config) []string { return slices.Sorted(maps.Keys(config.Contexts)) }

func TestForSites_Contexts(t *testing.T) {
	readOnly := at(siteB, "admins")
	readOnly.Choices.ReadOnly = "viewers"
	for _, tt := range []struct {
		name    string
		sites   []kubeconfig.Site
		want    []string
		current string
	}{
		{"one", []kubeconfig.Site{at(siteA)}, []string{"a.example.ts.net"}, "a.example.ts.net"},
		{
			"the first is current", []kubeconfig.Site{at(siteC), at(siteA, "admins")},
			[]string{"a.example.ts.net", "a.example.ts.net-admins", "c.example.ts.net/cluster-c"}, "c.example.ts.net/cluster-c",
		},
		{
			"for reading only", []kubeconfig.Site{readOnly, at(siteA)},
			[]string{"a.example.ts.net", "b.example.ts.net", "b.example.ts.net-admins", "b.example.ts.net-read-only"}, "b.example.ts.net-read-only",
		},
		{
			"ports and schemes", []kubeconfig.Site{at("http://k8s"), at("https://k8s"), at("https://k8s:8443")},
			[]string{"k8s", "k8s:80", "k8s:8443"}, "k8s:80",
		},
		{
			"a group's context has the name of another site's", []kubeconfig.Site{at("https://k8s-b"), at("https://k8s", "b")},
			[]string{"k8s", "k8s-b", "k8s-b-3e23e816"}, "k8s-b",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			config := listing(t, siteA, tt.sites...).Config
			if diff := cmp.Diff(tt.want, contextsOf(config)); diff != "" {
				t.Errorf("contexts (-want +got):\n%s", diff)
			}
			if config.CurrentContext != tt.current {
				t.Errorf("got current context %q; want %q", config.CurrentContext, tt.current)
			}
			slices.Reverse(tt.sites)
			if diff := cmp.Diff(tt.want, contextsOf(listing(t, siteA, tt.sites...).Config)); diff != "" {
				t.Errorf("contexts depend on the order of sites (-want +got):\n%s", diff)
			}
		})
	}
}

// What is gone is removed, whichever site of the Caddy lists the rest.
func TestSync_PrunesWhatItWrote(t *testing.T) {
	for _, tt := range []struct {
		name string
		list func(*testing.T) kubeconfig.Listing
		want []string // the contexts that are removed
	}{
		{"nothing", func(t *testing.T) kubeconfig.Listing {
			return listing(t, siteA, at(siteA, "admins"), at(siteB), at(siteC))
		}, nil},
		{"a site", func(t *testing.T) kubeconfig.Listing { return listing(t, siteA, at(siteA, "admins"), at(siteB)) }, []string{"c.example.ts.net/cluster-c"}},
		{"a group", func(t *testing.T) kubeconfig.Listing { return listing(t, siteA, at(siteA), at(siteB), at(siteC)) }, []string{"a.example.ts.net-admins"}},
		{"as another site says", func(t *testing.T) kubeconfig.Listing { return listing(t, siteB, at(siteB), at(siteA, "admins")) }, []string{"c.example.ts.net/cluster-c"}},
		{"all but a site that lists others", func(t *testing.T) kubeconfig.Listing { return listing(t, siteA, at(siteB)) }, []string{"a.example.ts.net", "a.example.ts.net-admins", "c.example.ts.net/cluster-c"}},
		{"another Caddy's", func(t *testing.T) kubeconfig.Listing { return listing(t, "https://z", at("https://z")) }, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			setKubeconfig(t, mine)
			sync(t, listing(t, siteA, at(siteA, "admins"), at(siteB), at(siteC)), false)
			before := load(t)
			changes := sync(t, tt.list(t), true)
			if diff := cmp.Diff(tt.want, changes.Removed); diff != "" {
				t.Errorf("removed (-want +got):\n%s", diff)
			}
			after := load(t)
			for name := range before.Contexts {
				want := !slices.Contains(tt.want, name)
				if got := after.Contexts[name] != nil; got != want {
					t.Errorf("context %s is there: %t; want %t", name, got, want)
				}
				if got := after.AuthInfos[before.Contexts[name].AuthInfo] != nil; got != want {
					t.Errorf("the user of context %s is there: %t; want %t", name, got, want)
				}
			}
			for name := range before.Clusters {
				if got, want := after.Clusters[name] != nil, after.Contexts[name] != nil; got != want {
					t.Errorf("cluster %s is there: %t; want %t", name, got, want)
				}
			}
			if after.CurrentContext != "work" {
				t.Errorf("the current context is %q", after.CurrentContext)
			}
		})
	}
}

func TestSync_PruneOnlyIfAsked(t *testing.T) {
	setKubeconfig(t, "")
	sync(t, listing(t, siteA, at(siteA), at(siteB)), false)
	if changes := sync(t, listing(t, siteA, at(siteA)), false); len(changes.Removed) > 0 || load(t).Contexts["b.example.ts.net"] == nil {
		t.Errorf("removed %v", changes.Removed)
	}
}

// What the command did not write stays, also if it has the name and the server of what is
// gone; so does what its user has made something else of.
func TestSync_LeavesOtherEntries(t *testing.T) {
	files := setKubeconfig(t, mine)
	// As without --all, which does not mark it.
	if _, err := kubeconfig.Merge(newConfig(t, siteC, "")); err != nil {
		t.Fatal(err)
	}
	sync(t, listing(t, siteA, at(siteA), at(siteB, "admins", "ops"), at(siteC)), false)
	// As kubectl config rename-context does, and set-context --user.
	config, err := clientcmd.LoadFromFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	config.Contexts["prod"] = config.Contexts["b.example.ts.net"]
	delete(config.Contexts, "b.example.ts.net")
	config.Contexts["b.example.ts.net-ops"].AuthInfo = "me"
	config.Clusters["copy"] = config.Clusters["a.example.ts.net"].DeepCopy() // with the mark
	if err := clientcmd.WriteToFile(*config, files[0]); err != nil {
		t.Fatal(err)
	}
	before := load(t)
	changes := sync(t, listing(t, siteA, at(siteA)), true)
	if diff := cmp.Diff([]string{"b.example.ts.net-admins"}, changes.Removed); diff != "" {
		t.Errorf("removed (-want +got):\n%s", diff)
	}
	after := load(t)
	if after.Clusters["copy"] == nil {
		t.Error("a cluster that a user copied is gone")
	}
	for _, name := range []string{"work", "prod", "c.example.ts.net/cluster-c", "b.example.ts.net-ops"} {
		if diff := cmp.Diff(before.Contexts[name], after.Contexts[name]); diff != "" || after.Contexts[name] == nil {
			t.Errorf("context %s changed:\n%s", name, diff)
			continue
		}
		if cluster := after.Contexts[name].Cluster; after.Clusters[cluster] == nil {
			t.Errorf("context %s has lost its cluster", name)
		}
		if user := after.Contexts[name].AuthInfo; after.AuthInfos[user] == nil {
			t.Errorf("context %s has lost its user", name)
		}
	}
}

// A new authority and other groups replace what the command wrote. What its user added to an
// entry stays.
func TestSync_UpdatesWhatItWrote(t *testing.T) {
	files := setKubeconfig(t, "")
	site := at(siteA, "a:b")
	site.CA = authority(t)
	sync(t, listing(t, siteA, site), false)
	config := load(t)
	config.Contexts["a.example.ts.net"].Namespace = "team"
	if err := clientcmd.WriteToFile(*config, files[0]); err != nil {
		t.Fatal(err)
	}
	site = at(siteA, "a b")
	if changes := sync(t, listing(t, siteA, site), true); len(changes.Added)+len(changes.Removed) > 0 {
		t.Errorf("got %+v; want an update only", changes)
	}
	after := load(t)
	if got := after.AuthInfos["a.example.ts.net-a-b"].ImpersonateGroups; !slices.Equal(got, []string{"a b"}) {
		t.Errorf("the user asks for %q", got)
	}
	if ca := after.Clusters["a.example.ts.net"].CertificateAuthorityData; len(ca) > 0 {
		t.Errorf("the cluster still has the CA %s", ca)
	}
	if got := after.Contexts["a.example.ts.net"].Namespace + after.Contexts["a.example.ts.net-a-b"].Namespace; got != "team" {
		t.Errorf("the namespace is %q", got)
	}
}

func TestSync_RefusesNamesInUse(t *testing.T) {
	const other = "apiVersion: v1\nkind: Config\ncurrent-context: b.example.ts.net\ncontexts:\n- name: b.example.ts.net\n  context: {cluster: mine, user: me}\n"
	files := setKubeconfig(t, other)
	_, err := kubeconfig.Sync(listing(t, siteA, at(siteA), at(siteB)), true)
	if !errors.Is(err, kubeconfig.ErrTaken) || !strings.Contains(err.Error(), `context "b.example.ts.net"`) {
		t.Errorf("got error %v; want ErrTaken for the context", err)
	}
	if got, err := os.ReadFile(files[0]); err != nil || string(got) != other {
		t.Errorf("the file has changed: %v\n%s", err, got)
	}
}

func TestSync_ReplacesCurrentContextOnlyIfItIsGone(t *testing.T) {
	setKubeconfig(t, "")
	if changes := sync(t, listing(t, siteA, at(siteB), at(siteA)), true); changes.Current != "b.example.ts.net" {
		t.Errorf("got current context %q; want the first, as there was none", changes.Current)
	}
	if changes := sync(t, listing(t, siteA, at(siteA), at(siteB)), true); changes.Current != "b.example.ts.net" {
		t.Errorf("got current context %q; want it unchanged", changes.Current)
	}
	if changes := sync(t, listing(t, siteA, at(siteA)), true); changes.Current != "a.example.ts.net" || load(t).CurrentContext != changes.Current {
		t.Errorf("got current context %q; want that of the site that is left", changes.Current)
	}
}
