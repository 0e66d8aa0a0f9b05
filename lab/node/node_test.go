// SPDX-License-Identifier: Apache-2.0

package node_test

import (
	"os"
	"testing"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/cluster"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/node"
)

func TestX(t *testing.T) {
	if err := node.Unavailable(); err != nil {
		t.Skip(err)
	}
	dir, _ := os.MkdirTemp("/tmp/lead/scratch-node", "x")
	start := time.Now()
	c, err := cluster.Start(t.Context(), cluster.Config{Dir: dir, RealNode: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Log("started", time.Since(start))
	if err := c.RunPod(t.Context(), "default", "web", []string{"sh", "-c", "while true; do date; sleep 1; done"}); err != nil {
		t.Error(err)
	}
	t.Log("pod", time.Since(start))
	c.AdminKubeconfig(dir + "/kc")
	for _, args := range [][]string{{"get", "pods,nodes,svc,sa,endpointslices", "-A", "-o", "wide"}, {"exec", "web", "--", "sh", "-c", "ip addr; cat /proc/self/cgroup; wget -O- --no-check-certificate https://10.0.0.1/version; id; ls"}, {"logs", "web"}} {
		cmd, _ := lab.Kubectl(t.Context(), dir+"/kc", args...)
		out, err := cmd.CombinedOutput()
		t.Log(string(out), err)
	}
	if d, err := time.ParseDuration(os.Getenv("HOLD")); err == nil {
		time.Sleep(d)
	}
	start = time.Now()
	if err := c.Stop(); err != nil {
		t.Error(err)
	}
	t.Log("stopped", time.Since(start))
}
