// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/node"
	sessionrecorder "github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/recorder"
)

// All tests share these. They are set before the tests run.
var (
	theLab    *lab.Lab
	plain     *recorder // upstream over plain HTTP
	encrypted *recorder // upstream over TLS that offers HTTP/2
	other     *otherTailnet
	sessions  *sessionrecorder.Recorder // on the tailnet
)

var keep = flag.Bool("keep", false, "keep the folder of logs even if all tests pass")

// stopConnections is how many connections a Caddy has had that is stopped.
var stopConnections = flag.Int("stop-connections", 5000, "how many connections a Caddy has had that is stopped")

// processes runs pods as processes of this machine, as where there is no real node.
var processes = flag.Bool("processes", false, "do not use a real node")

// constrained runs the whole suite with the rights that "caddy tailscale-impersonate
// rbac --constrained" writes.
var constrained = flag.Bool("constrained", false, "give the proxy only constrained impersonation, except in tests that need the older verb")

// masters is the group that may do anything. Constrained impersonation never allows
// system:masters; the docs then advise to use a group that is bound to
// cluster-admin.
func masters() string {
	if *constrained {
		return "tailnet-admins"
	}
	return "system:masters"
}

const mastersBinding = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: e2e-masters}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}
subjects:
- {apiGroup: rbac.authorization.k8s.io, kind: Group, name: tailnet-admins}
`

// callers are the devices of the lab: one for each row of the mapping table, and one
// whose grants change.
var callers = []lab.CallerSpec{
	{Name: "alice", Login: "alice@example.com"},
	{Name: "bob", Login: "bob@example.com"},
	{Name: "carol", Login: "carol@example.com"},
	{Name: "dave", Login: "dave@example.com"},
	{Name: "erin", Login: "erin@example.com"},
	{Name: "ci", Tags: []string{"tag:k8s-readers"}},
	{Name: "ops", Tags: []string{"tag:k8s-ops"}},
	// Their sessions are recorded: see startSessionRecorder.
	{Name: "fay", Login: "fay@example.com"},
	{Name: "gus", Login: "gus@example.com"},
	{Name: "hal", Login: "hal@example.com"},
	{Name: "ida", Login: "ida@example.com"},
}

func TestMain(m *testing.M) {
	if os.Getenv(ownCaddy) != "" {
		caddycmd.Main()
		return
	}
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	dir, err := os.MkdirTemp("", "lab-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := start(dir); err != nil {
		fmt.Fprintln(os.Stderr, "starting the lab:", err)
		return 1
	}
	code = m.Run()
	if err := stop(); err != nil {
		fmt.Fprintln(os.Stderr, "stopping the lab:", err)
		code = 1
	}
	if code != 0 || *keep {
		fmt.Fprintln(os.Stderr, "the lab's logs are in", dir)
		return code
	}
	if err := os.RemoveAll(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func start(dir string) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	realNode := !*processes
	if err := node.Unavailable(); realNode && err != nil {
		fmt.Fprintf(os.Stderr, "%v: pods are processes of this machine, and streams pass a kubelet of the lab's own\n", err)
		realNode = false
	}
	root, err := lab.Root()
	if err != nil {
		return err
	}
	if plain, err = newRecorder(false); err != nil {
		return err
	}
	if encrypted, err = newRecorder(true); err != nil {
		return err
	}
	if err := encrypted.writeKubeconfig(filepath.Join(dir, "recorder.kubeconfig")); err != nil {
		return err
	}
	if other, err = startOtherTailnet(ctx, filepath.Join(dir, "other")); err != nil {
		return err
	}
	theLab, err = lab.Start(ctx, lab.Config{
		Dir:       dir,
		Examples:  filepath.Join(root, "examples"),
		Policy:    testPolicy,
		Caddyfile: sites,
		// As on the site at portGroupLimits.
		GroupPrefixes: []string{"tailnet:"},
		RealNode:      realNode,
		// For tests that look at what a command in a pod has done.
		Shared:      os.TempDir(),
		Constrained: *constrained,
		Callers:     callers,
		Progress:    os.Stderr,
	})
	if err != nil {
		return err
	}
	if *constrained {
		if err := theLab.Cluster.Apply(ctx, []byte(mastersBinding)); err != nil {
			return err
		}
	}
	return startSessionRecorder(ctx)
}

func stop() error {
	var errs []error
	if sessions != nil {
		errs = append(errs, sessions.Stop())
	}
	if theLab != nil {
		errs = append(errs, theLab.Stop())
	}
	if other != nil {
		errs = append(errs, other.stop())
	}
	return errors.Join(errs...)
}

// kubectl runs kubectl as a caller and returns its output. It fails the test if
// kubectl fails.
func kubectl(t *testing.T, caller string, args ...string) string {
	t.Helper()
	stdout, stderr, err := tryKubectl(t, caller, args...)
	if err != nil {
		t.Fatalf("kubectl %.200s as %s: %v\n%s%s", strings.Join(args, " "), caller, err, stdout, stderr)
	}
	return stdout
}

// tryKubectl runs kubectl as a caller, for at most a minute.
func tryKubectl(t *testing.T, caller string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	return runKubectl(t, theLab.Callers[caller].Kubeconfig, nil, args...)
}

func runKubectl(t *testing.T, kubeconfig string, env []string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	// Not the test's context, which has ended when cleanups run kubectl.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd, err := lab.Kubectl(ctx, kubeconfig, args...)
	if err != nil {
		t.Fatal(err)
	}
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.Env = append(cmd.Env, env...)
	err = cmd.Run()
	return out.String(), errOut.String(), err
}

// eventually calls f until it returns nil. After 30 seconds, it fails the test with
// f's last error.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 30 s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond) // polling interval
	}
}
