// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	"tailscale.com/tsnet"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// handler runs the Go benchmark of the handler.
func (b *bench) handler(ctx context.Context, r *report) error {
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^BenchmarkHandler$", "-count", strconv.Itoa(b.rounds), ".")
	cmd.Dir = b.root
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("go test: %w\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		// BenchmarkHandler/hit-2  1000000  1044 ns/op  480 B/op  4 allocs/op
		f := strings.Fields(line)
		if len(f) < 8 || !strings.HasPrefix(f[0], "BenchmarkHandler/") {
			continue
		}
		name, _, _ := strings.Cut(strings.TrimPrefix(f[0], "BenchmarkHandler/"), "-")
		for i, unit := range []string{"ns", "B", "allocs"} {
			value, err := strconv.ParseFloat(f[2+2*i], 64)
			if err != nil {
				return fmt.Errorf("%q: %w", line, err)
			}
			key := name + " " + unit
			r.handler[key] = append(r.handler[key], value)
		}
	}
	if len(r.handler) == 0 {
		return fmt.Errorf("go test printed no result:\n%s", out)
	}
	return nil
}

// load compares small answers through targets, for the goals of a measurement.
func (b *bench) load(ctx context.Context, r *report, l load) error {
	samples := make(map[string][]sample)
	r.loads[l.key] = samples
	err := b.compare(comparison{
		targets: l.targets,
		measure: func(t target, warmUp bool) (sample, error) {
			d := b.slice
			if warmUp {
				d /= 4
			}
			return t.load(ctx, small, l.key.callers, d)
		},
		samples: samples,
		decided: func() bool { return r.decided(l.key.String()) },
	})
	if err == nil {
		fmt.Printf("  %v: %d rounds\n", l.key, len(samples[plugin]))
	}
	return err
}

// load is what load compares.
type load struct {
	key     loadKey
	targets []target
}

// gets measures small answers on connections that are kept, with increasing numbers of
// concurrent callers.
func (b *bench) gets(ctx context.Context, r *report) error {
	return b.withProxies(ctx, b.answers, func(proxies []*proxy) error {
		for _, callers := range concurrencies {
			targets, err := b.targets(proxies, b.answers)
			if err != nil {
				return err
			}
			for i := range targets {
				targets[i] = targets[i].keepAlive()
			}
			if err := b.load(ctx, r, load{loadKey{kept, callers}, targets}); err != nil {
				return err
			}
		}
		return nil
	})
}

// connects measures small answers with a new connection for each, as each kubectl command
// opens one.
func (b *bench) connects(ctx context.Context, r *report) error {
	return b.withProxies(ctx, b.answers, func(proxies []*proxy) error {
		plain, err := b.targets(proxies, b.answers)
		if err != nil {
			return err
		}
		var encrypted []target
		for _, p := range proxies {
			if p.kind != official { // the lab has no authority that would issue a certificate to it
				encrypted = append(encrypted, overTLS(p, b.lab.Callers["alice"].Server))
			}
		}
		encrypted = append(encrypted, plain[len(plain)-1]) // no proxy
		for _, callers := range concurrencies {
			for _, l := range []load{{loadKey{newTLS, callers}, encrypted}, {loadKey{newPlain, callers}, plain}} {
				if err := b.load(ctx, r, l); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// commands is how many kubectl commands a round has.
const commands = 5

// kubectls measures whole commands: kubectl get of one object of the API server, with what
// kubectl has cached about its API.
func (b *bench) kubectls(ctx context.Context, r *report) error {
	return b.withProxies(ctx, b.apiServer, func(proxies []*proxy) error {
		targets := []target{{kind: direct}}
		kubeconfigs := map[string]string{direct: b.lab.AdminKubeconfig()}
		for _, p := range proxies {
			targets = append(targets, target{kind: p.kind, proxy: p})
			var err error
			if kubeconfigs[p.kind], err = b.kubeconfig(p); err != nil {
				return err
			}
		}
		return b.compare(comparison{
			targets: targets,
			measure: func(t target, _ bool) (sample, error) {
				return t.measure(func(took *latencies) error {
					for range commands {
						cmd, err := lab.Kubectl(ctx, kubeconfigs[t.kind], "get", "configmap", "small")
						if err != nil {
							return err
						}
						began := time.Now()
						if out, err := cmd.CombinedOutput(); err != nil {
							return fmt.Errorf("%w: %s", err, out)
						}
						*took = append(*took, time.Since(began))
					}
					return nil
				})
			},
			samples: r.kubectl,
			decided: func() bool { return r.decided("kubectl") },
		})
	})
}

// kubeconfig writes a kubeconfig with which kubectl calls a proxy as alice: over TLS where
// the proxy has a certificate.
func (b *bench) kubeconfig(p *proxy) (path string, err error) {
	path = filepath.Join(b.dir, nodeNames[p.kind]+".kubeconfig")
	if err := b.lab.Callers["alice"].WriteKubeconfig(path, "http://"+p.Address); err != nil || p.kind == official {
		return path, err
	}
	config, err := clientcmd.LoadFromFile(path)
	if err != nil {
		return "", err
	}
	for _, cluster := range config.Clusters {
		cluster.Server = "https://" + p.Address
		cluster.TLSServerName = nodeNames[p.kind] + "." + lab.Domain
		cluster.InsecureSkipTLSVerify = true // WireGuard authenticates the server
	}
	return path, clientcmd.WriteToFile(*config, path)
}

// withProxies calls f with one proxy of each kind to u.
func (b *bench) withProxies(ctx context.Context, u *upstream, f func([]*proxy) error) error {
	proxies, stop, err := b.startAll(ctx, u)
	if err != nil {
		return err
	}
	return errors.Join(f(proxies), stop())
}

// targets returns the proxies, over plain HTTP, and their upstream as targets.
func (b *bench) targets(proxies []*proxy, u *upstream) ([]target, error) {
	var targets []target
	for _, p := range proxies {
		targets = append(targets, through(p, b.lab.Callers["alice"].Server))
	}
	t, err := without(u)
	return append(targets, t), err
}

// lists measures answers of 5 MB, one at a time.
func (b *bench) lists(ctx context.Context, r *report) error {
	return b.withProxies(ctx, b.apiServer, func(proxies []*proxy) error {
		targets, err := b.targets(proxies, b.apiServer)
		if err != nil {
			return err
		}
		for i := range targets {
			targets[i] = targets[i].keepAlive()
		}
		return b.compare(comparison{
			targets: targets,
			measure: func(t target, _ bool) (sample, error) {
				return t.measure(func(took *latencies) error {
					for range 4 {
						began := time.Now()
						if err := t.get(ctx, large); err != nil {
							return err
						}
						*took = append(*took, time.Since(began))
					}
					return nil
				})
			},
			samples: r.lists,
			decided: func() bool { return r.decided("list") },
		})
	})
}

// watched is what each of a thousand watches costs a proxy.
type watched struct {
	memory     float64 // resident, in bytes
	stacks     float64 // at most that much of it is goroutine stacks, in bytes
	goroutines float64
	// down and up are the numbers of connections of all watches together.
	down, up int
}

// watches measures a thousand idle watches of one client, on newly started proxies.
func (b *bench) watches(ctx context.Context, r *report) error {
	for range watchRounds {
		for _, kind := range []string{bare, plugin, official} {
			w, err := b.watchesOn(ctx, kind)
			if err != nil {
				return fmt.Errorf("%s: %w", kind, err)
			}
			r.watches[kind] = append(r.watches[kind], w)
		}
	}
	return nil
}

func (b *bench) watchesOn(ctx context.Context, kind string) (w watched, err error) {
	p, err := b.start(ctx, kind, b.apiServer)
	if err != nil {
		return watched{}, err
	}
	defer func() { err = errors.Join(err, p.stop()) }()
	// As clients do: HTTP/2 where the proxy offers it.
	var dials atomic.Int32
	base := "https://" + nodeNames[kind] + "." + lab.Domain
	if kind == official {
		base = "http://" + p.Address
	}
	transport := &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			dials.Add(1)
			// Dial the address: earlier nodes had the same name.
			_, port, err := net.SplitHostPort(address)
			if err != nil {
				return nil, err
			}
			return lab.Dial(ctx, b.lab.Callers["alice"].Server, network, net.JoinHostPort(p.Address, port))
		},
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, // WireGuard authenticates the server
		ForceAttemptHTTP2: true,
	}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	client := &http.Client{Transport: transport}

	t := target{kind: kind, proxy: p, base: base, client: client}
	if err := t.get(ctx, small); err != nil { // the first request's setup is not a cost of watches
		return watched{}, err
	}
	before, err := p.memory()
	if err != nil {
		return watched{}, err
	}
	const n = 1000
	var opening sync.WaitGroup
	failed := make(chan error, n)
	slots := make(chan struct{}, 2) // with more, the client dials needlessly
	for range n {
		opening.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+watch+b.version, nil)
			if err != nil {
				failed <- err
				return
			}
			resp, err := client.Do(req) //nolint:bodyclose // closed by its reader
			if err != nil {
				failed <- err
				return
			}
			if resp.StatusCode != http.StatusOK {
				failed <- errors.New(resp.Status)
			}
			go func() { // reads until the measurement ends
				_, _ = io.Copy(io.Discard, resp.Body)
				_ = resp.Body.Close()
			}()
		})
	}
	opening.Wait()
	select {
	case err := <-failed:
		return watched{}, err
	default:
	}
	after, err := p.memory()
	if err != nil {
		return watched{}, err
	}
	up, err := connections(p.cmd.Process.Pid, b.lab.Cluster.Host())
	return watched{
		memory:     float64(after.resident-before.resident) / n,
		stacks:     float64(after.Stacks-before.Stacks) / n,
		goroutines: float64(after.Goroutines-before.Goroutines) / n,
		down:       int(dials.Load()), up: up,
	}, err
}

// connections counts the TCP connections of a process to a server.
func connections(pid int, server string) (n int, err error) {
	_, port, err := net.SplitHostPort(strings.TrimPrefix(strings.TrimPrefix(server, "https://"), "http://"))
	if err != nil {
		return 0, err
	}
	number, err := strconv.Atoi(port)
	if err != nil {
		return 0, err
	}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		return 0, err
	}
	sockets := make(map[string]bool)
	for _, fd := range fds {
		if link, err := os.Readlink(fd); err == nil { // it may have been closed
			sockets[link] = true
		}
	}
	for _, table := range []string{"tcp", "tcp6"} {
		content, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, table))
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(string(content)) {
			// sl local_address rem_address st ... inode
			f := strings.Fields(line)
			if len(f) > 9 && strings.HasSuffix(f[2], fmt.Sprintf(":%04X", number)) && f[3] == "01" && sockets["socket:["+f[9]+"]"] {
				n++
			}
		}
	}
	return n, nil
}

// streams measures the throughput of kubectl exec and kubectl cp.
func (b *bench) streams(ctx context.Context, r *report) (err error) {
	proxies, stop, err := b.startAll(ctx, b.apiServer)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	kubeconfigs := map[string]string{direct: b.lab.AdminKubeconfig()}
	kinds := []string{direct}
	for _, p := range proxies {
		path := filepath.Join(b.dir, nodeNames[p.kind]+".kubeconfig")
		if err := b.lab.Callers["alice"].WriteKubeconfig(path, "http://"+p.Address); err != nil {
			return err
		}
		kubeconfigs[p.kind] = path
		kinds = append(kinds, p.kind)
	}
	payload := filepath.Join(b.dir, "payload")
	if err := os.WriteFile(payload, bytes.Repeat([]byte("0123456789abcdef"), streamSize/16), 0o600); err != nil {
		return err
	}
	for round := range streamRounds {
		for i := range kinds {
			kind := kinds[(round+i)%len(kinds)]
			for what, run := range map[string]func(context.Context, string, string) error{"exec": pipe, "cp": cp} {
				began := time.Now()
				if err := run(ctx, kubeconfigs[kind], payload); err != nil {
					return fmt.Errorf("%s through %s: %w", what, kind, err)
				}
				key := what + " " + kind
				r.streams[key] = append(r.streams[key], streamSize/1e6/time.Since(began).Seconds())
			}
		}
	}
	return nil
}

// pipe sends the payload to cat in the pod and reads all of it back. The command
// then sleeps until it is killed: when a command ends, Kubernetes drops output that
// was not read.
func pipe(ctx context.Context, kubeconfig, payload string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	cmd, err := lab.Kubectl(ctx, kubeconfig, "exec", "-i", lab.Pod, "--", "sh", "-c", "cat; sleep 600")
	if err != nil {
		return err
	}
	in, err := os.Open(payload)
	if err != nil {
		return err
	}
	defer in.Close()
	cmd.Stdin = in
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	n, err := io.CopyN(io.Discard, stdout, streamSize)
	cancel()
	_ = cmd.Wait() // it was killed
	if err != nil {
		return fmt.Errorf("%d bytes came back: %w", n, err)
	}
	return nil
}

// cp copies the payload into the pod.
func cp(ctx context.Context, kubeconfig, payload string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	cmd, err := lab.Kubectl(ctx, kubeconfig, "cp", payload, "default/"+lab.Pod+":"+payload+".copy")
	if err != nil {
		return err
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	info, err := os.Stat(payload + ".copy") // the lab's pods use the host's files
	if err == nil && info.Size() != streamSize {
		err = fmt.Errorf("%d bytes arrived", info.Size())
	}
	return err
}

// peers measures a small answer on tailnets of increasing size, where each peer has
// a grant of its own: first the plugin and the bare proxy on all of them in turn,
// then the plugin and Tailscale's proxy on one tailnet after another, as Tailscale's
// proxy listens on port 80 of localhost and so can run only once per machine.
func (b *bench) peers(ctx context.Context, r *report) error {
	measure := func(t target, _ bool) (sample, error) { return t.load(ctx, small, 16, b.slice) }
	var tailnets []*tailnet
	var plugins, all []target
	for _, n := range peerCounts {
		tn, err := b.tailnetOf(ctx, n)
		if err != nil {
			return fmt.Errorf("%d peers: %w", n, err)
		}
		defer tn.stop()
		tailnets = append(tailnets, tn)
		for _, kind := range []string{plugin, bare} {
			t, err := tn.start(ctx, kind)
			if err != nil {
				return fmt.Errorf("%d peers: %w", n, err)
			}
			if kind == plugin {
				plugins = append(plugins, t)
			}
			t.kind = on(kind, n)
			all = append(all, t)
		}
	}
	if err := b.compare(comparison{all, measure, r.growth, func() bool { return r.decided("peers") }}); err != nil {
		return err
	}
	for i, n := range peerCounts {
		other, err := tailnets[i].start(ctx, official)
		if err != nil {
			return fmt.Errorf("%d peers: %w", n, err)
		}
		r.peers[n] = make(map[string][]sample)
		if err := b.compare(comparison{[]target{plugins[i], other}, measure, r.peers[n], func() bool { return true }}); err != nil {
			return err
		}
		if err := other.proxy.stop(); err != nil {
			return err
		}
	}
	return nil
}

// on names a proxy on a tailnet of n peers.
func on(kind string, n int) string { return fmt.Sprintf("%s, %d peers", kind, n) }

// tailnet is a made-up tailnet of Tailscale's control server for tests.
type tailnet struct {
	bench   *bench
	control *control
	caller  *tsnet.Server
	proxies []*proxy
}

// tailnetOf starts a tailnet of n peers.
func (b *bench) tailnetOf(ctx context.Context, n int) (*tailnet, error) {
	tn := &tailnet{bench: b, control: startControl(n, b.lab.Headscale.DERPMap())}
	discard := func(string, ...any) {}
	dir, err := os.MkdirTemp(b.dir, "caller-")
	if err != nil {
		tn.stop()
		return nil, err
	}
	tn.caller = &tsnet.Server{Hostname: "caller", Dir: dir, ControlURL: tn.control.url(), Logf: discard, UserLogf: discard}
	if _, err := tn.caller.Up(ctx); err != nil {
		tn.stop()
		return nil, err
	}
	ip4, _ := tn.caller.TailscaleIPs()
	tn.control.grant(ip4)
	return tn, nil
}

// start starts a proxy on the tailnet and waits until it answers.
func (tn *tailnet) start(ctx context.Context, kind string) (target, error) {
	p, err := tn.bench.startOn(kind, tn.bench.answers, tn.control.url(), "any-will-do")
	if err != nil {
		return target{}, err
	}
	tn.proxies = append(tn.proxies, p)
	t := through(p, tn.caller).keepAlive()
	// Wait until the node knows the caller and its grants.
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		if err = t.get(ctx, small); err == nil || ctx.Err() != nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	return t, err
}

// stop stops everything on the tailnet that still runs.
func (tn *tailnet) stop() {
	for _, p := range tn.proxies {
		_ = p.stop() // it may have stopped already
	}
	if tn.caller != nil {
		_ = tn.caller.Close()
	}
	tn.control.stop()
}
