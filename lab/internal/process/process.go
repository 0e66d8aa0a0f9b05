// SPDX-License-Identifier: Apache-2.0

// Package process runs child processes that leave nothing behind. Each is the
// leader of a session of its own, so that a Ctrl-C in the terminal reaches the
// lab alone and the lab decides what stops when. When the leader ends, whatever
// is left of its session is killed, and on Linux the kernel kills the leader
// when the lab itself is killed.
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
	stopped atomic.Bool // whether it was told to end
}

// Start starts cmd, which has to be new. Its standard streams should be nil or
// files: anything else makes the end of the process wait for all of its
// children to close them.
func Start(cmd *exec.Cmd) (*Process, error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setsid = true
	dieWithParent(cmd.SysProcAttr)

	p := &Process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		// To the kernel the parent is the thread that forked, not the process.
		// This goroutine keeps its thread for as long as the child lives.
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

// Err returns how the process ended, as [exec.Cmd.Wait] does. It may only be
// called once Done is closed.
func (p *Process) Err() error { return p.err }

// Signal sends sig to the process, but not to its children.
func (p *Process) Signal(sig os.Signal) error { return p.cmd.Process.Signal(sig) }

// Kill ends the process and its session at once and waits until they are gone.
func (p *Process) Kill() {
	p.stopped.Store(true)
	select {
	case <-p.done:
	default:
		// An error means that the process has ended in the meantime.
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// Stop asks the process to terminate, kills it when it has not done so within
// grace, and waits until it is gone. It returns an error if the process had to
// be killed or had ended by itself with an error.
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

// killSession kills what is left of the session sid after its leader has ended,
// and returns once all of it is gone. The process group of the leader is not
// enough: an interactive shell puts every job in a group of its own.
func killSession(sid int) {
	for range 1000 {
		_ = syscall.Kill(-sid, syscall.SIGKILL) // fails if the group is empty
		pids := session(sid)
		if len(pids) == 0 {
			return
		}
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL) // fails if it is gone by now
		}
		time.Sleep(time.Millisecond)
	}
}

// session returns the processes of the session sid that have not ended. Where
// there is no /proc it returns none.
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
		// The name in parentheses may hold anything, so count from its end:
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
