// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/process"
)

// executor runs commands in a pod and attaches to it.
type executor struct{ pod *pod }

var (
	_ remotecommand.Executor = executor{}
	_ remotecommand.Attacher = executor{}
)

// ExecInContainer implements [remotecommand.Executor]. It returns when the command
// has ended and its output has been sent. If ctx ends first, it kills the command.
func (e executor) ExecInContainer(ctx context.Context, _, _, _ string, command []string, stdin io.Reader, stdout, stderr io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize, _ time.Duration) error {
	if !e.pod.begin() {
		return errors.New("the pod is gone")
	}
	defer e.pod.work.Done()
	cmd := e.pod.command(command)
	s := streams{stdin, stdout, stderr}
	if tty {
		return exitError(runTTY(ctx, cmd, s, resize))
	}
	return exitError(run(ctx, cmd, s))
}

// streams are the standard streams of a command. Each may be nil.
type streams struct {
	stdin          io.Reader
	stdout, stderr io.Writer
}

// run runs cmd with pipes for its standard streams.
func run(ctx context.Context, cmd *exec.Cmd, s streams) error {
	var (
		theirs []io.Closer // the command's ends of the pipes
		output sync.WaitGroup
	)
	closeTheirs := func() {
		for _, c := range theirs {
			c.Close()
		}
	}
	defer closeTheirs()

	var stdinPipe *os.File
	if s.stdin != nil {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		theirs = append(theirs, r)
		cmd.Stdin, stdinPipe = r, w
		defer w.Close()
	}
	var copies []func()
	for _, stream := range []struct {
		file *io.Writer
		to   io.Writer
	}{{&cmd.Stdout, s.stdout}, {&cmd.Stderr, s.stderr}} {
		if stream.to == nil {
			continue
		}
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		theirs = append(theirs, w)
		defer r.Close()
		*stream.file = w
		copies = append(copies, func() { copyOutput(ctx, stream.to, r) })
	}

	p, err := process.Start(cmd)
	if err != nil {
		return err
	}
	closeTheirs()
	theirs = nil
	for _, c := range copies {
		output.Go(c)
	}
	if stdinPipe != nil {
		// Do not wait for this: it ends only when the caller closes the stream.
		go func() {
			defer stdinPipe.Close()
			_, _ = io.Copy(stdinPipe, s.stdin) // fails when the command stops reading
		}()
	}
	defer output.Wait()
	return waitOrKill(ctx, p)
}

// runTTY runs cmd on a new terminal.
func runTTY(ctx context.Context, cmd *exec.Cmd, s streams, resize <-chan remotecommand.TerminalSize) error {
	terminal, tty, err := openTerminal()
	if err != nil {
		return err
	}
	defer terminal.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setctty: true} // its standard input
	cmd.Env = append(cmd.Env, "TERM=xterm")
	p, err := process.Start(cmd)
	tty.Close()
	if err != nil {
		return err
	}

	go func() {
		for size := range resize {
			_ = resizeTerminal(terminal, size) // fails when the command has ended
		}
	}()
	if s.stdin != nil {
		go func() { _, _ = io.Copy(terminal, s.stdin) }() // fails when the command has ended
	}
	var output sync.WaitGroup
	output.Go(func() {
		out := s.stdout
		if out == nil {
			out = io.Discard
		}
		copyOutput(ctx, out, terminal)
	})
	defer output.Wait()
	return waitOrKill(ctx, p)
}

// copyOutput copies a command's output to a stream until the output or ctx ends. If
// the caller stops reading, copyOutput discards the rest, so that the command does
// not block on a full pipe until it is killed.
func copyOutput(ctx context.Context, to io.Writer, from *os.File) {
	// A daemon that has left the command's session may keep the pipe open.
	stop := context.AfterFunc(ctx, func() { _ = from.Close() })
	defer stop()
	if _, err := io.Copy(to, from); err != nil {
		// A terminal without users fails with EIO each time.
		_, _ = io.Copy(io.Discard, from)
	}
}

// waitOrKill waits until p has ended and returns how. If ctx ends first, it kills p.
func waitOrKill(ctx context.Context, p *process.Process) error {
	select {
	case <-p.Done():
	case <-ctx.Done():
		p.Kill()
	}
	return p.Err()
}

// exitError returns the error that makes kubectl exit with the command's exit
// status.
func exitError(err error) error {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	code := exit.ExitCode()
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		code = 128 + int(status.Signal()) // as shells do
	}
	return utilexec.CodeExitError{Err: fmt.Errorf("command terminated: %w", err), Code: code}
}

// AttachContainer implements [remotecommand.Attacher]. The caller receives what the
// container prints from now on, both streams combined, and may write to its standard
// input. It returns when the container or ctx ends.
func (e executor) AttachContainer(ctx context.Context, _, _, _ string, stdin io.Reader, stdout, stderr io.WriteCloser, _ bool, _ <-chan remotecommand.TerminalSize) error {
	offset, _, _ := e.pod.logs.state()
	if stdin != nil {
		// Do not wait for this: it ends only when the caller closes the stream.
		go func() { _, _ = io.Copy(writerFunc(e.pod.write), stdin) }() // fails when the container has ended
	}
	out := stdout
	if out == nil {
		out = stderr
	}
	if out == nil {
		select {
		case <-e.pod.process.Done():
		case <-ctx.Done():
		}
		return nil
	}
	return e.pod.logs.copyTo(ctx, out, offset, true)
}

// writerFunc is a function as an [io.Writer].
type writerFunc func([]byte) (int, error)

// Write implements [io.Writer].
func (f writerFunc) Write(b []byte) (int, error) { return f(b) }
