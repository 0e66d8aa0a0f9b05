// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"os"
	"os/exec"
	"strings"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
)

// Helm returns a Helm command that uses a kubeconfig file. It uses neither the
// configuration nor the caches of the user who runs the lab.
func Helm(ctx context.Context, kubeconfig string, args ...string) (*exec.Cmd, error) {
	path, err := components.Path("helm")
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	for _, variable := range os.Environ() {
		if !strings.HasPrefix(variable, "HELM_") {
			cmd.Env = append(cmd.Env, variable)
		}
	}
	home := kubeconfig + ".helm"
	cmd.Env = append(cmd.Env, "KUBECONFIG="+kubeconfig, "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	return cmd, nil
}
