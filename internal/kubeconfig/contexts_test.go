// SPDX-License-Identifier: Apache-2.0

package kubeconfig_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/kubeconfig"
)

func TestAddContexts(t *testing.T) {
	for _, tt := range []struct {
		name    string
		choices kubeconfig.Choices
		want    map[string]string // the group of each context besides the site's own
		current string
	}{
		{"nothing to choose", kubeconfig.Choices{User: "alice"}, map[string]string{}, "prod"},
		{"a group", kubeconfig.Choices{User: "alice", OnRequest: []string{"system:masters"}}, map[string]string{"prod-system-masters": "system:masters"}, "prod"},
		{
			"for reading only", kubeconfig.Choices{User: "alice", OnRequest: []string{"admins"}, ReadOnly: "readers"},
			map[string]string{"prod-admins": "admins", "prod-read-only": "readers"}, "prod-read-only",
		},
		{
			"groups that are spelled alike", kubeconfig.Choices{User: "alice", OnRequest: []string{"a:b", "a b", "c"}},
			map[string]string{"prod-a-b-6783a31e": "a:b", "prod-a-b-c8687a08": "a b", "prod-c": "c"}, "prod",
		},
		{
			"a group called read-only", kubeconfig.Choices{User: "alice", OnRequest: []string{"read-only"}, ReadOnly: "readers"},
			map[string]string{"prod-read-only": "readers", "prod-read-only-4fed3970": "read-only"}, "prod-read-only",
		},
		{"a name for the shell", kubeconfig.Choices{User: "alice", OnRequest: []string{"$(rm)/../x"}}, map[string]string{"prod---rm--..-x": "$(rm)/../x"}, "prod"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			config := newConfig(t, server, "prod")
			kubeconfig.AddContexts(config, tt.choices)
			if config.CurrentContext != tt.current {
				t.Errorf("got current context %q; want %q", config.CurrentContext, tt.current)
			}
			text, err := kubeconfig.Write(config)
			if err != nil {
				t.Fatal(err)
			}
			raw, err := clientcmd.Load(text)
			if err != nil {
				t.Fatal(err)
			}
			got := make(map[string]string)
			for name := range raw.Contexts {
				c, err := clientcmd.NewNonInteractiveClientConfig(*raw, name, nil, nil).ClientConfig()
				if err != nil {
					t.Fatal(err)
				}
				if c.Host != server || c.BearerToken == "" {
					t.Errorf("context %s: got server %q and token %q", name, c.Host, c.BearerToken)
				}
				if name == "prod" {
					if c.Impersonate.UserName != "" {
						t.Errorf("the site's own context asks for %+v", c.Impersonate)
					}
					continue
				}
				if c.Impersonate.UserName != "alice" {
					t.Errorf("context %s asks for the user %q", name, c.Impersonate.UserName)
				}
				got[name] = strings.Join(c.Impersonate.Groups, ",")
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("contexts (-want +got):\n%s", diff)
			}
		})
	}
}

// A context that asks for other groups than one of the same name must not replace it.
func TestMerge_RefusesOtherGroups(t *testing.T) {
	setKubeconfig(t, "")
	config := newConfig(t, server, "prod")
	kubeconfig.AddContexts(config, kubeconfig.Choices{User: "alice", ReadOnly: "readers"})
	for range 2 {
		if _, err := kubeconfig.Merge(config); err != nil {
			t.Fatal(err)
		}
	}
	kubeconfig.AddContexts(newConfig(t, server, "prod"), kubeconfig.Choices{})
	other := newConfig(t, server, "prod")
	kubeconfig.AddContexts(other, kubeconfig.Choices{User: "alice", ReadOnly: "writers"})
	if _, err := kubeconfig.Merge(other); !errors.Is(err, kubeconfig.ErrTaken) {
		t.Errorf("got %v; want ErrTaken", err)
	}
}
