// SPDX-License-Identifier: Apache-2.0

// Package process runs child processes that leave nothing behind. Each is the leader
// of a new session, so a Ctrl-C in the terminal reaches only the lab, which decides
// in which order things stop. When the leader ends, the rest of its session is
// killed. On Linux, the kernel kills the leader when the lab itself is killed.
package process

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

// Process is a running child process.
type Process struct {
	cmd     *exec.Cmd
	done    chan struct{}
	err     error       // how the process ended; set before done is closed
	stopped atomic.Bool // whether Stop or Kill was called
}

// Start starts cmd, which must not have been started. Its standard streams should be
// nil or files: otherwise the end of the process waits until all of its children
// have closed them.
func Start(cmd *exec.Cmd) (*Process, error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setsid = true
	dieWithParent(cmd.SysProcAttr)

	p := &Process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		// The kernel considers the thread that forked the parent, not the process.
		// So this goroutine keeps its thread as long as the child runs.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()

		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = cmd.Wait()
		killSession(cmd.Process.Pid)
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

// Pid returns the process ID, which is also the ID of its session.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended and its session is empty.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err returns how the process ended, as [exec.Cmd.Wait] does. Call it only after
// Done is closed.
func (p *Process) Err() error { return p.err }

// Signal sends sig to the process, but not to its children.
func (p *Process) Signal(sig os.Signal) error { return p.cmd.Process.Signal(sig) }

// Kill kills the process and its session at once and waits until they have ended.
func (p *Process) Kill() {
	p.stopped.Store(true)
	select {
	case <-p.done:
	default:
		// An error means that the process has already ended.
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// Stop asks the process to terminate, kills it if it has not done so within grace,
// and waits until it has ended. It returns an error if the process had to be killed
// or had failed before.
func (p *Process) Stop(grace time.Duration) error {
	select {
	case <-p.done:
		if p.err != nil && !p.stopped.Load() {
			return fmt.Errorf("%s ended early: %w", filepath.Base(p.cmd.Path), p.err)
		}
		return nil
	default:
	}
	p.stopped.Store(true)
	if err := p.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", filepath.Base(p.cmd.Path), err)
	}
	timeout := time.NewTimer(grace)
	defer timeout.Stop()
	select {
	case <-p.done:
		return nil
	case <-timeout.C:
		p.Kill()
		return fmt.Errorf("%s did not stop within %v and was killed", filepath.Base(p.cmd.Path), grace)
	}
}

// killSession kills the rest of session sid after its leader has ended, and returns
// when all of it has ended. Killing the leader's process group is not enough: an
// interactive shell puts every job in a group of its own.
func killSession(sid int) {
	for range 1000 {
		_ = syscall.Kill(-sid, syscall.SIGKILL) // fails if the group is empty
		pids := session(sid)
		if len(pids) == 0 {
			return
		}
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL) // fails if it has already ended
		}
		time.Sleep(time.Millisecond)
	}
}

// session returns the running processes of session sid. Without /proc it returns
// none.
func session(sid int) []int {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil
	}
	var pids []int
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // it has just ended
		}
		// The name in parentheses may contain anything, so parse after its end:
		// state, parent, process group, session.
		fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
		if len(fields) < 4 || string(fields[0]) == "Z" || string(fields[0]) == "X" {
			continue
		}
		if string(fields[3]) != strconv.Itoa(sid) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}
