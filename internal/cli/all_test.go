// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"k8s.io/client-go/tools/clientcmd"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/siteca"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

// newListing starts a site whose page says facts, which may change.
func newListing(t *testing.T, facts *whoami.Facts) *httptest.Server {
	t.Helper()
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		said := *facts
		said.Server = "http://" + r.Host
		if err := whoami.Serve(w, r, &said); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(site.Close)
	return site
}

// siteOf returns a site that the page lists.
func siteOf(server string, groups ...string) whoami.Site {
	f := &whoami.Facts{User: "alice@example.com"}
	for _, group := range groups {
		f.HeldBack = append(f.HeldBack, whoami.Group{Name: group})
	}
	return whoami.NewSite(server, nil, f)
}

// loaded returns the contexts in a file.
func loaded(t *testing.T, file string) (names []string) {
	t.Helper()
	config, err := clientcmd.LoadFromFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for name := range config.Contexts {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func TestKubeconfig_AllMergesAndPrunes(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config")
	t.Setenv("KUBECONFIG", file)
	facts := &whoami.Facts{User: "alice@example.com", Sites: []whoami.Site{
		siteOf("https://a.example.com", "admins"), siteOf("https://b.example.com/cluster-b"),
	}}
	site := newListing(t, facts)
	own := strings.TrimPrefix(site.URL, "http://")
	if out, err := run(t, "kubeconfig", "--server", site.URL, "--context", "mine", "--merge"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, tt := range []struct {
		change func()
		args   []string
		want   []string // besides mine and the site's own
		says   string
	}{
		{func() {}, nil, []string{"a.example.com", "a.example.com-admins", "b.example.com/cluster-b"}, "Added contexts:\n\n"},
		{func() {}, []string{"--prune"}, []string{"a.example.com", "a.example.com-admins", "b.example.com/cluster-b"}, "All contexts were there already.\n"},
		{func() { facts.Sites = facts.Sites[:1] }, nil, []string{"a.example.com", "a.example.com-admins", "b.example.com/cluster-b"}, ""},
		{func() {}, []string{"--prune"}, []string{"a.example.com", "a.example.com-admins"}, "Removed contexts:\n\n  b.example.com/cluster-b\n\nThe current context is still \"mine\""},
	} {
		tt.change()
		out, err := run(t, append([]string{"kubeconfig", "--server", site.URL, "--all"}, tt.args...)...)
		if err != nil {
			t.Fatal(err)
		}
		want := append([]string{"mine", own}, tt.want...)
		slices.Sort(want)
		if got := loaded(t, file); !slices.Equal(got, want) || !strings.Contains(out, tt.says) {
			t.Errorf("%v: got contexts %q, and printed %q; want %q", tt.args, got, out, want)
		}
	}
	// A node that does not answer is not a site that is gone.
	facts.Sites, facts.SitesIncomplete = nil, true
	before := loaded(t, file)
	if out, err := run(t, "kubeconfig", "--server", site.URL, "--all", "--prune"); err == nil || !strings.Contains(err.Error(), "not every site of the Caddy has answered") || !slices.Equal(loaded(t, file), before) {
		t.Errorf("incomplete: printed %q, %v, and left %q", out, err, loaded(t, file))
	}
	// One that lets the caller in nowhere is an error.
	facts.Refused, facts.SitesIncomplete = "alice may not use this server", false
	if out, err := run(t, "kubeconfig", "--server", site.URL, "--all", "--prune"); err == nil || !strings.Contains(err.Error(), facts.Refused) || !slices.Equal(loaded(t, file), before) {
		t.Errorf("refused: printed %q, %v, and left %q", out, err, loaded(t, file))
	}
}

func TestKubeconfig_AllPrintsWithoutMerge(t *testing.T) {
	t.Setenv("KUBECONFIG", filepath.Join(t.TempDir(), "config"))
	site := newListing(t, &whoami.Facts{User: "alice", Sites: []whoami.Site{siteOf("https://a.example.com")}})
	out, err := run(t, "kubeconfig", "--server", site.URL, "--all", "--merge=false")
	if err != nil {
		t.Fatal(err)
	}
	config, err := clientcmd.Load([]byte(out))
	if err != nil || len(config.Contexts) != 2 {
		t.Errorf("printed %s", out)
	}
	if _, err := os.Stat(os.Getenv("KUBECONFIG")); !os.IsNotExist(err) {
		t.Errorf("kubectl's file was changed: %v", err)
	}
}

// Only whoever the user trusts says which sites there are, and no more than that: a
// kubeconfig from elsewhere could run programs.
func TestKubeconfig_AllTrustsTheSiteOnly(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config")
	t.Setenv("KUBECONFIG", file)
	private, root := newSite(t, true, nil)
	if out, err := run(t, "kubeconfig", "--server", private.URL, "--all"); err == nil || !strings.Contains(err.Error(), "--ca-fingerprint "+siteca.Fingerprint(root)) {
		t.Errorf("without the fingerprint: printed %q, %v", out, err)
	}
	other := filepath.Join(t.TempDir(), "other.crt")
	_, otherRoot := newSite(t, true, nil)
	if err := os.WriteFile(other, []byte(pemOf(otherRoot)), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := run(t, "kubeconfig", "--server", private.URL, "--all", "--ca", other); err == nil || !strings.Contains(err.Error(), "its list of sites is not used") {
		t.Errorf("with another CA: printed %q, %v", out, err)
	}
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Errorf("kubectl's file was written: %v", err)
	}
	for name, body := range map[string]string{
		"no page":      "404 page not found",
		"a bad URL":    `{"server": "x", "user": "alice", "sites": [{"server": "file:///etc"}]}`,
		"a bad CA":     `{"server": "x", "user": "alice", "sites": [{"server": "https://a", "certificate_authority": "none"}]}`,
		"another page": `{"hello": "world"}`,
	} {
		site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(body)) }))
		if out, err := run(t, "kubeconfig", "--server", site.URL, "--all"); err == nil {
			t.Errorf("%s: printed %q, and no error", name, out)
		}
		site.Close()
	}
	// Its kubeconfig is not used.
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`{"server": "x", "user": "alice", "sites": [{"server": "https://a", "user": "alice"}],
			"kubeconfig": "apiVersion: v1\nkind: Config\nusers:\n- name: a\n  user: {exec: {apiVersion: client.authentication.k8s.io/v1, command: evil}}\n"}`))
	}))
	defer site.Close()
	out, err := run(t, "kubeconfig", "--server", site.URL, "--all", "--merge=false")
	if err != nil || strings.Contains(out, "evil") || !strings.Contains(out, "server: https://a\n") {
		t.Errorf("printed %q, %v", out, err)
	}
}
