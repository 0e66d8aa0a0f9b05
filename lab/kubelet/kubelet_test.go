// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	utilexec "k8s.io/client-go/util/exec"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/pki"
)

// testServer is a kubelet with a client that it accepts.
type testServer struct {
	*Server
	config *rest.Config
	client *http.Client
}

// start starts a kubelet that ends with the test.
func start(t *testing.T) *testServer {
	t.Helper()
	ca, err := pki.NewCA("test")
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.Server()
	if err != nil {
		t.Fatal(err)
	}
	s, err := Start(Config{Dir: t.TempDir(), Certificate: cert, ClientCA: ca.Pool()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
	certPEM, keyPEM, err := ca.Client("test")
	if err != nil {
		t.Fatal(err)
	}
	config := &rest.Config{
		Host:            fmt.Sprintf("https://127.0.0.1:%d", s.Port()),
		TLSClientConfig: rest.TLSClientConfig{CAData: ca.PEM(), CertData: certPEM, KeyData: keyPEM},
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.CloseIdleConnections)
	return &testServer{Server: s, config: config, client: client}
}

// add adds the pod default/test.
func (s *testServer) add(t *testing.T, command ...string) {
	t.Helper()
	if err := s.AddPod("default", "test", "main", command); err != nil {
		t.Fatal(err)
	}
}

// get returns the status and the body of an answer.
func (s *testServer) get(t *testing.T, path string) (int, string) {
	t.Helper()
	res, err := s.client.Get(s.config.Host + path)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(body)
}

// exec runs a shell script in the pod default/test.
func (s *testServer) exec(ctx context.Context, t *testing.T, script string, opts remotecommand.StreamOptions) error {
	t.Helper()
	query := url.Values{"command": {"sh", "-c", script}, "output": {"1"}}
	if opts.Stdin != nil {
		query.Set("input", "1")
	}
	if opts.Tty {
		query.Set("tty", "1")
	}
	u, err := url.Parse(s.config.Host + "/exec/default/test/main?" + query.Encode())
	if err != nil {
		t.Fatal(err)
	}
	executor, err := remotecommand.NewSPDYExecutor(s.config, http.MethodPost, u)
	if err != nil {
		t.Fatal(err)
	}
	return executor.StreamWithContext(ctx, opts)
}

// eventually polls until ok reports true.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// readPid waits for a file with a process ID in the folder of default/test.
func (s *testServer) readPid(t *testing.T, name string) string {
	t.Helper()
	var pid []byte
	eventually(t, name+" is written", func() bool {
		pid, _ = os.ReadFile(filepath.Join(s.dir, "default_test", "root", name))
		return bytes.HasSuffix(pid, []byte("\n"))
	})
	return strings.TrimSpace(string(pid))
}

// running reports whether a process runs.
func running(pid string) bool {
	stat, err := os.ReadFile("/proc/" + pid + "/stat")
	return err == nil && !bytes.Contains(stat, []byte(") Z "))
}

func TestLogs(t *testing.T) {
	s := start(t)
	s.add(t, "sh", "-c", "printf 'one\ntwo\nthree\n'; read x; printf 'four'")
	eventually(t, "the lines are logged", func() bool {
		_, body := s.get(t, "/containerLogs/default/test/main")
		return body == "one\ntwo\nthree\n"
	})
	for query, want := range map[string]string{
		"?tailLines=0":              "",
		"?tailLines=1":              "three\n",
		"?tailLines=2":              "two\nthree\n",
		"?tailLines=9":              "one\ntwo\nthree\n",
		"?limitBytes=0":             "",
		"?limitBytes=5":             "one\nt",
		"?limitBytes=999":           "one\ntwo\nthree\n",
		"?limitBytes=3&tailLines=2": "two",
		"?follow=false&stream=All":  "one\ntwo\nthree\n",
		"?previous=false":           "one\ntwo\nthree\n",
	} {
		if status, body := s.get(t, "/containerLogs/default/test/main"+query); status != http.StatusOK || body != want {
			t.Errorf("%s: %d %q; want %q", query, status, body, want)
		}
	}
	for query, want := range map[string]string{
		"?previous=true":           "previous=true: the lab's kubelet does not support it\n",
		"?sinceSeconds=5":          "sinceSeconds=5: the lab's kubelet does not support it\n",
		"?stream=Stderr":           "stream=Stderr: the lab's kubelet does not support it\n",
		"?tailLines=-1":            "invalid syntax",
		"?tailLines=1&tailLines=2": "tailLines is given 2 times",
		"?tail=1":                  "tail=1: unknown option\n",
	} {
		if status, body := s.get(t, "/containerLogs/default/test/main"+query); status != http.StatusBadRequest || !strings.Contains(body, want) {
			t.Errorf("%s: %d %q; want 400 and %q", query, status, body, want)
		}
	}

	// Following ends with the container.
	res, err := s.client.Get(s.config.Host + "/containerLogs/default/test/main?follow=true&tailLines=1")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	first := make([]byte, len("three\n"))
	if _, err := io.ReadFull(res.Body, first); err != nil || string(first) != "three\n" {
		t.Errorf("followed %q, %v; want %q", first, err, "three\n")
	}
	p, err := s.pod(podKey{"default", "test"}, "main")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.write([]byte("go on\n")); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(res.Body); err != nil || string(rest) != "four" {
		t.Errorf("followed %q, %v; want %q", rest, err, "four")
	}
}

func TestKubelet_UnknownPodsAndBadRequestsAreErrors(t *testing.T) {
	s := start(t)
	s.add(t, "sleep", "1000")
	for path, want := range map[string]int{
		"/containerLogs/default/other/main":        http.StatusNotFound,
		"/containerLogs/other/test/main":           http.StatusNotFound,
		"/containerLogs/default/test/other":        http.StatusNotFound,
		"/exec/default/other/main?command=id":      http.StatusNotFound,
		"/exec/default/test/main?output=1":         http.StatusBadRequest, // no command
		"/exec/default/test/main?command=id":       http.StatusBadRequest, // no stream
		"/attach/default/test/main?output=1&tty=1": http.StatusBadRequest,
		"/portForward/default/other":               http.StatusNotFound,
		"/run/default/test/main?cmd=id":            http.StatusNotFound,
	} {
		if status, body := s.get(t, path); status != want {
			t.Errorf("GET %s: %d %q; want %d", path, status, body, want)
		}
	}
	for _, err := range []error{
		s.AddPod("default", "test", "main", []string{"true"}), // exists already
		s.AddPod("default", "empty", "main", nil),
		s.AddPod("default", "missing", "main", []string{"no-such-command"}),
	} {
		if err == nil {
			t.Error("AddPod accepted a bad pod")
		}
	}
	if _, err := s.pod(podKey{"default", "missing"}, ""); err == nil {
		t.Error("a pod that failed to start exists")
	}
}

func TestKubelet_RequiresClientCertificate(t *testing.T) {
	s := start(t)
	s.add(t, "sleep", "1000")
	stranger, err := pki.NewCA("stranger")
	if err != nil {
		t.Fatal(err)
	}
	strangerCert, err := stranger.Server()
	if err != nil {
		t.Fatal(err)
	}
	for name, certs := range map[string][]tls.Certificate{"none": nil, "another authority's": {strangerCert}} {
		client := &http.Client{Transport: &http.Transport{
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true, Certificates: certs},
		}}
		if res, err := client.Get(s.config.Host + "/containerLogs/default/test/main"); err == nil {
			res.Body.Close()
			t.Errorf("with the certificate %q: %s; want no answer", name, res.Status)
		}
	}
}

func TestKubelet_ProcessesEndWithConnectionPodAndServer(t *testing.T) {
	// Each command is silent and leaves a child in a process group of its own, as
	// interactive shells do.
	script := func(name string) string {
		return fmt.Sprintf("set -m; sleep 1000 & echo $! > %[1]s.child; echo $$ > %[1]s; wait", name)
	}
	for name, tt := range map[string]struct {
		tty bool
		end func(s *testServer, disconnect func())
	}{
		"connection":          {false, func(_ *testServer, disconnect func()) { disconnect() }},
		"connection with tty": {true, func(_ *testServer, disconnect func()) { disconnect() }},
		"pod":                 {false, func(s *testServer, _ func()) { s.RemovePod("default", "test") }},
		"kubelet": {true, func(s *testServer, _ func()) {
			if err := s.Stop(); err != nil {
				t.Error(err)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t)
			s.add(t, "sh", "-c", script("main"))
			pids := []string{s.readPid(t, "main"), s.readPid(t, "main.child")}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			result := make(chan error, 1)
			go func() {
				result <- s.exec(ctx, t, script("exec"), remotecommand.StreamOptions{Stdout: io.Discard, Tty: tt.tty})
			}()
			execPids := []string{s.readPid(t, "exec"), s.readPid(t, "exec.child")}
			for _, pid := range append(pids, execPids...) {
				if !running(pid) {
					t.Fatalf("process %s does not run", pid)
				}
			}
			tt.end(s, cancel)
			// As with kubectl and any kubelet, a connection that is closed before
			// there is a status looks like success.
			if err := <-result; err == nil && name != "kubelet" {
				t.Error("exec ended without an error")
			}
			for _, pid := range execPids {
				eventually(t, "exec's process has ended", func() bool { return !running(pid) })
			}
			if err := s.Stop(); err != nil {
				t.Error(err)
			}
			for _, pid := range pids {
				if running(pid) {
					t.Errorf("process %s of the pod still runs", pid)
				}
			}
		})
	}
}

func TestExec_DaemonDoesNotKeepRequestOpen(t *testing.T) {
	s := start(t)
	s.add(t, "sleep", "1000")
	for _, tty := range []bool{false, true} {
		ctx, cancel := context.WithCancel(t.Context())
		result := make(chan error, 1)
		go func() {
			result <- s.exec(ctx, t, "trap '' HUP; setsid sh -c 'echo $$ > daemon; exec sleep 1000' & until [ -s daemon ]; do :; done", remotecommand.StreamOptions{Stdout: io.Discard, Tty: tty})
		}()
		pid := s.readPid(t, "daemon")
		cancel()
		if err := <-result; err == nil {
			t.Error("exec ended without an error")
		}
		// The daemon has left the session, so the kubelet does not kill it.
		if err := s.exec(t.Context(), t, "rm daemon; kill "+pid, remotecommand.StreamOptions{Stdout: io.Discard}); err != nil {
			t.Error(err)
		}
	}
	// Stop, at the end of the test, waits for every request.
}

func TestExec_ExitStatus(t *testing.T) {
	s := start(t)
	s.add(t, "sleep", "1000")
	for _, tty := range []bool{false, true} {
		for script, want := range map[string]int{"exit 3": 3, "kill -9 $$": 137} {
			var out bytes.Buffer
			err := s.exec(t.Context(), t, "echo hello; "+script, remotecommand.StreamOptions{Stdout: &out, Tty: tty})
			var exit utilexec.CodeExitError
			if !errors.As(err, &exit) || exit.Code != want {
				t.Errorf("%q, tty %v: %v; want status %d", script, tty, err, want)
			}
			if got := strings.TrimSpace(out.String()); got != "hello" {
				t.Errorf("%q, tty %v: printed %q; want hello", script, tty, got)
			}
		}
	}
}

func TestExec_DoesNotInheritEnvironment(t *testing.T) {
	t.Setenv("LAB_SECRET", "secret")
	s := start(t)
	s.add(t, "sleep", "1000")
	var out bytes.Buffer
	if err := s.exec(t.Context(), t, "env", remotecommand.StreamOptions{Stdout: &out}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "HOSTNAME=test\n") || strings.Contains(out.String(), "LAB_SECRET") {
		t.Errorf("environment %q; want the pod's own", out.String())
	}
}
