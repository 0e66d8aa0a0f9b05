// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// session is a kubectl that runs until it is stopped, at the latest when the test
// ends.
type session struct {
	what   string
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	lines  chan string // lines of standard output; closed at its end
	stderr lockedBuffer
	cancel context.CancelFunc
	ended  chan struct{} // closed when kubectl has ended
	err    error         // how it ended; set before ended is closed
}

// startKubectl starts a kubectl with a kubeconfig and additional environment
// variables.
func startKubectl(t *testing.T, kubeconfig string, env []string, args ...string) *session {
	t.Helper()
	// Not the test's context, which ends before cleanups run: kubectl has to run
	// until its own cleanup.
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	cmd, err := lab.Kubectl(ctx, kubeconfig, args...)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	s := &session{
		what: "kubectl " + strings.Join(args, " "), cmd: cmd, cancel: cancel,
		lines: make(chan string, 1000), ended: make(chan struct{}),
	}
	cmd.Env = append(cmd.Env, env...)
	cmd.Stderr = &s.stderr
	if s.stdin, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(s.ended)
		defer close(s.lines)
		for scanner := bufio.NewScanner(stdout); scanner.Scan(); {
			select {
			case s.lines <- scanner.Text():
			case <-ctx.Done():
			}
		}
		s.err = cmd.Wait()
	}()
	t.Cleanup(func() {
		s.stop()
		if t.Failed() {
			t.Logf("%s: %v: %s", s.what, s.err, s.stderr.String())
		}
	})
	return s
}

// say writes a line to kubectl's standard input.
func (s *session) say(t *testing.T, line string) {
	t.Helper()
	if _, err := io.WriteString(s.stdin, line+"\n"); err != nil {
		t.Fatalf("%s: writing to it: %v", s.what, err)
	}
}

// line returns the next line that kubectl prints. It waits up to 30 seconds.
func (s *session) line(t *testing.T) string {
	t.Helper()
	timeout := time.NewTimer(30 * time.Second)
	defer timeout.Stop()
	select {
	case line, ok := <-s.lines:
		if !ok {
			<-s.ended
			t.Fatalf("%s ended (%v): %s", s.what, s.err, s.stderr.String())
		}
		return line
	case <-timeout.C:
		t.Fatalf("%s printed nothing for 30 s; standard error: %s", s.what, s.stderr.String())
	}
	return ""
}

// want reads lines until one has the prefix, and returns that line.
func (s *session) want(t *testing.T, prefix string) string {
	t.Helper()
	for {
		if line := s.line(t); strings.HasPrefix(line, prefix) {
			return line
		}
	}
}

// echoes writes a line and fails the test unless it comes back.
func (s *session) echoes(t *testing.T, line string) {
	t.Helper()
	s.say(t, line)
	if got := s.line(t); got != line {
		t.Fatalf("%s: %q came back; want %q", s.what, got, line)
	}
}

// silentUntil fails the test if kubectl prints anything, or ends, before then.
func (s *session) silentUntil(t *testing.T, then time.Time) {
	t.Helper()
	timeout := time.NewTimer(time.Until(then))
	defer timeout.Stop()
	select {
	case <-timeout.C:
	case <-s.ended:
	}
	select {
	case <-s.ended:
		t.Fatalf("%s ended (%v): %s", s.what, s.err, s.stderr.String())
	default:
	}
	select {
	case line := <-s.lines:
		t.Fatalf("%s printed %q; want silence", s.what, line)
	default:
	}
}

// failedWith fails the test unless kubectl has ended, with a non-zero exit code and with the
// reason on standard error.
func (s *session) failedWith(t *testing.T, reason string) {
	t.Helper()
	select {
	case <-s.ended:
	default:
		t.Errorf("%s still runs", s.what)
		return
	}
	if _, ok := errors.AsType[*exec.ExitError](s.err); !ok {
		t.Errorf("%s ended with %v; want a non-zero exit code", s.what, s.err)
	}
	if !strings.Contains(s.stderr.String(), reason) {
		t.Errorf("%s wrote %q; want %q", s.what, s.stderr.String(), reason)
	}
}

// stop kills kubectl.
func (s *session) stop() {
	s.cancel()
	<-s.ended
}

// lockedBuffer is a buffer that may be read while a process writes to it.
type lockedBuffer struct {
	mu     sync.Mutex
	buffer bytes.Buffer
}

// Write implements [io.Writer].
func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.Write(p)
}

// String returns what has been written.
func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.String()
}

// protocol is one of kubectl's streaming protocols.
type protocol struct {
	name    string
	upgrade string // value of the Upgrade header
	env     []string
}

var protocols = []protocol{
	{"WebSocket", "websocket", []string{"KUBECTL_REMOTE_COMMAND_WEBSOCKETS=true", "KUBECTL_PORT_FORWARD_WEBSOCKETS=true"}},
	{"SPDY", "SPDY/3.1", []string{"KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false", "KUBECTL_PORT_FORWARD_WEBSOCKETS=false"}},
}

// forEachProtocol runs f for each protocol and checks that it was used: kubectl
// tries the other one if the first fails.
func forEachProtocol(t *testing.T, f func(t *testing.T, p protocol)) {
	t.Helper()
	for _, p := range protocols {
		t.Run(p.name, func(t *testing.T) {
			onlyUpgradesTo(t, p)
			f(t, p)
		})
	}
}

// onlyUpgradesTo fails the test unless, at its end, there was an upgrade since this
// call, and all upgrades were to one protocol and succeeded.
func onlyUpgradesTo(t *testing.T, p protocol) {
	t.Helper()
	log := tail(t, theLab.Log("caddy"))
	began := float64(time.Now().UnixMicro()) / 1e6
	t.Cleanup(func() { // runs after the sessions and their requests have ended
		if t.Failed() || t.Skipped() {
			return
		}
		upgrades := 0
		eventually(t, "Caddy logs an upgrade", func() error {
			for _, request := range accessLog(t, log) {
				upgrade := request.Request.Headers.Get("Upgrade")
				// Caddy logs a request when it ends, so a request of an earlier test
				// may be logged now.
				if upgrade == "" || request.TS-request.Duration < began {
					continue
				}
				// Large requests of an earlier test may even arrive now. kubectl says who it is.
				if request.Status != http.StatusSwitchingProtocols && request.Request.Headers.Get("User-Agent") == "" {
					continue
				}
				upgrades++
				if upgrade != p.upgrade || request.Status != http.StatusSwitchingProtocols {
					t.Errorf("%s was upgraded to %q with status %d; want %q and 101", request.Request.URI, upgrade, request.Status, p.upgrade)
				}
			}
			if upgrades == 0 {
				return errors.New("no request was upgraded")
			}
			return nil
		})
	})
}

// accessEntry is a request in Caddy's log. Caddy writes it when the request ends.
type accessEntry struct {
	TS       float64 // end, in seconds
	Duration float64 // in seconds
	Request  struct {
		Proto   string
		Method  string
		URI     string
		Headers http.Header
	}
	Status int
}

// accessLog returns the requests logged since the last call.
func accessLog(t *testing.T, log *tailed) (entries []accessEntry) {
	t.Helper()
	for _, line := range log.lines(t) {
		if !strings.Contains(line, `"handled request"`) {
			continue
		}
		var entry accessEntry
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Fatalf("Caddy's log: %v: %s", err, line)
		}
		entries = append(entries, entry)
	}
	return entries
}

// tailed is a file that grows.
type tailed struct {
	path   string
	offset int64
}

// tail opens a file at its end.
func tail(t *testing.T, path string) *tailed {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return &tailed{path, info.Size()}
}

// lines returns the complete lines added since the last call.
func (f *tailed) lines(t *testing.T) []string {
	t.Helper()
	file, err := os.Open(f.path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	added, err := io.ReadAll(io.NewSectionReader(file, f.offset, 1<<40))
	if err != nil {
		t.Fatal(err)
	}
	end := bytes.LastIndexByte(added, '\n') + 1
	f.offset += int64(end)
	return strings.Split(strings.TrimSuffix(string(added[:end]), "\n"), "\n")
}

// runPod runs a pod in the namespace default until the test ends.
func runPod(t *testing.T, name, script string) {
	t.Helper()
	if err := theLab.Cluster.RunPod(t.Context(), "default", name, []string{"sh", "-c", script}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, stderr, err := runKubectl(t, theLab.AdminKubeconfig(), nil, "delete", "pod", name, "--now"); err != nil {
			t.Errorf("deleting pod %s: %v %s", name, err, stderr)
		}
	})
}

// within is [eventually] with the given timeout.
func within(t *testing.T, d time.Duration, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(d)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v: %v", what, d, err)
		}
		time.Sleep(50 * time.Millisecond) // polling interval
	}
}

// exitCode returns the exit code of a command that ended with err, or -1 if it did
// not exit by itself.
func exitCode(err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	return -1
}
