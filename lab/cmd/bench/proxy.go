// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/clientcmd"
	"tailscale.com/ipn"
	apiproxy "tailscale.com/k8s-operator/api-proxy"
	"tailscale.com/kube/kubetypes"
	"tailscale.com/tsnet"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/standin"
)

// spec says what a proxy's process runs. The process reads it from standard input.
type spec struct {
	Name       string // of the tailnet node
	ControlURL string
	AuthKey    string
	Dir        string
	// Caddyfile is what Caddy runs. If it is empty, Tailscale's proxy runs instead,
	// with Kubeconfig.
	Caddyfile  string
	Kubeconfig string
	// Profile is the file for a CPU profile, empty for none.
	Profile string
}

// up is what a proxy's process prints when it serves.
type up struct{ Address string }

// usage is what a proxy's process uses. The process reports the exported fields when
// asked; the operating system knows the rest.
type usage struct {
	Goroutines int
	Stacks     int64 // the memory of their stacks, in bytes
	resident   int64 // memory, in bytes
}

// serveProxy runs in a proxy's process: one tailnet node, and nothing else.
func serveProxy() error {
	in := json.NewDecoder(os.Stdin)
	var s spec
	if err := in.Decode(&s); err != nil {
		return err
	}
	if err := os.Setenv("TS_NO_LOGS_NO_SUPPORT", "true"); err != nil {
		return err
	}
	log.SetOutput(io.Discard)
	if s.Profile != "" {
		file, err := os.Create(s.Profile)
		if err != nil {
			return err
		}
		defer file.Close()
		if err := pprof.StartCPUProfile(file); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var node *tsnet.Server
	var err error
	if s.Caddyfile != "" {
		node, err = serveCaddy(ctx, s)
	} else {
		node, err = serveOfficial(ctx, s)
	}
	if err != nil {
		return err
	}
	ip4, _ := node.TailscaleIPs()
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode(up{ip4.String()}); err != nil {
		return err
	}
	for {
		var question struct{}
		if err := in.Decode(&question); err != nil {
			return nil // the bench is done
		}
		// Do not count garbage.
		runtime.GC()
		debug.FreeOSMemory()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		if err := out.Encode(usage{Goroutines: runtime.NumGoroutine(), Stacks: int64(m.StackInuse)}); err != nil { //nolint:gosec // far from 2^63
			return err
		}
	}
}

func serveCaddy(ctx context.Context, s spec) (*tsnet.Server, error) {
	adapted, err := lab.Adapt(s.Caddyfile)
	if err != nil {
		return nil, err
	}
	if err := caddy.Load(adapted, true); err != nil {
		return nil, err
	}
	node, ok := standin.Node(s.Name)
	if !ok {
		return nil, fmt.Errorf("caddy has no tailnet node %q", s.Name)
	}
	_, err = node.Up(ctx)
	return node, err
}

// serveOfficial runs the API server proxy of Tailscale's Kubernetes operator as its
// k8s-proxy does: the node's serve config forwards connections to it with the PROXY
// protocol. Only the port differs, and TLS is missing, as the lab has no authority
// that would issue a certificate.
func serveOfficial(ctx context.Context, s spec) (*tsnet.Server, error) {
	discard := func(string, ...any) {}
	node := &tsnet.Server{Hostname: s.Name, Dir: s.Dir, ControlURL: s.ControlURL, AuthKey: s.AuthKey, Logf: discard, UserLogf: discard}
	if _, err := node.Up(ctx); err != nil {
		return nil, err
	}
	lc, err := node.LocalClient()
	if err != nil {
		return nil, err
	}
	if err := lc.SetServeConfig(ctx, &ipn.ServeConfig{TCP: map[uint16]*ipn.TCPPortHandler{
		80: {TCPForward: "localhost:80", ProxyProtocol: 2},
	}}); err != nil {
		return nil, err
	}
	config, err := clientcmd.BuildConfigFromFlags("", s.Kubeconfig)
	if err != nil {
		return nil, err
	}
	proxy, err := apiproxy.NewAPIServerProxy(zap.NewNop().Sugar(), config, node, kubetypes.APIServerProxyModeAuth, false)
	if err != nil {
		return nil, err
	}
	go func() {
		if err := proxy.Run(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}()
	return node, nil
}

// proxy is a running proxy process.
type proxy struct {
	kind    string
	Address string // of its tailnet node

	cmd   *exec.Cmd
	stdin io.WriteCloser
	in    *json.Encoder
	out   *json.Decoder
}

// startProxy runs a proxy in a new process and waits until it is on the tailnet.
func startProxy(kind string, s spec, log string) (_ *proxy, err error) {
	p := &proxy{kind: kind, cmd: exec.Command("/proc/self/exe", "proxy")}
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return nil, err
	}
	stderr, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	p.cmd.Stderr = stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	p.in, p.out = json.NewEncoder(p.stdin), json.NewDecoder(stdout)
	if err := p.in.Encode(s); err != nil { //nolint:gosec // a key for a tailnet that ends with the bench, sent to our own process
		return nil, errors.Join(err, p.stop())
	}
	var u up
	if err := p.out.Decode(&u); err != nil {
		return nil, errors.Join(fmt.Errorf("%s does not start: %w (log: %s)", kind, err, log), p.stop())
	}
	p.Address = u.Address
	return p, nil
}

// stop stops the process.
func (p *proxy) stop() error {
	_ = p.stdin.Close()
	done := make(chan error, 1)
	go func() { done <- p.cmd.Wait() }()
	select {
	case err := <-done:
		return err
	case <-time.After(10 * time.Second):
		_ = p.cmd.Process.Kill()
		return errors.Join(fmt.Errorf("%s had to be killed", p.kind), <-done)
	}
}

// cpu returns the CPU time that the process has used, as counted by the operating
// system.
func (p *proxy) cpu() (time.Duration, error) {
	var ts unix.Timespec
	// The clock of a process: see clock_getcpuclockid(3).
	clock := int32(^p.cmd.Process.Pid<<3 | 2) //nolint:gosec // process IDs have 22 bits at most
	if err := unix.ClockGettime(clock, &ts); err != nil {
		return 0, fmt.Errorf("CPU time of %s: %w", p.kind, err)
	}
	return time.Duration(ts.Nano()), nil
}

// memory returns what the process uses now.
func (p *proxy) memory() (u usage, err error) {
	if err := p.in.Encode(struct{}{}); err != nil {
		return usage{}, err
	}
	if err := p.out.Decode(&u); err != nil {
		return usage{}, err
	}
	status, err := os.Open(filepath.Join("/proc", strconv.Itoa(p.cmd.Process.Pid), "status"))
	if err != nil {
		return usage{}, err
	}
	defer status.Close()
	for scanner := bufio.NewScanner(status); scanner.Scan(); {
		if value, ok := strings.CutPrefix(scanner.Text(), "VmRSS:"); ok {
			kB, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(value, "kB")), 10, 64)
			u.resident = kB << 10
			return u, err
		}
	}
	return usage{}, fmt.Errorf("%s has no VmRSS", status.Name())
}
