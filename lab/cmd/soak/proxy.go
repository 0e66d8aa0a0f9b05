// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/hostile"
)

// memoryLimit is what the shipped manifest sets.
const memoryLimit = 350 << 20

// unprivileged runs a program without capabilities, as the shipped manifest does. With them,
// Tailscale's node has the kernel keep 7 MiB of packets that it has not read yet, rather than
// what net.core.rmem_max allows (208 KiB by default), and each of them takes 64 KiB once it is
// read.
var unprivileged = []string{"setpriv", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"}

// startTimeout is how long the proxy may take to join the tailnet.
const startTimeout = time.Minute

// caddyfile is the Caddyfile of the proxy: that of the examples, with every option on
// that an attack could use.
func caddyfile(l *lab.Lab, socket string) string {
	globals := strings.Replace(l.Globals(l.ProxyKey()), "max_header_size 1MiB", "max_header_size 32KiB", 1)
	globals = strings.Replace(globals, "admin off", "admin unix/"+socket, 1)
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

// proxy is the running process of the proxy: Caddy's own command, with the stand-in for
// caddy-tailscale.
type proxy struct {
	dir, log string
	admin    *http.Client
	cmd      *exec.Cmd
}

func startProxy(ctx context.Context, l *lab.Lab, program string) (*proxy, error) {
	// In a folder with a short name: the path of a socket has at most 107 bytes.
	sockets, err := os.MkdirTemp("", "soak-")
	if err != nil {
		return nil, err
	}
	socket, path := filepath.Join(sockets, "admin"), filepath.Join(l.Dir, "Caddyfile")
	if err := os.WriteFile(path, []byte(caddyfile(l, socket)), 0o600); err != nil {
		return nil, err
	}
	p := &proxy{
		dir: l.Dir, log: l.Log("caddy"),
		admin: &http.Client{Timeout: answerTimeout, Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", socket)
			},
		}},
		cmd: exec.CommandContext(ctx, unprivileged[0], append(unprivileged[1:], program, "run", "--config", path, "--adapter", "caddyfile")...),
	}
	stderr, err := os.Create(l.Log("proxy"))
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	p.cmd.Stderr = stderr
	p.cmd.Env = append(os.Environ(), "GOMEMLIMIT="+strconv.Itoa(memoryLimit), "TS_NO_LOGS_NO_SUPPORT=true")
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	context.AfterFunc(ctx, func() { _ = os.RemoveAll(sockets) })
	return p, nil
}

// wait waits until the proxy's site answers a caller.
func (p *proxy) wait(ctx context.Context, l *lab.Lab, c hostile.Dialer) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		conn, err := hostile.TLS(ctx, c, "http/1.1")
		if err == nil {
			return conn.Close()
		}
		if !sleep(ctx, 100*time.Millisecond) {
			return fmt.Errorf("the proxy does not answer: %w (logs: %s, %s)", err, p.log, l.Log("proxy"))
		}
	}
}

// stop ends the process.
func (p *proxy) stop() error {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	kill := time.AfterFunc(30*time.Second, func() { _ = p.cmd.Process.Kill() })
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
	if u.goroutines, err = p.goroutines(); err != nil {
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

// goroutines returns how many goroutines the process has, from Caddy's own metrics.
func (p *proxy) goroutines() (int, error) {
	resp, err := p.admin.Get("http://caddy/metrics")
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	const name = "go_goroutines "
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), name); ok {
			return strconv.Atoi(value)
		}
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	return 0, fmt.Errorf("caddy has no metric %s", name)
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
