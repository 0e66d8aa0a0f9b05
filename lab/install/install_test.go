// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

var long = flag.Bool("long", false, "also run the steps that take minutes")

// Each step needs those before it, but for the long ones.
func TestChart_ServesTailnetFromInstallToUninstall(t *testing.T) {
	i := start(t)
	for _, step := range []struct {
		name string
		long bool
		run  func(*installation)
	}{
		{"install", false, (*installation).install},
		{"helm test", false, (*installation).helmTest},
		{"the image runs with no rights", false, (*installation).checkProcesses},
		{"callers have their rights", false, (*installation).checkCallers},
		{"upgrade", true, (*installation).upgrade},
		{"rollback", true, (*installation).rollback},
		{"uninstall", false, (*installation).uninstall},
		{"install again, without the key", true, (*installation).installAgain},
	} {
		if !t.Run(step.name, func(t *testing.T) {
			if step.long && !*long {
				t.Skip("takes a minute: run with -long")
			}
			step.run(&installation{t, i.lab, i.root, i.admin, i.before})
		}) {
			i.explain()
			break
		}
	}
}

// explain logs what is known of the pods.
func (i *installation) explain() {
	for _, args := range [][]string{
		{"describe", "pods"}, {"get", "events"}, {"logs", "--selector=app.kubernetes.io/instance=" + release, "--tail=40", "--prefix"},
	} {
		cmd, err := lab.Kubectl(i.Context(), i.lab.AdminKubeconfig(), append(args, "--namespace", namespace)...)
		if err != nil {
			i.Error(err)
			continue
		}
		out, err := cmd.CombinedOutput()
		i.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func (i *installation) install() {
	i.helm(append([]string{"install", release}, i.values()...)...)
	i.rollout()
}

func (i *installation) helmTest() {
	if out := i.helm("test", release, "--namespace", namespace); !strings.Contains(out, "Succeeded") {
		i.Errorf("helm test printed\n%s", out)
	}
}

// The kernel says what the processes may do, rather than the pod's description.
func (i *installation) checkProcesses() {
	var found int
	processes, _ := filepath.Glob("/proc/[0-9]*") // the pattern is valid
	for _, process := range processes {
		// Processes may end while they are looked at.
		line, _ := os.ReadFile(filepath.Join(process, "cmdline"))
		mounts, _ := os.ReadFile(filepath.Join(process, "mountinfo"))
		if !bytes.HasPrefix(line, []byte("/usr/bin/caddy\x00run\x00")) || !bytes.Contains(mounts, []byte(i.lab.Dir)) {
			continue
		}
		found++
		status, err := os.ReadFile(filepath.Join(process, "status"))
		if err != nil {
			i.Fatal(err)
		}
		for _, want := range []string{`Uid:\s+65532\s+65532\s+65532\s+65532`, `Gid:\s+65532\s+65532\s+65532\s+65532`, `CapEff:\s+0+`, `CapBnd:\s+0+`, `NoNewPrivs:\s+1`, `Seccomp:\s+2`} {
			if !regexp.MustCompile(`(?m)^` + want + `$`).Match(status) {
				i.Errorf("it is not so that %s:\n%s", want, status)
			}
		}
		if !regexp.MustCompile(`(?m) / / ro,`).Match(mounts) {
			i.Errorf("the root file system is not read-only:\n%s", mounts)
		}
	}
	if found != len(replicas) {
		i.Errorf("found %d processes of the image; want %d", found, len(replicas))
	}
}

// checkCallers compares what the API server lets each caller do through each replica with
// the policy file and the bindings of the examples.
func (i *installation) checkCallers() {
	for _, replica := range replicas {
		for _, c := range callers {
			who, err := i.through(replica, c.Name, "auth", "whoami", `--output=jsonpath={.status.userInfo.username} {.status.userInfo.groups}`)
			if err != nil {
				i.Error(err)
				continue
			}
			want := c.user + ` ["system:authenticated"]`
			if c.groups != "" {
				want = fmt.Sprintf("%s [%q,%q]", c.user, c.groups, "system:authenticated")
			}
			if who != want {
				i.Errorf("through %s, %s is %s; want %s", replica, c.Name, who, want)
			}
			for _, ask := range []struct {
				want string
				args []string
			}{
				{c.reads, []string{"get", "pods"}},
				{c.deletes, []string{"delete", "pod", lab.Pod, "--dry-run=server"}},
				{c.readsAtAll, []string{"get", "secrets"}},
			} {
				out, err := i.through(replica, c.Name, ask.args...)
				forbidden := err != nil && strings.Contains(err.Error(), "(Forbidden)") && strings.Contains(err.Error(), fmt.Sprintf("User %q cannot", c.user))
				if got := map[bool]string{true: "yes", false: "no"}[err == nil]; got != ask.want || err != nil && !forbidden {
					i.Errorf("through %s, %s may %v: %s, %v; want %s", replica, c.Name, ask.args, out, err, ask.want)
				}
			}
		}
		out, err := i.through(replica, "alice", "exec", lab.Pod, "--", "hostname")
		if err != nil || out != lab.Pod+"\n" {
			i.Errorf("through %s, exec prints %q, %v", replica, out, err)
		}
	}
}

// audited reports whether the API server's audit log says which device alice's request
// came from.
func (i *installation) audited(replica string) bool {
	i.Helper()
	mark := fmt.Sprintf("marked-%d", len(i.auditLog()))
	if _, err := i.through(replica, "alice", "get", "configmap", mark, "--ignore-not-found"); err != nil {
		i.Fatal(err)
	}
	var line string
	i.until("the request is in the audit log", func() error {
		for l := range strings.Lines(i.auditLog()) {
			if strings.Contains(l, mark) {
				line = l
				return nil
			}
		}
		return errors.New("it is not there")
	})
	if !strings.Contains(line, `"alice@example.com"`) {
		i.Errorf("the audit log names another user: %s", line)
	}
	return strings.Contains(line, "tailscale-impersonate.github.io/node")
}

func (i *installation) auditLog() string {
	i.Helper()
	content, err := os.ReadFile(i.lab.Cluster.AuditLog())
	if err != nil {
		i.Fatal(err)
	}
	return string(content)
}

// uninstall leaves the volumes' claims, as the chart's README says, and nothing else.
func (i *installation) uninstall() {
	i.helm("uninstall", release, "--namespace", namespace, "--wait")
	var want []string
	for _, replica := range replicas {
		for _, volume := range []string{"data", "recordings"} {
			want = append(want, fmt.Sprintf("PersistentVolumeClaim %s/%s-%s", namespace, volume, replica))
		}
	}
	slices.Sort(want)
	i.until("only the claims are left", func() error {
		now := i.objects()
		for name := range i.before {
			if !now[name] {
				i.Fatalf("it has removed %s, which was there before", name)
			}
		}
		maps.DeleteFunc(now, func(name string, _ bool) bool { return i.before[name] })
		if left := slices.Sorted(maps.Keys(now)); !slices.Equal(left, want) {
			return fmt.Errorf("left are %q", left)
		}
		return nil
	})
	// The nodes stay in the tailnet's list of devices.
	for _, replica := range replicas {
		if err := i.lab.Headscale.NeverExpireNode(i.Context(), replica); err != nil {
			i.Error(err)
		}
	}
}

// Replicas with state are the nodes that they were, and need no key.
func (i *installation) installAgain() {
	authority := i.ca(replicas[0])
	i.kubectl("--namespace", namespace, "delete", "secret", keySecret)
	i.install()
	if !bytes.Equal(i.ca(replicas[0]), authority) {
		i.Error("it has another authority")
	}
	if out, err := i.through(replicas[0], "bob", "get", "pods"); err != nil || !strings.Contains(out, lab.Pod) {
		i.Errorf("it does not serve: %v: %s", err, out)
	}
}
