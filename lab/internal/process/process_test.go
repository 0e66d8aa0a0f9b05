// SPDX-License-Identifier: Apache-2.0

package process

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// start starts a shell script and returns the process and its output.
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

func TestStop_Terminates(t *testing.T) {
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

func TestStop_KillsProcessThatIgnoresSignal(t *testing.T) {
	p, out := start(t, `trap '' TERM; echo ready; while :; do sleep 0.01; done`)
	ready(t, out)
	if err := p.Stop(20 * time.Millisecond); err == nil || !strings.Contains(err.Error(), "was killed") {
		t.Errorf("Stop: error %v; want an error: was killed", err)
	}
	wait(t, p)
}

func TestStop_ReportsEarlyEnd(t *testing.T) {
	p, _ := start(t, `exit 3`)
	wait(t, p)
	var exit *exec.ExitError
	if err := p.Stop(0); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("Stop: error %v; want exit status 3", err)
	}
}

func TestProcess_SessionEndsWithLeader(t *testing.T) {
	if _, err := os.Stat("/proc/self/stat"); err != nil {
		t.Skip("needs /proc to find other process groups")
	}
	// set -m gives the job a process group of its own, as interactive shells do.
	p, out := start(t, `set -m; sleep 1000 & echo ready`)
	ready(t, out)
	wait(t, p)
	if pids := session(p.Pid()); len(pids) > 0 {
		t.Errorf("left behind: %v", pids)
	}
	// The job had the pipe open; it is closed now.
	if rest, err := io.ReadAll(out); err != nil || len(rest) > 0 {
		t.Errorf("read %q, %v; want the end of the output", rest, err)
	}
}

// envHelper makes the test binary start a process, print its ID, and hang.
const envHelper = "LAB_PROCESS_TEST_HELPER"

func TestMain(m *testing.M) {
	if os.Getenv(envHelper) == "" {
		os.Exit(m.Run())
	}
	p, err := Start(exec.Command("sleep", "1000"))
	if err != nil {
		panic(err)
	}
	fmt.Println(p.Pid())
	select {}
}

func TestProcess_DiesWithParent(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux can kill a process when its parent ends")
	}
	helper := exec.Command(os.Args[0])
	helper.Env = append(os.Environ(), envHelper+"=1")
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
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	if got := session(pid); !slices.Equal(got, []int{pid}) {
		t.Fatalf("the process does not run: %v", got)
	}
	if err := helper.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := helper.Wait(); err == nil {
		t.Error("the helper ended by itself")
	}
	deadline := time.Now().Add(10 * time.Second)
	for len(session(pid)) > 0 {
		if time.Now().After(deadline) {
			t.Fatal("the process has outlived its parent")
		}
		time.Sleep(time.Millisecond)
	}
}

func TestStart_MissingBinaryIsError(t *testing.T) {
	if _, err := Start(exec.Command("/does/not/exist")); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("Start: error %v; want %v", err, syscall.ENOENT)
	}
}
