// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"os"
	"os/exec"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
)

// Kubectl returns a kubectl that runs as this caller. It shares nothing with the
// kubectl of whoever runs the lab: neither its configuration nor its caches.
func (c *Caller) Kubectl(ctx context.Context, args ...string) (*exec.Cmd, error) {
	return Kubectl(ctx, c.Kubeconfig, args...)
}

// Kubectl returns a kubectl that runs with a kubeconfig file.
func Kubectl(ctx context.Context, kubeconfig string, args ...string) (*exec.Cmd, error) {
	path, err := components.Path("kubectl")
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+kubeconfig, "KUBECACHEDIR="+kubeconfig+".cache", "KUBECTL_KUBERC=false")
	return cmd, nil
}
