// SPDX-License-Identifier: Apache-2.0

package process

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// start starts a shell script and returns the process and what it prints.
func start(t *testing.T, script string) (*Process, *bufio.Reader) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	cmd := exec.Command("/bin/sh", "-c", script)
	cmd.Stdout = w
	p, err := Start(cmd)
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	return p, bufio.NewReader(r)
}

// ready waits for the line "ready".
func ready(t *testing.T, r *bufio.Reader) {
	t.Helper()
	if line, err := r.ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("read %q, %v; want %q", line, err, "ready\n")
	}
}

// wait waits for the end of p.
func wait(t *testing.T, p *Process) {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the process has not ended")
	}
}

func TestStopTerminates(t *testing.T) {
	p, out := start(t, `trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.01; done`)
	ready(t, out)
	if err := p.Stop(10 * time.Second); err != nil {
		t.Error(err)
	}
	if rest, err := io.ReadAll(out); err != nil || string(rest) != "bye\n" {
		t.Errorf("read %q, %v; want %q", rest, err, "bye\n")
	}
	if err := p.Stop(0); err != nil {
		t.Errorf("second Stop: %v", err)
	}
}

func TestStopKillsWhatDoesNotListen(t *testing.T) {
	p, out := start(t, `trap '' TERM; echo ready; while :; do sleep 0.01; done`)
	ready(t, out)
	if err := p.Stop(20 * time.Millisecond); err == nil || !strings.Contains(err.Error(), "was killed") {
		t.Errorf("Stop: error %v; want that it was killed", err)
	}
	wait(t, p)
}

func TestStopReportsAnEarlyEnd(t *testing.T) {
	p, _ := start(t, `exit 3`)
	wait(t, p)
	var exit *exec.ExitError
	if err := p.Stop(0); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("Stop: error %v; want exit status 3", err)
	}
}

func TestTheSessionEndsWithItsLeader(t *testing.T) {
	if _, err := os.Stat("/proc/self/stat"); err != nil {
		t.Skip("other process groups are found through /proc")
	}
	// set -m gives the job a process group of its own, as interactive shells do.
	p, out := start(t, `set -m; sleep 1000 & echo ready`)
	ready(t, out)
	wait(t, p)
	if pids := session(p.Pid()); len(pids) > 0 {
		t.Errorf("left behind: %v", pids)
	}
	// The job held the pipe; it is closed now.
	if rest, err := io.ReadAll(out); err != nil || len(rest) > 0 {
		t.Errorf("read %q, %v; want the end of the output", rest, err)
	}
}

func TestStartFails(t *testing.T) {
	if _, err := Start(exec.Command("/does/not/exist")); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("Start: error %v; want %v", err, syscall.ENOENT)
	}
}
