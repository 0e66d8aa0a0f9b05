// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
)

// testContext returns a context that ends with the test, and long before the test's
// own timeout.
func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// start starts a cluster that ends with the test, and checks that it leaves nothing
// behind.
func start(ctx context.Context, t *testing.T) *Cluster {
	t.Helper()
	begin := time.Now()
	c, err := Start(ctx, Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("started after %v", time.Since(begin).Round(time.Millisecond))
	pids := map[string]int{"etcd": c.etcd.pid(), "kube-apiserver": c.apiServer.pid()}
	t.Cleanup(func() {
		begin := time.Now()
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
		t.Logf("stopped after %v", time.Since(begin).Round(time.Millisecond))
		checkGone(t, pids)
		for _, name := range []string{dataDir, certsDir} {
			if _, err := os.Stat(c.path(name)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s still exists (%v)", c.path(name), err)
			}
		}
	})
	return c
}

// checkGone checks that the processes were started and have ended.
func checkGone(t *testing.T, pids map[string]int) {
	t.Helper()
	for name, pid := range pids {
		if pid == 0 {
			t.Errorf("%s: no process ID", name)
		}
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
			t.Errorf("%s still runs as process %d", name, pid)
		}
	}
}

// kubectl runs the real kubectl as the administrator.
type kubectl struct {
	path, kubeconfig, home string
	env                    []string
}

func newKubectl(t *testing.T, c *Cluster) kubectl {
	t.Helper()
	path, err := components.Path("kubectl")
	if err != nil {
		t.Fatal(err)
	}
	k := kubectl{path: path, home: t.TempDir()}
	k.kubeconfig = filepath.Join(k.home, "config")
	if err := c.AdminKubeconfig(k.kubeconfig); err != nil {
		t.Fatal(err)
	}
	return k
}

// command returns a command that runs kubectl with the given arguments.
func (k kubectl) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, k.path, append([]string{"--kubeconfig", k.kubeconfig}, args...)...)
	cmd.Dir = k.home
	cmd.Env = append([]string{"HOME=" + k.home, "PATH=" + os.Getenv("PATH")}, k.env...)
	return cmd
}

// run runs kubectl and returns what it prints and its exit status.
func (k kubectl) run(ctx context.Context, t *testing.T, stdin io.Reader, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	cmd := k.command(ctx, args...)
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("kubectl %q: %v", args, err)
	}
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

// check runs kubectl and checks what it prints to its standard output.
func (k kubectl) check(ctx context.Context, t *testing.T, want string, args ...string) {
	t.Helper()
	stdout, stderr, status := k.run(ctx, t, nil, args...)
	if stdout != want || status != 0 {
		t.Errorf("kubectl %q: printed %q, %q with status %d; want %q", args, stdout, stderr, status, want)
	}
}

// counter is the command of a pod that prints a line ten times a second.
var counter = []string{"/bin/sh", "-c", `echo started; i=0; while :; do i=$((i+1)); echo "line $i"; sleep 0.1; done`}

// protocols are the environment variables that select kubectl's streaming protocol.
var protocols = map[string][]string{
	"websocket": nil,
	"spdy":      {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false", "KUBECTL_PORT_FORWARD_WEBSOCKETS=false"},
}

func TestKubectl(t *testing.T) {
	ctx := testContext(t)
	c := start(ctx, t)
	if err := c.RunPod(ctx, "default", "counter", counter); err != nil {
		t.Fatal(err)
	}
	if err := c.RunPod(ctx, "default", "cat", []string{"cat"}); err != nil {
		t.Fatal(err)
	}
	// Only streaming commands depend on the protocol.
	k := newKubectl(t, c)
	t.Run("pods", func(t *testing.T) {
		k.check(ctx, t, "cat       Running   True\ncounter   Running   True\n", "get", "pods", "--no-headers", "-o",
			`custom-columns=:metadata.name,:status.phase,:status.conditions[?(@.type=="Ready")].status`)
	})
	t.Run("logs", func(t *testing.T) { testLogs(ctx, t, k) })
	for name, env := range protocols {
		t.Run(name, func(t *testing.T) {
			k := k
			k.env = env
			t.Run("exec", func(t *testing.T) { testExec(ctx, t, k) })
			t.Run("tty", func(t *testing.T) { testTTY(ctx, t, k) })
			t.Run("half-close", func(t *testing.T) { testHalfClose(ctx, t, k) })
			t.Run("cp", func(t *testing.T) { testCopy(ctx, t, k) })
			t.Run("attach", func(t *testing.T) { testAttach(ctx, t, k) })
			t.Run("port-forward", func(t *testing.T) { testPortForward(ctx, t, k) })
			t.Run("disconnect", func(t *testing.T) { testDisconnect(ctx, t, k) })
		})
	}
	t.Run("delete", func(t *testing.T) { testDelete(ctx, t, c, k) })
	t.Run("audit", func(t *testing.T) { testAudit(t, c) })
}

func testExec(ctx context.Context, t *testing.T, k kubectl) {
	k.check(ctx, t, "hello world\n", "exec", "counter", "--", "echo", "hello world")
	k.check(ctx, t, "counter\n", "exec", "counter", "-c", ContainerName, "--", "sh", "-c", "echo $HOSTNAME")

	stdout, stderr, status := k.run(ctx, t, nil, "exec", "counter", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
	if stdout != "out\n" || !strings.HasPrefix(stderr, "err\n") || status != 7 {
		t.Errorf("printed %q, %q with status %d; want out, err, 7", stdout, stderr, status)
	}
	if _, stderr, status = k.run(ctx, t, nil, "exec", "counter", "--", "sh", "-c", "kill -TERM $$"); status != 128+15 {
		t.Errorf("terminated by a signal: %q, status %d; want %d", stderr, status, 128+15)
	}
	if _, stderr, status = k.run(ctx, t, nil, "exec", "counter", "--", "no-such-command"); status == 0 || !strings.Contains(stderr, "executable file not found") {
		t.Errorf("exec of a missing command: %q, status %d; want an error", stderr, status)
	}
}

func testTTY(ctx context.Context, t *testing.T, k kubectl) {
	terminal, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	if err := pty.Setsize(terminal, &pty.Winsize{Rows: 33, Cols: 77}); err != nil {
		t.Fatal(err)
	}
	cmd := k.command(ctx, "exec", "-it", "counter", "--", "sh", "-c", `tty; until [ "$(stty size)" = "33 77" ]; do sleep 0.01; done; echo ready; read line; until [ "$(stty size)" = "44 88" ]; do sleep 0.01; done; echo "got $line"; exit 5`)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tty.Close()
	output := make(chan string, 1)
	ready := make(chan bool)
	go func() {
		var all strings.Builder
		r := bufio.NewReader(terminal)
		for {
			line, err := r.ReadString('\n')
			all.WriteString(line)
			if line == "ready\r\n" {
				close(ready)
			}
			if err != nil { // EIO when the terminal closes
				output <- all.String()
				return
			}
		}
	}()
	select {
	case <-ready:
		// kubectl reads its terminal's size again on SIGWINCH, which the kernel
		// sends only if the terminal is the controlling one.
		if err := pty.Setsize(terminal, &pty.Winsize{Rows: 44, Cols: 88}); err != nil {
			t.Error(err)
		}
		if err := cmd.Process.Signal(syscall.SIGWINCH); err != nil {
			t.Error(err)
		}
		if _, err := io.WriteString(terminal, "typed\n"); err != nil {
			t.Error(err)
		}
	case <-ctx.Done():
		t.Error("the new size of the terminal did not arrive")
	}
	err = cmd.Wait()
	got := <-output
	if cmd.ProcessState.ExitCode() != 5 || !strings.Contains(got, "/dev/pts/") || !strings.Contains(got, "got typed\r\n") {
		t.Errorf("printed %q, %v; want a terminal, the typed line, and status 5", got, err)
	}
}

func testHalfClose(ctx context.Context, t *testing.T, k kubectl) {
	input := bytes.Repeat([]byte("0123456789abcdef"), 1<<20)
	stdout, stderr, status := k.run(ctx, t, bytes.NewReader(input), "exec", "-i", "counter", "--", "cat")
	if status != 0 || sha256.Sum256([]byte(stdout)) != sha256.Sum256(input) {
		t.Errorf("cat of %d bytes: %d bytes, %q, status %d", len(input), len(stdout), stderr, status)
	}
}

func testCopy(ctx context.Context, t *testing.T, k kubectl) {
	content := bytes.Repeat([]byte("copy me\n"), 1<<17)
	dir := t.TempDir()
	there, back := filepath.Join(dir, "there"), filepath.Join(dir, "back")
	if err := os.WriteFile(there, content, 0o600); err != nil {
		t.Fatal(err)
	}
	k.check(ctx, t, "", "cp", there, "counter:copied")
	k.check(ctx, t, "", "cp", "counter:copied", back)
	if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, content) {
		t.Errorf("came back as %d bytes, %v; want %d", len(got), err, len(content))
	}
}

func testLogs(ctx context.Context, t *testing.T, k kubectl) {
	stdout, stderr, status := k.run(ctx, t, nil, "logs", "counter")
	if !strings.HasPrefix(stdout, "started\n") || status != 0 {
		t.Errorf("logs: %q, %q, status %d; want it to begin with started", stdout, stderr, status)
	}
	if stdout, stderr, status = k.run(ctx, t, nil, "logs", "counter", "--tail=2"); strings.Count(stdout, "\n") != 2 {
		t.Errorf("logs --tail=2: %q, %q, status %d; want two lines", stdout, stderr, status)
	}
	k.check(ctx, t, "start", "logs", "counter", "--limit-bytes=5")
	if _, stderr, status = k.run(ctx, t, nil, "logs", "counter", "--timestamps"); status == 0 || !strings.Contains(stderr, "does not support") {
		t.Errorf("logs --timestamps: %q, status %d; want an error: not supported", stderr, status)
	}

	ctx, cancel := context.WithCancel(ctx)
	cmd := k.command(ctx, "logs", "-f", "--tail=0", "counter")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for range 5 {
		if !lines.Scan() {
			t.Fatalf("logs -f ended: %v", lines.Err())
		}
	}
	if !strings.HasPrefix(lines.Text(), "line ") {
		t.Errorf("logs -f: %q; want a line", lines.Text())
	}
	cancel()
	if err := cmd.Wait(); err == nil {
		t.Error("logs -f ended by itself")
	}
}

func testAttach(ctx context.Context, t *testing.T, k kubectl) {
	ctx, cancel := context.WithCancel(ctx)
	cmd := k.command(ctx, "attach", "-i", "cat")
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
	if _, err := io.WriteString(in, "hello cat\n"); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "hello cat\n" {
		t.Errorf("read %q, %v; want %q", line, err, "hello cat\n")
	}
	cancel()
	if err := cmd.Wait(); err == nil {
		t.Error("attach ended by itself")
	}
}

func testPortForward(ctx context.Context, t *testing.T, k kubectl) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := fmt.Fprint(w, "served ", r.URL.Path); err != nil {
			t.Error(err)
		}
	}))
	defer server.Close()
	u, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(ctx)
	cmd := k.command(ctx, "port-forward", "pod/counter", ":"+u.Port())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	line, err := lines.ReadString('\n')
	addr, _, ok := strings.Cut(strings.TrimPrefix(line, "Forwarding from "), " -> ")
	if err != nil || !ok {
		t.Fatalf("port-forward printed %q, %v", line, err)
	}
	go func() { _, _ = io.Copy(io.Discard, lines) }() // ends with kubectl
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for i := range 3 {
		res, err := client.Get(fmt.Sprintf("http://%s/%d", addr, i))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		res.Body.Close()
		if want := fmt.Sprintf("served /%d", i); err != nil || string(body) != want {
			t.Errorf("got %q, %v; want %q", body, err, want)
		}
	}
	cancel()
	if err := cmd.Wait(); err == nil {
		t.Error("port-forward ended by itself")
	}
}

// testDisconnect checks that a silent command ends with kubectl.
func testDisconnect(ctx context.Context, t *testing.T, k kubectl) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := k.command(ctx, "exec", "counter", "--", "sh", "-c", "echo $$; exec sleep 1000")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	proc := "/proc/" + strings.TrimSpace(line)
	if _, err := os.Stat(proc); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := cmd.Wait(); err == nil {
		t.Error("exec ended by itself")
	}
	waitGone(t, proc)
}

// testDelete checks that deleting a pod ends its process and no other.
func testDelete(ctx context.Context, t *testing.T, c *Cluster, k kubectl) {
	for _, args := range [][]string{{}, {"--force", "--grace-period=0"}} {
		const name = "mortal"
		if err := c.RunPod(ctx, "default", name, []string{"sleep", "1000"}); err != nil {
			t.Fatal(err)
		}
		stdout, stderr, status := k.run(ctx, t, nil, append([]string{"delete", "pod", name, "--timeout=20s"}, args...)...)
		if status != 0 {
			t.Errorf("delete %q: %q, %q, status %d", args, stdout, stderr, status)
		}
		// A new pod of the same name starts, and late events of the old pod do not
		// end it.
		if err := c.RunPod(ctx, "default", name, []string{"sleep", "1000"}); err != nil {
			t.Fatal(err)
		}
		k.check(ctx, t, "alive\n", "exec", name, "--", "echo", "alive")
		k.run(ctx, t, nil, "delete", "pod", name, "--timeout=20s")
	}
	if _, stderr, status := k.run(ctx, t, nil, "exec", "mortal", "--", "true"); status == 0 {
		t.Errorf("exec in a deleted pod: %q; want an error", stderr)
	}
	// The kubelet itself must not have the pod any more.
	if err := c.kubelet.AddPod("default", "mortal", ContainerName, []string{"true"}); err != nil {
		t.Errorf("the kubelet still has the pod: %v", err)
	}
}

// testAudit checks that the audit log names the user and the object of an exec.
func testAudit(t *testing.T, c *Cluster) {
	f, err := os.Open(c.AuditLog())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var event struct {
			Verb      string
			User      struct{ Username string }
			ObjectRef struct{ Resource, Subresource, Name string }
		}
		if err := json.Unmarshal(lines.Bytes(), &event); err != nil {
			t.Fatalf("%s: %v", lines.Bytes(), err)
		}
		if event.User.Username == "lab-admin" && event.ObjectRef.Resource == "pods" && event.ObjectRef.Subresource == "exec" && event.ObjectRef.Name == "counter" {
			return
		}
	}
	t.Errorf("no exec by lab-admin in %s (%v)", c.AuditLog(), lines.Err())
}

const manifests = `
# A comment on its own.
---
apiVersion: v1
kind: Namespace
metadata: {name: proxy}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: proxy, namespace: proxy}
---
apiVersion: v1
kind: List
items:
- apiVersion: rbac.authorization.k8s.io/v1
  kind: ClusterRole
  metadata: {name: impersonator}
  rules:
  - {apiGroups: [""], resources: [users, groups], verbs: [impersonate]}
- apiVersion: rbac.authorization.k8s.io/v1
  kind: ClusterRoleBinding
  metadata: {name: impersonator}
  roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: impersonator}
  subjects:
  - {kind: ServiceAccount, name: proxy, namespace: proxy}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {a: b}
---
`

func TestAccess(t *testing.T) {
	ctx := testContext(t)
	c := start(ctx, t)
	for range 2 { // the second time, nothing changes
		if err := c.Apply(ctx, []byte(manifests)); err != nil {
			t.Fatal(err)
		}
	}
	admin, err := kubernetes.NewForConfig(c.Admin())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := admin.CoreV1().ConfigMaps("default").Get(ctx, "settings", metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
	if v, err := admin.Discovery().ServerVersion(); err != nil || !strings.HasPrefix(v.GitVersion, "v1.") {
		t.Errorf("server version %v, %v", v, err)
	}
	for manifest, want := range map[string]string{
		"kind: Pod": "document 1: apiVersion or kind is missing",
		"{":         "document 1: ",
		"{apiVersion: v1, kind: Nothing, metadata: {name: x}}":                                 "apply Nothing x: ",
		"{apiVersion: v1, kind: ConfigMap, metadata: {name: x, namespace: nowhere}, data: {}}": `namespaces "nowhere" not found`,
	} {
		if err := c.Apply(ctx, []byte(manifest)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Apply(%q): error %v; want %q", manifest, err, want)
		}
	}

	// A service account authenticates as itself, and its role lets it impersonate.
	token, err := c.ServiceAccountToken(ctx, "proxy", "proxy", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	tokenFile, kubeconfig := filepath.Join(dir, "token"), filepath.Join(dir, "config")
	if err := os.WriteFile(tokenFile, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.WriteTokenKubeconfig(kubeconfig, tokenFile); err != nil {
		t.Fatal(err)
	}
	k := newKubectl(t, c)
	k.kubeconfig = kubeconfig
	const user = "jsonpath={.status.userInfo.username}"
	k.check(ctx, t, "system:serviceaccount:proxy:proxy", "auth", "whoami", "-o", user)
	k.check(ctx, t, "alice@example.com", "auth", "whoami", "-o", user, "--as", "alice@example.com")
	if _, stderr, status := k.run(ctx, t, nil, "get", "pods"); status == 0 || !strings.Contains(stderr, "forbidden") {
		t.Errorf("get pods: %q, status %d; want forbidden", stderr, status)
	}
	config, err := clientcmd.LoadFromFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	if got := config.Clusters["lab"].Server; got != c.Host() || !strings.HasPrefix(got, "https://127.0.0.1:") || strings.HasSuffix(got, "/") {
		t.Errorf("server %q, Host() = %q; want https://127.0.0.1:<port>", got, c.Host())
	}
	if _, err := c.ServiceAccountToken(ctx, "proxy", "nobody", time.Hour); err == nil || !strings.Contains(err.Error(), "proxy/nobody") {
		t.Errorf("token of a missing service account: error %v", err)
	}
	if err := c.RunPod(ctx, "nowhere", "x", counter); err == nil || !strings.Contains(err.Error(), `namespaces "nowhere" not found`) {
		t.Errorf("RunPod in a missing namespace: error %v", err)
	}
	if err := c.RunPod(ctx, "default", "x", []string{"no-such-command"}); err == nil || !strings.Contains(err.Error(), "executable file not found") {
		t.Errorf("RunPod with a missing command: error %v", err)
	}
	if _, err := admin.CoreV1().Pods("default").Get(ctx, "x", metav1.GetOptions{}); err == nil {
		t.Error("the pod that failed to start still exists")
	}
}

// envHelper makes the test binary start a component, print its process ID, and hang.
// Its value is the folder for the component's files.
const envHelper = "LAB_CLUSTER_TEST_HELPER"

func TestMain(m *testing.M) {
	dir := os.Getenv(envHelper)
	if dir == "" {
		os.Exit(m.Run())
	}
	c, err := newComponent("etcd", dir, dir)
	if err != nil {
		panic(err)
	}
	err = c.start(context.Background(), func() error {
		if err := exec.Command(c.wrapper).Start(); err != nil {
			return err
		}
		return poll(context.Background(), func() (bool, error) { return c.pid() != 0, nil })
	})
	if err != nil {
		panic(err)
	}
	fmt.Println(c.pid())
	select {}
}

func TestComponent_DiesWithLab(t *testing.T) {
	if _, err := exec.LookPath("setpriv"); err != nil {
		t.Skip("setpriv is not installed")
	}
	dir := fakeAssets(t, map[string]string{"etcd": "exec sleep 1000"})
	if err := os.Mkdir(filepath.Join(dir, certsDir), 0o700); err != nil {
		t.Fatal(err)
	}
	helper := exec.Command(os.Args[0])
	helper.Env = append(os.Environ(), envHelper+"="+dir, components.EnvKubernetes+"=")
	out, err := helper.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := helper.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	proc := "/proc/" + strings.TrimSpace(line)
	if _, err := os.Stat(proc); err != nil {
		t.Fatal(err)
	}
	if err := helper.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := helper.Wait(); err == nil {
		t.Error("the helper ended by itself")
	}
	waitGone(t, proc)
}

// waitGone waits until the process with the given folder in /proc has ended.
func waitGone(t *testing.T, proc string) {
	t.Helper()
	deadline := time.Now().Add(time.Minute) // long, for a busy machine
	for {
		stat, err := os.ReadFile(filepath.Join(proc, "stat"))
		if err != nil || bytes.Contains(stat, []byte(") Z ")) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s still runs", proc)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// fakeAssets returns a folder of binaries. The named ones are shell scripts.
func fakeAssets(t *testing.T, scripts map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"etcd", "kube-apiserver"} {
		path := filepath.Join(dir, name)
		if script, ok := scripts[name]; ok {
			if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o700); err != nil {
				t.Fatal(err)
			}
			continue
		}
		binary, err := components.Path(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(binary, path); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestStart_FailureNamesReasonAndLeavesNothing(t *testing.T) {
	assets := map[string]string{}
	for name, scripts := range map[string]map[string]string{
		"etcd":           {"etcd": `[ "$1" = --help ] || { echo "disk on fire" >&2; exit 1; }`},
		"kube-apiserver": {"kube-apiserver": `[ "$1" = --help ] || { echo "disk on fire" >&2; exit 1; }`},
		"hangs":          {"kube-apiserver": `[ "$1" = --help ] || sleep 1000`},
	} {
		assets[name] = fakeAssets(t, scripts)
	}
	t.Setenv(components.EnvKubernetes, "")
	for _, name := range []string{"etcd", "kube-apiserver"} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			_, err := Start(testContext(t), Config{AssetsDir: assets[name], Dir: dir})
			if err == nil {
				t.Fatal("the cluster started; want an error")
			}
			for _, want := range []string{"start cluster: " + name + ": ", "disk on fire", filepath.Join(dir, name+".log")} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q; want it to contain %q", err, want)
				}
			}
			checkNothingRunsIn(t, dir)
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(testContext(t))
		dir := t.TempDir()
		go func() {
			started := &component{pidFile: filepath.Join(dir, certsDir, "kube-apiserver.pid")}
			if err := poll(ctx, func() (bool, error) { return started.pid() != 0, nil }); err != nil {
				t.Error(err)
			}
			cancel(errors.New("changed my mind"))
		}()
		_, err := Start(ctx, Config{AssetsDir: assets["hangs"], Dir: dir})
		if err == nil || !strings.Contains(err.Error(), "kube-apiserver: changed my mind") {
			t.Errorf("error %v; want kube-apiserver: changed my mind", err)
		}
		checkNothingRunsIn(t, dir)
	})
	t.Run("no binaries", func(t *testing.T) {
		_, err := Start(testContext(t), Config{AssetsDir: t.TempDir(), Dir: t.TempDir()})
		if err == nil || !strings.Contains(err.Error(), "make components") {
			t.Errorf("error %v; want it to name make components", err)
		}
	})
}

// checkNothingRunsIn checks that no process has dir in its command line.
func checkNothingRunsIn(t *testing.T, dir string) {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		cmdline, err := os.ReadFile(path)
		if err == nil && bytes.Contains(cmdline, []byte(dir)) {
			t.Errorf("%s: %q still runs", path, bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '}))
		}
	}
}
