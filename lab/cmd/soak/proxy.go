// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/standin"
)

// memoryLimit is what the shipped manifest sets.
const memoryLimit = 350 << 20

// startTimeout is how long the proxy may take to join the tailnet.
const startTimeout = time.Minute

// caddyfile is the Caddyfile of the proxy: that of the examples, with every option on
// that an attack could use.
func caddyfile(l *lab.Lab) string {
	globals := strings.Replace(l.Globals(l.ProxyKey()), "max_header_size 1MiB", "max_header_size 32KiB", 1)
	return globals + fmt.Sprintf(`
https://%[1]s.%[2]s {
	bind tailscale/%[1]s
	tls internal
	tailscale_kubernetes {
		kubeconfig %[3]s
		client_impersonation authorize
		record %[4]s
		whoami
	}
}
`, lab.ProxyName, lab.Domain, l.Kubeconfig(), recordings(l.Dir))
}

func recordings(dir string) string { return filepath.Join(dir, "recordings") }

// serveProxy runs in the proxy's process. For each line on standard input, it prints how
// many goroutines it has.
func serveProxy(path string) error {
	if err := os.Setenv("TS_NO_LOGS_NO_SUPPORT", "true"); err != nil {
		return err
	}
	log.SetOutput(io.Discard)
	config, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	adapted, err := lab.Adapt(string(config))
	if err != nil {
		return err
	}
	if err := caddy.Load(adapted, true); err != nil {
		return err
	}
	node, ok := standin.Node(lab.ProxyName)
	if !ok {
		return fmt.Errorf("caddy has no tailnet node %q", lab.ProxyName)
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if _, err := node.Up(ctx); err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	for in := bufio.NewScanner(os.Stdin); ; {
		if err := out.Encode(runtime.NumGoroutine()); err != nil {
			return err
		}
		if !in.Scan() {
			return nil // the soak is over
		}
	}
}

// proxy is the running process of the proxy.
type proxy struct {
	dir string
	log string
	cmd *exec.Cmd

	mu  sync.Mutex // held from a question to its answer
	in  io.WriteCloser
	out *json.Decoder
}

func startProxy(ctx context.Context, l *lab.Lab) (_ *proxy, err error) {
	path := filepath.Join(l.Dir, "Caddyfile")
	if err := os.WriteFile(path, []byte(caddyfile(l)), 0o600); err != nil {
		return nil, err
	}
	p := &proxy{dir: l.Dir, log: l.Log("caddy"), cmd: exec.CommandContext(ctx, "/proc/self/exe", "proxy", path)}
	stderr, err := os.Create(l.Log("proxy"))
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	p.cmd.Stderr = stderr
	p.cmd.Env = append(os.Environ(), "GOMEMLIMIT="+strconv.Itoa(memoryLimit))
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = json.NewDecoder(stdout)
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	var goroutines int
	if err := p.out.Decode(&goroutines); err != nil {
		return nil, errors.Join(fmt.Errorf("the proxy does not start: %w (log: %s)", err, l.Log("proxy")), p.stop())
	}
	return p, nil
}

// stop ends the process.
func (p *proxy) stop() error {
	_ = p.in.Close()
	kill := time.AfterFunc(10*time.Second, func() { _ = p.cmd.Process.Kill() })
	defer kill.Stop()
	return p.cmd.Wait()
}

// usage is what the process uses.
type usage struct {
	resident   int64 // the most memory it ever had, in bytes
	files      int
	goroutines int
	disk, log  int64 // bytes of recordings and of the log
}

func (u usage) max(v usage) usage {
	return usage{max(u.resident, v.resident), max(u.files, v.files), max(u.goroutines, v.goroutines), max(u.disk, v.disk), max(u.log, v.log)}
}

// peak returns the most that the process uses until ctx is done.
func (p *proxy) peak(ctx context.Context, u usage) usage {
	for sleep(ctx, 2*time.Second) {
		if now, err := p.usage(); err == nil { // if not, the last question fails, too
			u = u.max(now)
		}
	}
	return u
}

// usage returns what the process uses now.
func (p *proxy) usage() (u usage, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, err := io.WriteString(p.in, "\n"); err != nil {
		return usage{}, err
	}
	if err := p.out.Decode(&u.goroutines); err != nil {
		return usage{}, err
	}
	process := filepath.Join("/proc", strconv.Itoa(p.cmd.Process.Pid))
	files, err := os.ReadDir(filepath.Join(process, "fd"))
	if err != nil {
		return usage{}, err
	}
	u.files = len(files)
	if u.disk, err = size(recordings(p.dir)); err != nil {
		return usage{}, err
	}
	if u.log, err = size(p.log); err != nil {
		return usage{}, err
	}
	status, err := os.ReadFile(filepath.Join(process, "status"))
	if err != nil {
		return usage{}, err
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kB, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 64)
			u.resident = kB << 10
			return u, err
		}
	}
	return usage{}, fmt.Errorf("%s/status has no VmHWM", process)
}

// size returns the size of a file, or of all files in a folder. What is not there has
// none.
func size(path string) (n int64, err error) {
	err = filepath.WalkDir(path, func(_ string, entry fs.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() {
			var info fs.FileInfo
			if info, err = entry.Info(); err == nil {
				n += info.Size()
			}
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed meanwhile
		}
		return err
	})
	return n, err
}
