// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
)

// component is a process that envtest starts. envtest alone cannot be interrupted
// while it waits for a process to start, and its processes outlive a lab that is
// killed. So envtest is given a shell script in place of the binary. The script
// records the process ID and, where setpriv exists (usually on Linux), makes the
// kernel kill the process along with its parent.
type component struct {
	name    string
	wrapper string // the script
	pidFile string
	log     *os.File
	ended   chan struct{} // closed by release
}

// newComponent returns the component whose binary has the given name. Its files go
// to dir.
func newComponent(name, assets, dir string) (*component, error) {
	var binary string
	var err error
	if assets != "" && os.Getenv(components.EnvKubernetes) == "" {
		binary, err = components.In(assets, name)
	} else {
		binary, err = components.Path(name)
	}
	if err != nil {
		return nil, err
	}
	c := &component{
		name:    name,
		wrapper: filepath.Join(dir, certsDir, name+".sh"),
		pidFile: filepath.Join(dir, certsDir, name+".pid"),
		ended:   make(chan struct{}),
	}
	run := "exec"
	if setpriv, err := exec.LookPath("setpriv"); err == nil && runtime.GOOS == "linux" {
		run = "exec " + quote(setpriv) + " --pdeathsig KILL --"
	}
	// envtest also runs the binary to list its flags: do not record that process.
	// The process ID is recorded last, so a reader knows that the process dies with
	// its parent.
	script := fmt.Sprintf("#!/bin/sh\n[ \"$1\" = --help ] && exec %[3]s \"$@\"\n%[1]s /bin/sh -c 'echo $$ > \"$0\"; exec \"$@\"' %[2]s %[3]s \"$@\"\n",
		run, quote(c.pidFile), quote(binary))
	if err := os.WriteFile(c.wrapper, []byte(script), 0o700); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	c.log, err = os.OpenFile(filepath.Join(dir, name+".log"), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return c, nil
}

// start calls run, which starts the component and waits until it answers. If ctx
// ends first, start kills the component.
func (c *component) start(ctx context.Context, run func() error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", c.name, context.Cause(ctx))
	}
	var err error // result of run; set before ready is closed
	ready := make(chan struct{})
	go func() {
		// The kernel considers the thread that forked the parent, not the process.
		// So this goroutine keeps its thread as long as the component runs.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err = run()
		close(ready)
		<-c.ended
	}()
	select {
	case <-ready:
		if err != nil {
			return fmt.Errorf("%s: %w: %s (log: %s)", c.name, err, c.lastLogLine(), c.log.Name())
		}
		return nil
	case <-ctx.Done():
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		c.kill() // does nothing until the process has started
		select {
		case <-ready:
			return fmt.Errorf("%s: %w (log: %s)", c.name, context.Cause(ctx), c.log.Name())
		case <-tick.C:
		}
	}
}

// kill kills the process, if there is one.
func (c *component) kill() {
	if pid := c.pid(); pid > 1 {
		_ = syscall.Kill(-pid, syscall.SIGKILL) // fails if the process has ended
	}
}

// pid returns the ID of the process, which is also that of its process group, or 0
// if it has not been started.
func (c *component) pid() int {
	b, err := os.ReadFile(c.pidFile)
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0 // the script has not finished writing it
	}
	return pid
}

// release frees what the running process needs. Call it only after envtest has
// stopped the process.
func (c *component) release() error {
	close(c.ended)
	if err := c.log.Close(); err != nil && !errors.Is(err, fs.ErrClosed) {
		return fmt.Errorf("%s: %w", c.name, err)
	}
	return nil
}

// lastLogLine returns the last line that the component has logged, which usually
// says why it ended.
func (c *component) lastLogLine() string {
	log, err := os.ReadFile(c.log.Name())
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(log)), "\n")
	return lines[len(lines)-1]
}

// quote quotes s for the shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
