// SPDX-License-Identifier: Apache-2.0

package kubeconfig_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/kubeconfig"
)

const server = "https://k8s.example.ts.net"

// newConfig returns a kubeconfig for url, and fails the test on an error.
func newConfig(t *testing.T, url, name string) *api.Config {
	t.Helper()
	config, err := kubeconfig.New(url, name, nil)
	if err != nil {
		t.Fatal(err)
	}
	return config
}

func TestNew_ServerAndContext(t *testing.T) {
	for _, tt := range []struct{ url, name, wantName, wantServer string }{
		{server, "", "k8s.example.ts.net", server},
		{server + "/", "prod", "prod", server},
		{server + ":443", "", "k8s.example.ts.net", server + ":443"},
		{server + ":8443", "", "k8s.example.ts.net:8443", server + ":8443"},
		{"http://k8s:8080", "", "k8s:8080", "http://k8s:8080"},
		{"http://k8s/a", "", "k8s:80/a", "http://k8s/a"},
		{server + "/cluster-a/", "", "k8s.example.ts.net/cluster-a", server + "/cluster-a"},
		{server + "/a/b%20c", "", "k8s.example.ts.net/a/b%20c", server + "/a/b%20c"},
		{"https://[fd7a:115c:a1e0::1]:6443", "", "[fd7a:115c:a1e0::1]:6443", "https://[fd7a:115c:a1e0::1]:6443"},
	} {
		text, err := kubeconfig.Write(newConfig(t, tt.url, tt.name))
		if err != nil {
			t.Fatal(err)
		}
		client, err := clientcmd.NewClientConfigFromBytes(text)
		if err != nil {
			t.Fatal(err)
		}
		config, err := client.ClientConfig()
		if err != nil {
			t.Fatal(err)
		}
		raw, err := client.RawConfig()
		if err != nil {
			t.Fatal(err)
		}
		if user := raw.AuthInfos[tt.wantName]; config.Host != tt.wantServer || raw.CurrentContext != tt.wantName || user == nil || user.Token == "" {
			t.Errorf("%s: got server %s and context %s with user %v; want %s, %s and any token, or kubectl asks for a password", tt.url, config.Host, raw.CurrentContext, user, tt.wantServer, tt.wantName)
		}
	}
	for _, url := range []string{"", "k8s.example.ts.net", "ftp://k8s", "https://", "https://k8s/a/../b", "https://k8s//a", "https://k8s/a/./b", "https://k8s?a=b", "https://user@k8s", "https://k8s#a", "https://%", "https://k8s\u009b2J"} {
		if _, err := kubeconfig.New(url, "", nil); err == nil {
			t.Errorf("server %q: got no error", url)
		}
	}
}

// Without TLS settings, kubectl proxy connects without a server name for exec, attach and
// port-forward, and does not check the certificate.
func TestNew_NamesTLSServer(t *testing.T) {
	for url, want := range map[string]string{
		server:                             "k8s.example.ts.net",
		server + ":8443":                   "k8s.example.ts.net",
		"https://[fd7a:115c:a1e0::1]:6443": "fd7a:115c:a1e0::1",
		"http://k8s:8080":                  "",
	} {
		for _, cluster := range newConfig(t, url, "").Clusters {
			if got := cluster.TLSServerName; got != want {
				t.Errorf("%s: got TLS server name %q; want %q", url, got, want)
			}
		}
	}
}

// authority returns a certificate.
func authority(t *testing.T) *x509.Certificate {
	t.Helper()
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	return server.Certificate()
}

func TestNew_NamesCA(t *testing.T) {
	ca := authority(t)
	for url, want := range map[string]bool{server: true, "http://k8s:8080": false} {
		config, err := kubeconfig.New(url, "", ca)
		if err != nil {
			t.Fatal(err)
		}
		for _, cluster := range config.Clusters {
			block, _ := pem.Decode(cluster.CertificateAuthorityData)
			if got := block != nil && bytes.Equal(block.Bytes, ca.Raw); got != want {
				t.Errorf("%s: got CA %q; want it there: %v", url, cluster.CertificateAuthorityData, want)
			}
		}
	}
}

// Otherwise the old CA would stay, and kubectl would not say why it fails.
func TestMerge_RefusesOtherCA(t *testing.T) {
	setKubeconfig(t, "")
	with, err := kubeconfig.New(server, "", authority(t))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := kubeconfig.Merge(with); err != nil {
			t.Fatal(err)
		}
	}
	// That of a user who has added the CA.
	if _, err := kubeconfig.Merge(newConfig(t, server, "")); err != nil {
		t.Errorf("without a CA: %v; want the cluster left as it is", err)
	}
	for _, cluster := range with.Clusters {
		cluster.CertificateAuthorityData = []byte("other")
	}
	if _, err := kubeconfig.Merge(with); !errors.Is(err, kubeconfig.ErrTaken) {
		t.Errorf("with another CA: got error %v; want ErrTaken", err)
	}
}

// mine is the kubeconfig of a user with another cluster.
const mine = `apiVersion: v1
kind: Config
current-context: work
clusters:
- name: work
  cluster: {server: "https://work.example.com", certificate-authority: ca.crt, extensions: [{name: x, extension: {a: b}}]}
contexts:
- name: work
  context: {cluster: work, user: me, namespace: team}
users:
- name: me
  user: {exec: {apiVersion: client.authentication.k8s.io/v1, command: login, interactiveMode: Never}}
preferences: {colors: true}
`

// setKubeconfig sets KUBECONFIG to files with these contents. An empty one does not exist.
func setKubeconfig(t *testing.T, contents ...string) (files []string) {
	t.Helper()
	dir := t.TempDir()
	for i, content := range contents {
		file := filepath.Join(dir, string(rune('a'+i)))
		if content != "" {
			if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		files = append(files, file)
	}
	t.Setenv("KUBECONFIG", strings.Join(files, string(filepath.ListSeparator)))
	return files
}

func load(t *testing.T) *api.Config {
	t.Helper()
	config, err := clientcmd.NewDefaultPathOptions().GetStartingConfig()
	if err != nil {
		t.Fatal(err)
	}
	return config
}

func TestMerge_KeepsExistingEntries(t *testing.T) {
	const second = "apiVersion: v1\nkind: Config\nclusters:\n- name: lab\n  cluster: {server: https://lab.example.com}\n"
	files := setKubeconfig(t, mine, second)
	before := load(t)
	for range 2 { // users may run it again
		current, err := kubeconfig.Merge(newConfig(t, server, ""))
		if err != nil {
			t.Fatal(err)
		}
		if current != "work" {
			t.Errorf("the current context is %q; want it unchanged", current)
		}
	}
	after := load(t)
	for name, want := range before.Clusters {
		if diff := cmp.Diff(want, after.Clusters[name]); diff != "" {
			t.Errorf("cluster %s changed:\n%s", name, diff)
		}
		delete(after.Clusters, name)
	}
	for name, want := range before.AuthInfos {
		want, got := want.DeepCopy(), after.AuthInfos[name]
		if diff := cmp.Diff(want.Exec.Command, got.Exec.Command); diff != "" {
			t.Errorf("user %s changed:\n%s", name, diff)
		}
	}
	if diff := cmp.Diff(before.Contexts["work"], after.Contexts["work"]); diff != "" {
		t.Errorf("the context changed:\n%s", diff)
	}
	if len(after.Clusters) != 1 || after.Clusters["k8s.example.ts.net"].Server != server || after.Contexts["k8s.example.ts.net"] == nil {
		t.Errorf("the new cluster is not there: %v", after.Clusters)
	}
	for _, file := range files {
		if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v; want it readable only by its owner", file, info, err)
		}
	}
}

func TestMerge_CreatesTheFile(t *testing.T) {
	files := setKubeconfig(t, "")
	current, err := kubeconfig.Merge(newConfig(t, server, "prod"))
	if err != nil {
		t.Fatal(err)
	}
	if current != "prod" || load(t).Contexts["prod"] == nil {
		t.Errorf("the current context is %q; want prod, as there is no other", current)
	}
	if info, err := os.Stat(files[0]); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v; want a file readable only by its owner", info, err)
	}
}

// An entry of the same name is neither overwritten nor reused.
func TestMerge_RejectsNamesInUse(t *testing.T) {
	files := setKubeconfig(t, mine)
	for _, name := range []string{"work", "me"} {
		if _, err := kubeconfig.Merge(newConfig(t, server, name)); !errors.Is(err, kubeconfig.ErrTaken) {
			t.Errorf("%s: got error %v; want %v", name, err, kubeconfig.ErrTaken)
		}
	}
	if got, err := os.ReadFile(files[0]); err != nil || string(got) != mine {
		t.Errorf("the file has changed: %v\n%s", err, got)
	}
}
