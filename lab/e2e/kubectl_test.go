// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/kubeconfig"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

func TestKubectl_ReadsAndWritesAsItsUser(t *testing.T) {
	if got := kubectl(t, "alice", "auth", "whoami"); !strings.Contains(got, "alice@example.com") || !strings.Contains(got, masters()) {
		t.Errorf("kubectl auth whoami printed %s", got)
	}
	if got := kubectl(t, "bob", "get", "pods"); !strings.Contains(got, lab.Pod) {
		t.Errorf("kubectl get pods printed %s", got)
	}
	kubectl(t, "alice", "create", "configmap", "e2e", "--from-literal=a=b")
	if got := kubectl(t, "bob", "get", "configmap", "e2e", "-o", "jsonpath={.data.a}"); got != "b" {
		t.Errorf("bob reads %q; want b", got)
	}
	if _, stderr, err := tryKubectl(t, "bob", "delete", "configmap", "e2e"); err == nil || !strings.Contains(stderr, `User "bob@example.com" cannot delete resource "configmaps"`) {
		t.Errorf("bob deleting: %v %s; want the API server's refusal, which names bob", err, stderr)
	}
	kubectl(t, "alice", "delete", "configmap", "e2e")
}

func TestKubectl_PlainHTTPWorksUnderNodesNames(t *testing.T) {
	alice := theLab.Callers["alice"]
	node, err := theLab.Caddy.Node(t.Context(), lab.ProxyName)
	if err != nil {
		t.Fatal(err)
	}
	ip4, ip6 := node.TailscaleIPs()
	for _, host := range []string{lab.ProxyName, lab.ProxyName + "." + lab.Domain, ip4.String(), "[" + ip6.String() + "]"} {
		t.Run(host, func(t *testing.T) {
			kubeconfig := alice.Kubeconfig + ".http"
			if err := alice.WriteKubeconfig(kubeconfig, "http://"+host); err != nil {
				t.Fatal(err)
			}
			stdout, stderr, err := runKubectl(t, kubeconfig, nil, "auth", "whoami", "-o", "jsonpath={.status.userInfo.username}")
			if err != nil || stdout != "alice@example.com" {
				t.Errorf("kubectl auth whoami: %v: %s%s", err, stdout, stderr)
			}
		})
	}
}

// A site can be below a path: the kubeconfig of its whoami page has that path.
func TestKubectl_UsesSiteBelowPath(t *testing.T) {
	resp := send(t, "alice", portBelowPath, get("/cluster-a/whoami?kubeconfig", "Host: "+lab.ProxyName+":"+portBelowPath))
	config, err := clientcmd.Load([]byte(resp.body))
	if err != nil {
		t.Fatalf("%s: %v", resp.Status, err)
	}
	path := filepath.Join(t.TempDir(), "config")
	if err := theLab.Callers["alice"].WriteKubeconfig(path, config.Clusters[config.CurrentContext].Server); err != nil {
		t.Fatal(err)
	}
	if stdout, stderr, err := runKubectl(t, path, nil, "exec", lab.Pod, "--", "echo", "hello"); err != nil || stdout != "hello\n" {
		t.Errorf("kubectl exec: %v: %q %s", err, stdout, stderr)
	}
	if _, stderr, err := runKubectl(t, path, nil, "get", "pods"); err != nil {
		t.Errorf("kubectl get pods: %v: %s", err, stderr)
	}
}

func TestKubectl_ExecRunsCommand(t *testing.T) {
	for _, websockets := range []string{"true", "false"} {
		t.Run("websockets="+websockets, func(t *testing.T) {
			env := []string{"KUBECTL_REMOTE_COMMAND_WEBSOCKETS=" + websockets}
			kubeconfig := theLab.Callers["alice"].Kubeconfig
			stdout, stderr, err := runKubectl(t, kubeconfig, env, "exec", lab.Pod, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 7 {
				t.Errorf("kubectl exec: %v; want exit code 7", err)
			}
			if stdout != "out\n" || !strings.HasPrefix(stderr, "err\n") {
				t.Errorf("kubectl exec printed %q and %q; want out and err", stdout, stderr)
			}
			_, stderr, err = runKubectl(t, theLab.Callers["bob"].Kubeconfig, env, "exec", lab.Pod, "--", "true")
			if err == nil || !strings.Contains(stderr, "bob@example.com") {
				t.Errorf("bob, who may only view, ran a command: %v %s", err, stderr)
			}
		})
	}
}

func TestKubectl_ExecWithCommandOf100KB(t *testing.T) {
	argument := strings.Repeat("0123456789", 10_000)
	got := kubectl(t, "alice", "exec", lab.Pod, "--", "sh", "-c", "printf %s \"$1\" | wc -c", "sh", argument)
	if strings.TrimSpace(got) != "100000" {
		t.Errorf("the command saw an argument of %s bytes; want 100000", got)
	}
}

func TestKubectl_LogsAreFollowed(t *testing.T) {
	lines := follow(t, "bob", "logs", "-f", lab.Pod)
	for range 3 {
		if line := <-lines; !strings.HasPrefix(line, "line ") {
			t.Fatalf("kubectl logs -f printed %q; want a line of the pod", line)
		}
	}
}

func TestKubectl_WatchSeesLaterChanges(t *testing.T) {
	events := follow(t, "bob", "get", "configmaps", "--watch", "--output-watch-events", "--no-headers", "--field-selector", "metadata.name=watched")
	// The watch has started when it shows the object.
	kubectl(t, "alice", "create", "configmap", "watched")
	defer kubectl(t, "alice", "delete", "configmap", "watched", "--ignore-not-found")
	if event := <-events; !strings.HasPrefix(event, "ADDED") {
		t.Fatalf("kubectl get --watch printed %q; want ADDED", event)
	}
	kubectl(t, "alice", "label", "configmap", "watched", "a=b")
	if event := <-events; !strings.HasPrefix(event, "MODIFIED") {
		t.Fatalf("kubectl get --watch printed %q; want MODIFIED", event)
	}
}

// follow starts a kubectl that does not end by itself and returns its lines of
// output. It stops with the test.
func follow(t *testing.T, caller string, args ...string) <-chan string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	cmd, err := theLab.Callers[caller].Kubectl(ctx, args...)
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := make(chan string)
	go func() {
		defer close(lines)
		for scanner := bufio.NewScanner(stdout); scanner.Scan(); {
			select {
			case lines <- scanner.Text():
			case <-ctx.Done():
				return
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // killed
		if t.Failed() {
			t.Logf("kubectl %s: %s", strings.Join(args, " "), stderr.String())
		}
	})
	return lines
}

// kubectl prints why every request of a caller is refused, also for its discovery
// requests, whose Status objects it does not read.
func TestKubectl_PrintsWhyCallerIsRefused(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	device, err := theLab.Join(ctx, lab.CallerSpec{Name: "joerg", Login: "jörg@example.com"})
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"get", "pods"}, {"api-resources"}, {"version"}} {
		_, stderr, err := runKubectl(t, device.Kubeconfig, nil, args...)
		if err == nil {
			t.Errorf("kubectl %s works for a login that no header can carry", strings.Join(args, " "))
		}
		lines := strings.Split(strings.TrimSpace(stderr), "\n")
		last := lines[len(lines)-1]
		if want := `: tailscale_impersonate: no identity for jörg@example.com`; !strings.HasPrefix(strings.ToLower(last), "error") || !strings.Contains(last, want) {
			t.Errorf("kubectl %s ends with %q; want an error with %q; all of it:\n%s", strings.Join(args, " "), last, want, stderr)
		}
	}
}

// kubectl proxy opens connections for exec, attach and port-forward on its own. Without
// TLS settings in its kubeconfig, as for a site with a public certificate, it would send no
// server name, and Caddy would have no certificate to answer with. The kubeconfig of the
// command and of the whoami page has such a setting.
func TestKubectlProxy_ExecSendsServerName(t *testing.T) {
	// kubectl proxy dials without the proxy in its kubeconfig, so it needs the site on
	// this machine, under the site's name.
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			local, err := ln.Accept()
			if err != nil {
				return
			}
			remote, err := theLab.Callers["alice"].Dial(context.Background(), "tcp", lab.ProxyName+":"+portLocalhost)
			if err != nil {
				local.Close()
				continue
			}
			go func() { _, _ = io.Copy(remote, local); remote.Close() }()
			go func() { _, _ = io.Copy(local, remote); local.Close() }()
		}
	}()
	_, port, err := net.SplitHostPort(ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	config, err := kubeconfig.New("https://localhost:"+port, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "config")
	if err := clientcmd.WriteToFile(*config, path); err != nil {
		t.Fatal(err)
	}
	ca, err := theLab.Caddy.CA()
	if err != nil {
		t.Fatal(err)
	}
	roots := filepath.Join(t.TempDir(), "roots.crt")
	if err := os.WriteFile(roots, ca, 0o600); err != nil {
		t.Fatal(err)
	}
	proxy := startKubectl(t, path, []string{"SSL_CERT_FILE=" + roots}, "proxy", "--port=0", "--disable-filter")
	line := proxy.want(t, "Starting to serve on ")
	_, address, _ := strings.Cut(line, "Starting to serve on ")
	through := filepath.Join(t.TempDir(), "config")
	config, err = kubeconfig.New("http://"+address, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := clientcmd.WriteToFile(*config, through); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, err := runKubectl(t, through, nil, "exec", lab.Pod, "--", "echo", "hello")
	if err != nil || stdout != "hello\n" {
		t.Errorf("exec through kubectl proxy: %v: %q %s", err, stdout, stderr)
	}
}

// A refusal with Retry-After comes from the same function that the handler uses when
// WhoIs fails. A healthy lab cannot show that failure.
func TestKubectl_PrintsRetryReasonWithin15Seconds(t *testing.T) {
	const reason = "tailnet node k8s does not say who 100.64.0.7 is"
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		<-time.After(tailnet.WhoIsTimeout) // as long as a node that does not answer delays a request
		if err := apistatus.Write(w, r, apistatus.TryAgain(apistatus.Other, "%s", reason)); err != nil {
			t.Error(err)
		}
	}))
	defer server.Close()
	kubeconfig := filepath.Join(t.TempDir(), "config")
	if err := clientcmd.WriteToFile(api.Config{
		Clusters:       map[string]*api.Cluster{"c": {Server: server.URL}},
		AuthInfos:      map[string]*api.AuthInfo{"c": {Token: "unused"}},
		Contexts:       map[string]*api.Context{"c": {Cluster: "c", AuthInfo: "c"}},
		CurrentContext: "c",
	}, kubeconfig); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd, err := lab.Kubectl(ctx, kubeconfig, "get", "pods")
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cancel()
		_ = cmd.Wait() // killed, or failed as it should
	}()
	for scanner := bufio.NewScanner(stderr); scanner.Scan(); {
		if !strings.Contains(scanner.Text(), reason) {
			continue
		}
		if took := time.Since(start); took > 15*time.Second {
			t.Errorf("kubectl printed the reason after %v; want at most 15 s", took)
		}
		t.Logf("kubectl printed the reason after %.1f s: %s", time.Since(start).Seconds(), scanner.Text())
		return
	}
	t.Error("kubectl never printed the reason")
}
