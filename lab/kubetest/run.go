// SPDX-License-Identifier: Apache-2.0

package kubetest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/process"
)

// Runner runs sets of tests.
type Runner struct {
	// Dir is the folder for logs and reports.
	Dir string
	// Procs is how many tests run at once.
	Procs int
	// SetTimeout is how long one run of a set may take.
	SetTimeout time.Duration
}

// stopGrace is how long tests that are interrupted have to delete what they have made.
const stopGrace = 30 * time.Second

// Run runs the tests of a set with a kubeconfig. The way is part of the names of the log and
// the report. That tests fail is no error: the report says so.
func (r *Runner) Run(ctx context.Context, set Set, way, kubeconfig string) (Report, error) {
	dir := filepath.Join(r.Dir, strings.ReplaceAll(set.Name, " ", "-")+"-"+way)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return Report{}, err
	}
	log, err := os.Create(filepath.Join(dir, "ginkgo.log"))
	if err != nil {
		return Report{}, err
	}
	defer log.Close()
	cmd, err := r.command(set, dir, kubeconfig)
	if err != nil {
		return Report{}, err
	}
	cmd.Stdout, cmd.Stderr = log, log
	tests, err := process.Start(cmd)
	if err != nil {
		return Report{}, err
	}
	select {
	case <-ctx.Done():
		return Report{}, errors.Join(ctx.Err(), tests.Stop(stopGrace))
	case <-tests.Done():
	}
	report, err := ReadReport(filepath.Join(dir, "junit_01.xml"))
	if err != nil {
		return Report{}, fmt.Errorf("%w (log: %s)", errors.Join(err, tests.Err()), log.Name())
	}
	return report, nil
}

// command returns the command that runs a set.
func (r *Runner) command(set Set, dir, kubeconfig string) (*exec.Cmd, error) {
	path := make(map[string]string)
	for _, name := range []string{"ginkgo", "e2e.test", "kubectl"} {
		var err error
		if path[name], err = components.Path(name); err != nil {
			return nil, err
		}
	}
	registries := filepath.Join(dir, "registries.yaml")
	if err := os.WriteFile(registries, []byte(registryList), 0o600); err != nil {
		return nil, err
	}
	// With a seed, both runs of a set have the same order of tests.
	args := []string{"--no-color", "--seed=42", fmt.Sprintf("--procs=%d", r.Procs), "--timeout=" + r.SetTimeout.String()}
	for _, focus := range set.Focus {
		args = append(args, "--focus="+focus)
	}
	for _, skip := range set.Skip {
		args = append(args, "--skip="+skip)
	}
	args = append(args, path["e2e.test"], "--",
		"--kubeconfig="+kubeconfig, "--kubectl-path="+path["kubectl"], "--report-dir="+dir,
		"--provider=skeleton", "--disable-log-dump", "--num-nodes=1",
		"--allowed-not-ready-nodes=0", "--minStartupPods=0")
	cmd := exec.Command(path["ginkgo"], args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "KUBE_TEST_REPO_LIST="+registries, "KUBECACHEDIR="+filepath.Join(dir, "kubectl"), "HOME="+dir)
	return cmd, nil
}
