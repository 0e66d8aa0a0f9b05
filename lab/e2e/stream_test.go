// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/creack/pty"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// All of this uses the https site, which also offers HTTP/2: kubectl uses HTTP/2 for
// ordinary requests, and separate connections for streams.

func TestStream_TerminalHasSize(t *testing.T) {
	forEachProtocol(t, func(t *testing.T, p protocol) {
		const script = `while read -r line; do case $line in exit) exit 7;; *) stty size;; esac; done`
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd, err := theLab.Callers["alice"].Kubectl(ctx, "exec", "-it", lab.Pod, "--", "sh", "-c", script)
		if err != nil {
			t.Fatal(err)
		}
		cmd.Env = append(cmd.Env, p.env...)
		terminal, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 30, Cols: 100})
		if err != nil {
			t.Fatal(err)
		}
		var screen lockedBuffer
		read := make(chan struct{})
		go func() {
			defer close(read)
			_, _ = io.Copy(&screen, terminal) // ends with EIO when kubectl does
		}()
		defer func() {
			cancel()
			_ = cmd.Wait() // it was killed, or has been waited for
			<-read
			_ = terminal.Close()
		}()
		enter := func(line string) error {
			_, err := io.WriteString(terminal, line+"\r")
			return err
		}
		// The command may read the size before it has arrived.
		sees := func(size string) {
			t.Helper()
			eventually(t, "the command sees a terminal of "+size, func() error {
				if err := enter("size"); err != nil {
					return err
				}
				if !strings.Contains(screen.String(), size) {
					return fmt.Errorf("the screen shows %q", screen.String())
				}
				return nil
			})
		}
		sees("30 100")
		if err := pty.Setsize(terminal, &pty.Winsize{Rows: 41, Cols: 123}); err != nil {
			t.Fatal(err)
		}
		sees("41 123")
		if err := enter("exit"); err != nil {
			t.Fatal(err)
		}
		if code := exitCode(cmd.Wait()); code != 7 {
			t.Errorf("kubectl exec -it exited with %d; want the command's 7; the screen shows %q", code, screen.String())
		}
	})
}

func TestStream_WithoutTerminal(t *testing.T) {
	forEachProtocol(t, func(t *testing.T, p protocol) {
		stdout, stderr, err := runKubectl(t, theLab.Callers["alice"].Kubeconfig, p.env,
			"exec", lab.Pod, "--", "sh", "-c", "if [ -t 0 ] || [ -t 1 ]; then echo terminal; else echo none; fi; echo problem >&2; exit 42")
		if code := exitCode(err); code != 42 {
			t.Errorf("kubectl exec exited with %d (%v); want the command's 42", code, err)
		}
		if stdout != "none\n" {
			t.Errorf("got standard output %q; want none", stdout)
		}
		if !strings.HasPrefix(stderr, "problem\n") {
			t.Errorf("got standard error %q; want problem", stderr)
		}
	})
}

func TestStream_AttachConnectsToRunningProcess(t *testing.T) {
	const pod = "attached"
	runPod(t, pod, `while read -r line; do echo "heard $line"; done`)
	forEachProtocol(t, func(t *testing.T, p protocol) {
		s := startKubectl(t, theLab.Callers["alice"].Kubeconfig, p.env, "attach", "-i", pod)
		for _, word := range []string{"one", "two"} {
			s.say(t, word)
			if got := s.line(t); got != "heard "+word {
				t.Fatalf("kubectl attach printed %q; want %q", got, "heard "+word)
			}
		}
	})
}

func TestStream_CpCopiesBothWays(t *testing.T) {
	forEachProtocol(t, func(t *testing.T, p protocol) {
		content := noise(5 << 20)
		dir := t.TempDir()
		from, back := filepath.Join(dir, "from"), filepath.Join(dir, "back")
		if err := os.WriteFile(from, content, 0o600); err != nil {
			t.Fatal(err)
		}
		there := lab.Pod + ":copied-" + p.name
		for _, args := range [][]string{{from, there}, {there, back}} {
			// Retries would hide a broken stream.
			stdout, stderr, err := runKubectl(t, theLab.Callers["alice"].Kubeconfig, p.env, append([]string{"cp", "--retries=0"}, args...)...)
			if err != nil {
				t.Fatalf("kubectl cp %q: %v: %s%s", args, err, stdout, stderr)
			}
		}
		got, err := os.ReadFile(back)
		if err != nil {
			t.Fatal(err)
		}
		if sha256.Sum256(got) != sha256.Sum256(content) {
			t.Errorf("%d bytes came back, which differ from the %d that were copied", len(got), len(content))
		}
	})
}

func TestStream_PortForwardCarriesConcurrentConnections(t *testing.T) {
	const connections, size = 5, 3 << 20
	forEachProtocol(t, func(t *testing.T, p protocol) {
		address, _ := portForward(t, "alice", p, echoServer(t))
		// All connections are open before any of them ends.
		var ready, done sync.WaitGroup
		ready.Add(connections)
		for i := range connections {
			done.Go(func() {
				conn, err := net.Dial("tcp", address)
				ready.Done()
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				ready.Wait()
				if err := roundTrip(conn, noise(size)); err != nil {
					t.Errorf("connection %d: %v", i, err)
				}
			})
		}
		done.Wait()
	})
}

// Proxies tend to lose the end of half-closed streams: cat prints the last data long
// after its standard input was closed.
//
// The command waits until all data has arrived. When a command ends, Kubernetes
// drops output that a slow reader has not read yet, several MB of it, also without a
// proxy (kubernetes/kubernetes#124571). With the race detector, every reader here is
// slow.
func TestStream_PipeLosesNoByte(t *testing.T) {
	rounds := 1
	if *long {
		rounds = 10
	}
	content := noise(50 << 20)
	want := sha256.Sum256(content)
	forEachProtocol(t, func(t *testing.T, p protocol) {
		for round := range rounds {
			complete := filepath.Join(t.TempDir(), "complete")
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			cmd, err := theLab.Callers["alice"].Kubectl(ctx, "exec", "-i", lab.Pod, "--", "sh", "-c", `cat; until [ -e "$1" ]; do sleep 0.1; done`, "sh", complete)
			if err != nil {
				t.Fatal(err)
			}
			hash := sha256.New()
			stdout := &counter{want: len(content), complete: func() error { return os.WriteFile(complete, nil, 0o600) }}
			var stderr bytes.Buffer
			cmd.Env = append(cmd.Env, p.env...)
			cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(content), io.MultiWriter(hash, stdout), &stderr
			start := time.Now()
			if err := cmd.Run(); err != nil {
				t.Fatalf("round %d: after %d of %d bytes: %v: %s", round, stdout.n, len(content), err, stderr.String())
			}
			if [sha256.Size]byte(hash.Sum(nil)) != want {
				t.Errorf("round %d: %d bytes came back, which differ from the %d that were sent; standard error: %s", round, stdout.n, len(content), stderr.String())
			}
			t.Logf("round %d: %d MB there and back in %.1f s", round, len(content)>>20, time.Since(start).Seconds())
		}
	})
}

// counter counts the bytes written to it and calls complete when it has received all
// of them.
type counter struct {
	n, want  int
	complete func() error
}

// Write implements [io.Writer].
func (c *counter) Write(p []byte) (int, error) {
	before := c.n
	c.n += len(p)
	if before < c.want && c.n >= c.want {
		return len(p), c.complete()
	}
	return len(p), nil
}

// A command may end before it has read its input. Kubernetes itself loses about a quarter of
// the exit codes here, and with a real kubelet half of the sessions never end, so not every
// run counts. TestTunnel_LastWordsReachClientThatIsSending,
// of the module, is exact.
func TestStream_ExitCodeOfCommandThatLeavesInput(t *testing.T) {
	const runs = 12
	input := noise(5_000_000)
	forEachProtocol(t, func(t *testing.T, p protocol) {
		kept := make(map[string]int)
		for range runs {
			for way, kubeconfig := range map[string]string{"directly": theLab.AdminKubeconfig(), "through the proxy": theLab.Callers["alice"].Kubeconfig} {
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				cmd, err := lab.Kubectl(ctx, kubeconfig, "exec", "-i", lab.Pod, "--", "sh", "-c", "head -c 10 >/dev/null; exit 6")
				if err != nil {
					t.Fatal(err)
				}
				cmd.Env = append(cmd.Env, p.env...)
				cmd.Stdin = bytes.NewReader(input)
				began := time.Now()
				out, err := cmd.CombinedOutput()
				cancel()
				if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() == 6 {
					kept[way]++
				} else {
					t.Logf("%s, kubectl ended after %v with %v: %s", way, time.Since(began).Round(time.Millisecond), err, out)
				}
			}
		}
		t.Logf("of %d runs, the exit code arrived in: %v", runs, kept)
		if 2*kept["through the proxy"] < kept["directly"] {
			t.Errorf("the proxy loses exit codes")
		}
	})
}

// noise returns n incompressible bytes, the same on every call.
func noise(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b) // never fails
	return b
}

// echoServer returns a port of [lab.Pod] that sends back what it receives.
func echoServer(t *testing.T) (port string) {
	t.Helper()
	if theLab.Cluster.Node() != nil {
		return lab.EchoPort
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return // the test has ended
			}
			go func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn) // the test detects missing bytes
			}()
		}
	}()
	_, port, err = net.SplitHostPort(ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// portForward runs kubectl port-forward to a port as a caller, and returns the
// address on which it listens.
func portForward(t *testing.T, caller string, p protocol, port string) (address string, s *session) {
	t.Helper()
	s = startKubectl(t, theLab.Callers[caller].Kubeconfig, p.env, "port-forward", "--address=127.0.0.1", lab.Pod, ":"+port)
	line := s.want(t, "Forwarding from ")
	return strings.Fields(line)[2], s
}

// dialLocal connects to an address on loopback. The connection is closed when the
// test ends.
func dialLocal(t *testing.T, address string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// roundTrip writes content to conn while it reads it back. It returns an error
// unless the same bytes come back.
func roundTrip(conn net.Conn, content []byte) error {
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	written := make(chan error, 1)
	go func() {
		_, err := conn.Write(content)
		written <- err
	}()
	back := make([]byte, len(content))
	n, readErr := io.ReadFull(conn, back)
	if err := errors.Join(readErr, <-written); err != nil {
		return fmt.Errorf("after %d of %d bytes: %w", n, len(content), err)
	}
	if !bytes.Equal(back, content) {
		return fmt.Errorf("%d bytes came back, which differ", len(back))
	}
	return nil
}
