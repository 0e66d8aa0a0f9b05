// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/process"
)

// aggregated are the cluster roles whose rules are collected from other roles.
var aggregated = []string{"admin", "edit", "view"}

// startController starts the only controller that the lab needs: the one that fills
// the aggregated cluster roles, which are empty without it.
func (c *Cluster) startController(ctx context.Context) error {
	binary, err := components.Path("clusterrole-aggregation")
	if err != nil {
		return err
	}
	kubeconfig := c.path("clusterrole-aggregation.kubeconfig")
	if err := c.AdminKubeconfig(kubeconfig); err != nil {
		return err
	}
	logPath := c.path("clusterrole-aggregation.log")
	log, err := os.Create(logPath)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }() // the process has its own handle
	cmd := exec.Command(binary, "-kubeconfig", kubeconfig)
	cmd.Stdout, cmd.Stderr = log, log
	if c.controller, err = process.Start(cmd); err != nil {
		return fmt.Errorf("clusterrole-aggregation: %w", err)
	}
	err = wait.PollUntilContextTimeout(ctx, 50*time.Millisecond, startTimeout, true, c.rolesFilled)
	if err != nil {
		return fmt.Errorf("clusterrole-aggregation: waiting for rules of the cluster roles: %w (log: %s)", err, logPath)
	}
	return nil
}

// rolesFilled reports whether all aggregated cluster roles have rules.
func (c *Cluster) rolesFilled(ctx context.Context) (bool, error) {
	select {
	case <-c.controller.Done():
		return false, errors.New("the controller has ended")
	default:
	}
	for _, name := range aggregated {
		role, err := c.client.RbacV1().ClusterRoles().Get(ctx, name, metav1.GetOptions{})
		if err != nil || len(role.Rules) == 0 {
			// The API server creates them shortly after it is ready.
			return false, nil
		}
	}
	return true, nil
}
