// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/process"
)

// podKey names a pod.
type podKey struct{ namespace, name string }

// String returns namespace/name.
func (k podKey) String() string { return k.namespace + "/" + k.name }

// pod is a running pod.
type pod struct {
	dir       string // its working directory
	name      string
	container string
	logs      *logFile
	process   *process.Process // nil until started

	ctx    context.Context // ends with the pod
	cancel context.CancelFunc

	workMu  sync.Mutex
	stopped bool
	work    sync.WaitGroup // copying its output, and commands in it

	stdinMu sync.Mutex // one write at a time
	stdin   *os.File
}

// startPod starts a pod in the folder dir.
func startPod(dir, name, container string, command []string) (_ *pod, err error) {
	if len(command) == 0 {
		return nil, errors.New("no command")
	}
	p := &pod{dir: filepath.Join(dir, "root"), name: name, container: container}
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return nil, err
	}
	if p.logs, err = newLogFile(filepath.Join(dir, container+".log")); err != nil {
		return nil, err
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	if err := p.start(command); err != nil {
		p.stop()
		return nil, err
	}
	return p, nil
}

// start starts the process of the pod's container.
func (p *pod) start(command []string) error {
	// Standard input stays open even if no client ever attaches to it, as for a
	// container with "stdin: true".
	stdin, stdinWriter, err := os.Pipe()
	if err != nil {
		return err
	}
	defer stdin.Close()
	p.stdin = stdinWriter
	output, outputWriter, err := os.Pipe()
	if err != nil {
		return err
	}
	defer outputWriter.Close()

	cmd := p.command(command)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, outputWriter, outputWriter
	if p.process, err = process.Start(cmd); err != nil {
		return errors.Join(err, output.Close())
	}
	p.work.Go(func() { // no other goroutine knows the pod yet
		defer output.Close()
		if _, err := io.Copy(p.logs, output); err != nil {
			// The pipe would have no reader any more: end the process, like a
			// container whose disk is full, and log the reason.
			p.logs.end(fmt.Errorf("write log: %w", err))
			p.process.Kill()
		}
		<-p.process.Done()
		p.logs.end(nil)
	})
	return nil
}

// command returns a command that runs in the pod. It does not inherit the lab's
// environment, which may hold keys.
func (p *pod) command(command []string) *exec.Cmd {
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Dir = p.dir
	cmd.Env = []string{
		"HOME=" + p.dir,
		"HOSTNAME=" + p.name,
		"PATH=" + os.Getenv("PATH"),
	}
	return cmd
}

// write writes to the standard input of the container.
func (p *pod) write(b []byte) (int, error) {
	p.stdinMu.Lock()
	defer p.stdinMu.Unlock()
	return p.stdin.Write(b)
}

// begin reports whether work that stop has to wait for may begin. If so, call
// work.Done at its end.
func (p *pod) begin() bool {
	p.workMu.Lock()
	defer p.workMu.Unlock()
	if !p.stopped {
		p.work.Add(1)
	}
	return !p.stopped
}

// stop kills everything that runs in the pod and waits until it has ended.
func (p *pod) stop() {
	p.workMu.Lock()
	p.stopped = true
	p.workMu.Unlock()
	p.cancel()
	if p.process != nil {
		p.process.Kill()
	}
	if p.stdin != nil {
		_ = p.stdin.Close() // it has no reader any more
	}
	p.work.Wait()
	p.logs.close()
}
