// SPDX-License-Identifier: Apache-2.0

package machine

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestX(t *testing.T) {
	m, err := Start(t.Context(), Config{Name: "lab", Dir: t.TempDir(), Files: map[string]string{"/proc/sys/kernel/panic": "10\n"}})
	if err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(t.TempDir(), "log")
	err = m.Run(t.Context(), Command{Args: []string{"/bin/sh", "-c", "hostname; ip -br addr; ip route; ls /var/lib /run /sys/fs/cgroup; cat /proc/self/cgroup; ps aux; ls -d /sys/fs/cgroup/memory/*; cat /proc/sys/kernel/panic; mount | wc -l; ping -c1 -W1 198.18.0.1"}, Log: log, Env: os.Environ()})
	b, _ := os.ReadFile(log)
	t.Log(err, string(b))
	if err := m.Stop(); err != nil {
		t.Error(err)
	}
	out, _ := os.ReadFile("/proc/net/dev")
	if strings.Contains(string(out), "labmachine") {
		t.Error(string(out))
	}
}
