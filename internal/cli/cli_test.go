// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
	"k8s.io/client-go/tools/clientcmd"
)

// run runs the command with these arguments and returns its output.
func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	command, ok := caddycmd.Commands()["tailscale-impersonate"]
	if !ok {
		t.Fatal("Caddy has no command tailscale-impersonate")
	}
	cmd := &cobra.Command{Use: command.Name, SilenceUsage: true, SilenceErrors: true}
	command.CobraFunc(cmd)
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	cmd.SetArgs(args)
	err := cmd.Execute()
	return out.String(), err
}

func TestKubeconfig_PrintsWithoutMerge(t *testing.T) {
	t.Setenv("KUBECONFIG", filepath.Join(t.TempDir(), "config"))
	out, err := run(t, "kubeconfig", "--server", "http://127.0.0.1:1", "--context", "prod")
	if err != nil {
		t.Fatal(err)
	}
	warning, text, _ := strings.Cut(out, "\n") // there is no such site
	config, err := clientcmd.Load([]byte(text))
	if err != nil || !strings.HasPrefix(warning, "Warning: cannot reach the site") {
		t.Fatalf("%v\n%s", err, out)
	}
	if config.CurrentContext != "prod" || config.Clusters["prod"].Server != "http://127.0.0.1:1" {
		t.Errorf("got %s", out)
	}
	if _, err := os.Stat(os.Getenv("KUBECONFIG")); !os.IsNotExist(err) {
		t.Errorf("kubectl's file was changed: %v", err)
	}
}

func TestKubeconfig_MergeKeepsTheCurrentContext(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config")
	t.Setenv("KUBECONFIG", file)
	for _, tt := range []struct{ name, want string }{
		{"first", "current context is first"},
		{"second", "Added context \"second\". The current context is still \"first\". To change that:\n\n  kubectl config use-context second\n"},
	} {
		out, err := run(t, "kubeconfig", "--server", "http://"+tt.name, "--context", tt.name, "--merge")
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(out, tt.want) {
			t.Errorf("%s: printed %q; want it to say %q", tt.name, out, tt.want)
		}
	}
	config, err := clientcmd.LoadFromFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if len(config.Contexts) != 2 || config.CurrentContext != "first" {
		t.Errorf("got contexts %v, and %s as the current one", config.Contexts, config.CurrentContext)
	}
}

func TestExplain_PrintsAnswerOfAdminAPI(t *testing.T) {
	var asked string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = r.Method + " " + r.URL.Path
		if strings.HasSuffix(r.URL.Path, "/nobody") {
			http.Error(w, `{"error":"no tailnet node knows it"}`, http.StatusNotFound)
			return
		}
		_, _ = w.Write([]byte(`{"peers": [
			{"user": "alice@example.com", "login": "alice@example.com", "device": "laptop", "address": "100.64.0.2", "proxy": "k8s", "capability": "cap",
			 "groups": [{"name": "readers", "grants": [1]}], "cut": [{"name": "system:masters", "option": "deny_groups", "grants": [1]}],
			 "grants": [{"value": {"impersonate": {}}, "groups": ["readers"]}], "recording": {"wanted": true}},
			{"refused": "not here", "device": "laptop", "address": "100.64.0.2", "proxy": "other", "looks_for": "cap", "recording": {}}]}`))
	}))
	defer srv.Close()
	address := srv.Listener.Addr().String()
	out, err := run(t, "explain", "--peer", "laptop", "--address", address)
	if err != nil {
		t.Fatal(err)
	}
	if asked != "GET /tailscale_impersonate/peers/laptop" {
		t.Errorf("asked %s", asked)
	}
	for _, want := range []string{"alice@example.com on laptop", "readers", "from grant 1", "left out by deny_groups", "sessions are recorded", `cap: {"impersonate":{}}`, `tailnet node "other"`, "not here"} {
		if !strings.Contains(out, want) {
			t.Errorf("printed, without %q:\n%s", want, out)
		}
	}
	if out, err = run(t, "explain", "--peer", "laptop", "--address", address, "--json"); err != nil || !strings.Contains(out, `"option": "deny_groups"`) {
		t.Errorf("as JSON: %v\n%s", err, out)
	}
	if _, err := run(t, "explain", "--peer", "nobody", "--address", address); err == nil || !strings.Contains(err.Error(), "no tailnet node knows it") {
		t.Errorf("nobody: got error %v; want the admin API's", err)
	}
}

func TestRBAC_ReadsThePolicyFile(t *testing.T) {
	out, err := run(t, "rbac", "--policy", filepath.Join("..", "..", "examples", "policy.hujson"), "--constrained")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"tailnet-readers", "tag:k8s-readers", "impersonate:user-info", "name: proxy", "namespace: tailscale-impersonate"} {
		if !strings.Contains(out, want) {
			t.Errorf("printed, without %q:\n%s", want, out)
		}
	}
}

func TestRBAC_WarnsAboutGrants(t *testing.T) {
	policy := filepath.Join(t.TempDir(), "policy.hujson")
	if err := os.WriteFile(policy, []byte(`{"grants": [{"app": {"tailscale.com/cap/kubernetes": [{"impersonates": {"groups": ["ops"]}}]}}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := run(t, "rbac", "--policy", policy)
	if err != nil || !strings.Contains(out, "warning: "+policy+`: grant 1: tailscale.com/cap/kubernetes: unknown key "impersonates"; the nearest known key is "impersonate"`) {
		t.Errorf("printed %q, %v; want a warning", out, err)
	}
}

func TestCommands_RejectInvalidArguments(t *testing.T) {
	for _, args := range [][]string{
		{"kubeconfig"},
		{"kubeconfig", "--server", "k8s"},
		{"kubeconfig", "--server", "https://k8s", "more"},
		{"kubeconfig", "--server", "https://k8s", "--ca", filepath.Join(t.TempDir(), "none")},
		{"kubeconfig", "--server", "https://k8s", "--ca", filepath.Join("..", "..", "go.mod")},
		{"kubeconfig", "--server", "https://k8s", "--ca", "root.crt", "--ca-fingerprint", "00"},
		{"kubeconfig", "--server", "https://k8s", "--prune"},
		{"kubeconfig", "--server", "https://k8s", "--prune", "--all", "--merge=false"},
		{"kubeconfig", "--server", "https://k8s", "--all", "--context", "a"},
		{"kubeconfig", "--server", "http://127.0.0.1:1", "--all"},
		{"explain"},
		{"explain", "--peer", "a", "--address", "127.0.0.1:1"},
		{"rbac"},
		{"rbac", "--policy", filepath.Join(t.TempDir(), "none")},
		{"unknown"},
	} {
		if out, err := run(t, args...); err == nil {
			t.Errorf("%v: no error; printed %q", args, out)
		}
	}
}
