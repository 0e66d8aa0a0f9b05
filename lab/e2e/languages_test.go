// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// runClient runs a program that lists and watches pods, runs a command in the lab's pod and
// forwards a port, and checks what it prints.
func runClient(t *testing.T, program ...string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), program[0], program[1:]...).Output()
	if err != nil {
		var stderr []byte
		if exit, ok := err.(*exec.ExitError); ok { //nolint:errorlint // Output returns it as it is
			stderr = exit.Stderr
		}
		t.Fatalf("%v: %s%s", err, out, stderr)
	}
	var got struct {
		Client, Watch, Exec, Portforward string
		List                             []string
		Code                             int
	}
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Logf("%+v", got)
	if !slices.Contains(got.List, lab.Pod) || got.Watch != "ADDED" || got.Exec != "got hello\n" || got.Code != 3 || got.Portforward != "hello" {
		t.Errorf("got %+v; want pod %s, a watch, the command's output and exit code 3, and an echo", got, lab.Pod)
	}
}

// tool returns the path of a file of the lab's tools.
func tool(t *testing.T, path ...string) string {
	t.Helper()
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(append([]string{root, "lab", "tools"}, path...)...)
}

func TestOrigin_PythonClientWorks(t *testing.T) {
	const python = "/usr/bin/python3" // Debian's, which has Debian's packages
	if err := exec.Command(python, "-c", "import kubernetes").Run(); err != nil {
		t.Skip("Kubernetes' Python client is not installed; run apt-get install python3-kubernetes")
	}
	authority, err := theLab.Caddy.CA()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, authority, 0o600); err != nil {
		t.Fatal(err)
	}
	runClient(t, python, tool(t, "client-python", "client.py"), "https://"+proxyDomain, forward(t, "alice", "443"), file, lab.Pod, echoServer(t))
}

func TestOrigin_JavaScriptClientWorks(t *testing.T) {
	if _, err := os.Stat(tool(t, "client-node", "node_modules")); err != nil {
		t.Skip("Kubernetes' JavaScript client is not installed; run `make client-node`")
	}
	runClient(t, "node", tool(t, "client-node", "client.mjs"), theLab.Callers["alice"].Kubeconfig, lab.Pod, echoServer(t))
}
