// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"os"
	"os/exec"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
)

// Kubectl returns a kubectl command that runs as this caller. It uses neither the
// configuration nor the caches of the user who runs the lab.
func (c *Caller) Kubectl(ctx context.Context, args ...string) (*exec.Cmd, error) {
	return Kubectl(ctx, c.Kubeconfig, args...)
}

// Kubectl returns a kubectl command that uses a kubeconfig file.
func Kubectl(ctx context.Context, kubeconfig string, args ...string) (*exec.Cmd, error) {
	path, err := components.Path("kubectl")
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+kubeconfig, "KUBECACHEDIR="+kubeconfig+".cache", "KUBECTL_KUBERC=false")
	return cmd, nil
}
