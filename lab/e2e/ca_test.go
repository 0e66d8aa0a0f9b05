// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// No system root, so that only the kubeconfig says what kubectl trusts.
func noRoots(t *testing.T) []string {
	t.Helper()
	dir := t.TempDir()
	return []string{"SSL_CERT_FILE=" + filepath.Join(dir, "none"), "SSL_CERT_DIR=" + dir}
}

// The root of "tls internal" is in no trust store, and Caddy does not send it.
func TestWhoami_KubeconfigNamesInternalCA(t *testing.T) {
	device := theLab.Callers["bob"]
	client := &http.Client{
		Transport: &http.Transport{
			DialContext:     device.Dial,
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, // as whoever opens the page for the first time
		},
		Timeout: 30 * time.Second,
	}
	defer client.CloseIdleConnections()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, whoamiURL, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Accept", "application/json")
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var facts whoami.Facts
	if err := json.NewDecoder(resp.Body).Decode(&facts); err != nil {
		t.Fatal(err)
	}
	config, err := clientcmd.Load([]byte(facts.Kubeconfig))
	if err != nil {
		t.Fatal(err)
	}
	root, err := theLab.Caddy.CA()
	if err != nil {
		t.Fatal(err)
	}
	cluster := config.Clusters[config.CurrentContext]
	if !bytes.Equal(cluster.CertificateAuthorityData, root) || cluster.InsecureSkipTLSVerify || facts.CAFingerprint == "" {
		t.Errorf("the page's kubeconfig trusts %s, and the page says %q; want Caddy's root", cluster.CertificateAuthorityData, facts.CAFingerprint)
	}
	// This machine is not on the tailnet: use the caller's SOCKS proxy.
	way, err := clientcmd.LoadFromFile(device.Kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	cluster.ProxyURL = way.Clusters["lab"].ProxyURL
	path := filepath.Join(t.TempDir(), "config")
	if err := clientcmd.WriteToFile(*config, path); err != nil {
		t.Fatal(err)
	}
	if stdout, stderr, err := runKubectl(t, path, noRoots(t), "get", "pods", "-o", "name"); err != nil || !strings.Contains(stdout, "pod/"+lab.Pod) {
		t.Errorf("kubectl with the page's kubeconfig: %v: %s%s", err, stdout, stderr)
	}
	// The control: without the CA, kubectl refuses the certificate.
	cluster.CertificateAuthorityData = nil
	if err := clientcmd.WriteToFile(*config, path); err != nil {
		t.Fatal(err)
	}
	if _, stderr, err := runKubectl(t, path, noRoots(t), "get", "pods"); err == nil || !strings.Contains(stderr, "certificate signed by unknown authority") {
		t.Errorf("kubectl without the CA: %v: %s; want that it knows no such authority", err, stderr)
	}
}

// The command writes nothing before the user has confirmed the fingerprint.
func TestKubeconfigCommand_TrustsInternalCAByFingerprint(t *testing.T) {
	_, port, err := net.SplitHostPort(forward(t, "bob", portLocalhost))
	if err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (string, error) {
		cmd := &cobra.Command{Use: "tailscale-impersonate", SilenceUsage: true, SilenceErrors: true}
		caddycmd.Commands()[cmd.Use].CobraFunc(cmd)
		var out bytes.Buffer
		cmd.SetOut(&out)
		cmd.SetErr(&out)
		cmd.SetArgs(append([]string{"kubeconfig", "--server", "https://localhost:" + port}, args...))
		err := cmd.Execute()
		return out.String(), err
	}
	out, err := run()
	if err == nil || out != "" {
		t.Fatalf("printed %q, and no error; want the fingerprint, and no kubeconfig", out)
	}
	_, fingerprint, ok := strings.Cut(err.Error(), "--ca-fingerprint ")
	if !ok {
		t.Fatalf("got error %v; want the fingerprint", err)
	}
	if out, err = run("--ca-fingerprint", fingerprint); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(path, []byte(out), 0o600); err != nil {
		t.Fatal(err)
	}
	if stdout, stderr, err := runKubectl(t, path, noRoots(t), "get", "pods", "-o", "name"); err != nil || !strings.Contains(stdout, "pod/"+lab.Pod) {
		t.Errorf("kubectl with the command's kubeconfig: %v: %s%s", err, stdout, stderr)
	}
}
