// SPDX-License-Identifier: Apache-2.0

package node_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/cluster"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/node"
)

// theLab is what all tests share. It is nil if there can be no real node.
var theLab *lab.Lab

func TestMain(m *testing.M) {
	if dir := os.Getenv(envStarter); dir != "" {
		fmt.Fprintln(os.Stderr, startAndWait(dir))
		os.Exit(1)
	}
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	if err := node.Unavailable(); err != nil {
		return m.Run() // each test says why it is skipped
	}
	dir, err := os.MkdirTemp("", "lab-node-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := start(dir); err != nil {
		fmt.Fprintln(os.Stderr, "starting the lab:", err)
		return 1
	}
	code = m.Run()
	if err := theLab.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, "stopping the lab:", err)
		code = 1
	}
	if found := leftovers(dir); len(found) > 0 {
		fmt.Fprintln(os.Stderr, "the stopped lab has left:", strings.Join(found, "\n"))
		code = 1
	}
	if code != 0 {
		fmt.Fprintln(os.Stderr, "the lab's logs are in", dir)
		return code
	}
	if err := os.RemoveAll(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func start(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	root, err := lab.Root()
	if err != nil {
		return err
	}
	theLab, err = lab.Start(ctx, lab.Config{
		Dir:      dir,
		Examples: filepath.Join(root, "examples"),
		Caddyfile: func(l *lab.Lab) string {
			return l.Globals(l.ProxyKey()) + `
https://` + lab.ProxyName + "." + lab.Domain + ` {
	bind tailscale/` + lab.ProxyName + `
	tls internal
	tailscale_kubernetes {
		kubeconfig ` + l.Kubeconfig() + `
	}
}
`
		},
		RealNode: true,
		Callers:  []lab.CallerSpec{{Name: "alice", Login: "alice@example.com"}},
		Progress: os.Stderr,
	})
	return err
}

// needsNode skips the test if there can be no real node.
func needsNode(t *testing.T) {
	t.Helper()
	if err := node.Unavailable(); err != nil {
		t.Skip(err)
	}
}

// eventually calls f until it returns nil. After a minute, it fails the test with f's
// last error.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within a minute: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond) // polling interval
	}
}

// way is a way to the API server, over one of kubectl's streaming protocols.
type way struct {
	kubeconfig string
	env        []string
}

// forEachWay runs f directly and through the plugin, over WebSocket and SPDY.
func forEachWay(t *testing.T, f func(t *testing.T, w way)) {
	t.Helper()
	needsNode(t)
	for name, kubeconfig := range map[string]string{"directly": theLab.AdminKubeconfig(), "through the plugin": theLab.Callers["alice"].Kubeconfig} {
		for protocol, websockets := range map[string]string{"WebSocket": "true", "SPDY": "false"} {
			t.Run(name+" over "+protocol, func(t *testing.T) {
				f(t, way{kubeconfig, []string{"KUBECTL_REMOTE_COMMAND_WEBSOCKETS=" + websockets, "KUBECTL_PORT_FORWARD_WEBSOCKETS=" + websockets}})
			})
		}
	}
}

// command returns a kubectl command that ends with the test.
func (w way) command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	cmd, err := lab.Kubectl(ctx, w.kubeconfig, args...)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Env = append(cmd.Env, w.env...)
	return cmd
}

// kubectl runs kubectl and returns its standard output. It fails the test if kubectl
// fails.
func (w way) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	cmd := w.command(t, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("kubectl %s: %v: %s%s", strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out)
}

func TestNode_IsReal(t *testing.T) {
	needsNode(t)
	w := way{kubeconfig: theLab.AdminKubeconfig()}
	info := w.kubectl(t, "get", "node", node.Name, "-o", "jsonpath={.status.nodeInfo.kubeletVersion} {.status.nodeInfo.containerRuntimeVersion}")
	if !strings.HasPrefix(info, "v1.") || !strings.Contains(info, "containerd://") {
		t.Errorf("the node's kubelet and runtime are %q", info)
	}
	// The pod has a hostname, processes and files of its own.
	if got, want := w.kubectl(t, "exec", lab.Pod, "--", "sh", "-c", "hostname; test ! -e "+theLab.Dir+"; echo $?; cat /proc/1/comm"), lab.Pod+"\n0\nsh\n"; got != want {
		t.Errorf("in the pod: %q; want %q", got, want)
	}
}

// A deployment needs a controller, the scheduler, and service account tokens; a
// service needs kube-proxy. Its pods reach the API server, and that reaches them.
func TestNode_RunsDeploymentBehindService(t *testing.T) {
	needsNode(t)
	w := way{kubeconfig: theLab.AdminKubeconfig()}
	w.kubectl(t, "create", "deployment", "pages", "--image="+node.Busybox, "--replicas=2", "--", "sh", "-c", "hostname > /tmp/name; exec httpd -f -p 8080 -h /tmp")
	t.Cleanup(func() {
		cmd, err := lab.Kubectl(context.Background(), w.kubeconfig, "delete", "deployment,service", "pages", "--now")
		if err == nil {
			err = cmd.Run()
		}
		if err != nil {
			t.Error(err)
		}
	})
	w.kubectl(t, "expose", "deployment", "pages", "--port=80", "--target-port=8080")
	w.kubectl(t, "rollout", "status", "deployment", "pages", "--timeout=90s")
	address := w.kubectl(t, "get", "service", "pages", "-o", "jsonpath={.spec.clusterIP}")
	names := strings.Fields(w.kubectl(t, "get", "pods", "-l", "app=pages", "-o", "jsonpath={.items[*].metadata.name}"))
	seen := make(map[string]bool)
	eventually(t, "both pods answer on the service's address", func() error {
		seen[strings.TrimSpace(w.kubectl(t, "exec", lab.Pod, "--", "wget", "-q", "-O-", "http://"+address+"/name"))] = true
		if len(names) != 2 || !seen[names[0]] || !seen[names[1]] {
			return fmt.Errorf("the pods are %q; answered have %v", names, seen)
		}
		return nil
	})
	if got := strings.TrimSpace(w.kubectl(t, "get", "--raw", "/api/v1/namespaces/default/pods/"+names[0]+":8080/proxy/name")); got != names[0] {
		t.Errorf("through the API server, pod %s answers %q", names[0], got)
	}
	if got := w.kubectl(t, "exec", names[0], "--", "sh", "-c", "nc -w 5 10.0.0.1 443 </dev/null && cat /var/run/secrets/kubernetes.io/serviceaccount/namespace"); got != "default" {
		t.Errorf("a pod reaches the API server and has a token: got %q; want its namespace", got)
	}
}

func TestKubectl_ExecReturnsOutputAndExitCode(t *testing.T) {
	forEachWay(t, func(t *testing.T, w way) {
		cmd := w.command(t, "exec", lab.Pod, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		exit, ok := errors.AsType[*exec.ExitError](cmd.Run())
		if !ok || exit.ExitCode() != 7 || stdout.String() != "out\n" || !strings.HasPrefix(stderr.String(), "err\n") {
			t.Errorf("kubectl exec: %v, %q, %q; want exit code 7, out and err", exit, stdout.String(), stderr.String())
		}
	})
}

func TestKubectl_ExecHasTerminal(t *testing.T) {
	forEachWay(t, func(t *testing.T, w way) {
		cmd := w.command(t, "exec", "-it", lab.Pod, "--", "sh", "-c", "until stty size | grep '30 100'; do sleep 0.1; done; exit 3")
		terminal, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 30, Cols: 100})
		if err != nil {
			t.Fatal(err)
		}
		screen, _ := io.ReadAll(terminal) // ends with EIO when kubectl does
		exit, ok := errors.AsType[*exec.ExitError](cmd.Wait())
		if !ok || exit.ExitCode() != 3 || !strings.Contains(string(screen), "30 100") {
			t.Errorf("kubectl exec -it: %v; the screen shows %q; want a terminal of 30 100 and exit code 3", exit, screen)
		}
	})
}

func TestKubectl_ExecPassesMegabytes(t *testing.T) {
	content := make([]byte, 8<<20)
	_, _ = rand.Read(content) // never fails
	forEachWay(t, func(t *testing.T, w way) {
		cmd := w.command(t, "exec", "-i", lab.Pod, "--", "cat")
		cmd.Stdin = bytes.NewReader(content)
		got, err := cmd.Output()
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("kubectl exec -i: %v; %d bytes came back, equal: %v; want %d", err, len(got), bytes.Equal(got, content), len(content))
		}
	})
}

func TestKubectl_LogsAreFollowed(t *testing.T) {
	forEachWay(t, func(t *testing.T, w way) {
		cmd := w.command(t, "logs", "-f", "--tail=1", lab.Pod)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }) // it does not end
		var last int
		for n := range 3 {
			var line int
			if _, err := fmt.Fscanf(out, "line %d\n", &line); err != nil || n > 0 && line != last+1 {
				t.Fatalf("kubectl logs -f printed line %d after line %d, %v; want the next", line, last, err)
			}
			last = line
		}
	})
}

func TestKubectl_AttachConnectsToRunningProcess(t *testing.T) {
	needsNode(t)
	const pod = "attached"
	if err := theLab.Cluster.RunPod(t.Context(), "default", pod, []string{"sh", "-c", `while read -r line; do echo "heard $line"; done`}); err != nil {
		t.Fatal(err)
	}
	forEachWay(t, func(t *testing.T, w way) {
		cmd := w.command(t, "attach", "-i", pod)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }) // it does not end
		for _, word := range []string{"one", "two"} {
			var got string
			if _, err := io.WriteString(in, word+"\n"); err != nil {
				t.Fatal(err)
			}
			if _, err := fmt.Fscanf(out, "heard %s\n", &got); err != nil || got != word {
				t.Fatalf("the process heard %q, %v; want %q", got, err, word)
			}
		}
	})
}

func TestKubectl_CopiesFiles(t *testing.T) {
	content := make([]byte, 1<<20)
	_, _ = rand.Read(content) // never fails
	forEachWay(t, func(t *testing.T, w way) {
		here, back := filepath.Join(t.TempDir(), "here"), filepath.Join(t.TempDir(), "back")
		if err := os.WriteFile(here, content, 0o600); err != nil {
			t.Fatal(err)
		}
		w.kubectl(t, "cp", here, lab.Pod+":/tmp/copied")
		w.kubectl(t, "cp", lab.Pod+":/tmp/copied", back)
		if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, content) {
			t.Errorf("what was copied there and back: %v; %d bytes; want the same %d", err, len(got), len(content))
		}
	})
}

func TestKubectl_ForwardsPort(t *testing.T) {
	forEachWay(t, func(t *testing.T, w way) {
		cmd := w.command(t, "port-forward", "--address=127.0.0.1", lab.Pod, ":"+lab.EchoPort)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }) // it does not end
		var address string
		if _, err := fmt.Fscanf(out, "Forwarding from %s", &address); err != nil {
			t.Fatal(err)
		}
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, "hello\n"); err != nil {
			t.Fatal(err)
		}
		var got string
		if _, err := fmt.Fscanln(conn, &got); err != nil || got != "hello" {
			t.Errorf("got %q, %v; want hello", got, err)
		}
	})
}

// An ephemeral container shares the processes of the container that it debugs.
func TestKubectl_DebugsWithEphemeralContainer(t *testing.T) {
	forEachWay(t, func(t *testing.T, w way) {
		cmd := w.command(t, "debug", "-i", lab.Pod, "--image="+node.Busybox, "--target="+cluster.ContainerName, "--", "sh", "-c", "read x; ps; echo got $x; read y")
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(in, "hello\n"); err != nil {
			t.Fatal(err)
		}
		var printed strings.Builder
		for scanner := bufio.NewScanner(out); scanner.Scan(); {
			fmt.Fprintln(&printed, scanner.Text())
			if scanner.Text() == "got hello" {
				// The container ends now, when all of its output has arrived.
				if _, err := io.WriteString(in, "bye\n"); err != nil {
					t.Error(err)
				}
			}
		}
		if err := cmd.Wait(); err != nil || !strings.Contains(printed.String(), "got hello") || !strings.Contains(printed.String(), "-e cat") {
			t.Errorf("kubectl debug: %v: %s; want the container's processes and an answer", err, printed.String())
		}
	})
}
