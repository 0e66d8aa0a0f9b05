// SPDX-License-Identifier: Apache-2.0

package node_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/cluster"
)

// envStarter makes the test binary start a cluster with a real node in this folder.
const envStarter = "LAB_NODE_TEST_STARTER"

// startAndWait starts a cluster with a real node, says when it runs, and waits to be
// killed.
func startAndWait(dir string) error {
	c, err := cluster.Start(context.Background(), cluster.Config{Dir: dir, RealNode: true})
	if err != nil {
		return err
	}
	if err := c.RunPod(context.Background(), "default", "left", []string{"sleep", "1000"}); err != nil {
		return err
	}
	fmt.Println("running")
	select {}
}

// Whoever starts a node may be killed at any time.
func TestNode_KilledStarterLeavesNothing(t *testing.T) {
	needsNode(t)
	delays := []time.Duration{0, -1} // -1: when a pod runs
	for range 3 {
		delays = append(delays, rand.N(8*time.Second))
	}
	for _, delay := range delays {
		name := "after " + delay.String()
		if delay < 0 {
			name = "when a pod runs"
		}
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			starter := exec.Command(os.Args[0])
			starter.Env = append(os.Environ(), envStarter+"="+dir)
			starter.Stderr = os.Stderr
			out, err := starter.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := starter.Start(); err != nil {
				t.Fatal(err)
			}
			if delay < 0 {
				if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
					t.Errorf("the starter said %q, %v; want that a pod runs", line, err)
				}
				if found := leftovers(dir); len(found) < 10 {
					t.Errorf("found only %q of a running node", found)
				}
			} else {
				time.Sleep(delay) // the moment is what is tested
			}
			if err := starter.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = starter.Wait() // killed
			eventually(t, "nothing is left", func() error {
				if found := leftovers(dir); len(found) > 0 {
					return errors.New(strings.Join(found, "\n"))
				}
				return nil
			})
		})
	}
}

// leftovers returns what there is of the node, or of a part of it, in a folder:
// processes, mounts and files. Namespaces last only as long as their processes and
// mounts. It also returns the interfaces and control groups of all machines that have ended.
func leftovers(dir string) (found []string) {
	processes, _ := filepath.Glob("/proc/[0-9]*") // the pattern is valid
	for _, process := range processes {
		if process == fmt.Sprintf("/proc/%d", os.Getpid()) {
			continue
		}
		// Processes may end while they are looked at.
		line, _ := os.ReadFile(process + "/cmdline")
		environment, _ := os.ReadFile(process + "/environ")
		mounts, _ := os.ReadFile(process + "/mountinfo")
		if strings.Contains(string(line)+string(environment)+string(mounts), dir) {
			found = append(found, fmt.Sprintf("process %s: %.200s", filepath.Base(process), strings.ReplaceAll(string(line), "\x00", " ")))
		}
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), dir) {
		found = append(found, fmt.Sprintf("mounts (%v): %s", err, mounts))
	}
	for _, state := range []string{"node/state", "cluster/node/state"} {
		if _, err := os.Stat(filepath.Join(dir, state)); err == nil {
			found = append(found, filepath.Join(dir, state))
		}
	}
	return append(found, orphans()...)
}

// orphans returns the interfaces and control groups of machines that have ended. A
// machine that runs has a socket of the same name.
func orphans() (found []string) {
	// Look at the sockets last: a machine takes its socket first and gives it back last.
	links, _ := os.ReadFile("/proc/net/dev")
	names := regexp.MustCompile(`labmachine\d+`).FindAllString(string(links), -1)
	for _, pattern := range []string{"", "/*", "/*/*", "/*/*/*"} {
		groups, _ := filepath.Glob("/sys/fs/cgroup" + pattern + "/labmachine*") // the pattern is valid
		names = append(names, groups...)
	}
	sockets, _ := os.ReadFile("/proc/net/unix")
	for _, name := range names {
		if !regexp.MustCompile(`(?m)-` + filepath.Base(name) + `$`).Match(sockets) {
			found = append(found, name)
		}
	}
	return found
}
