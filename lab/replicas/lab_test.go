// SPDX-License-Identifier: Apache-2.0

package replicas

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
	"tailscale.com/client/local"
	"tailscale.com/ipn"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/netns"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/process"
)

// ownCaddy is the environment variable that makes the test's binary a Caddy.
const ownCaddy = "LAB_REPLICAS_CADDY"

var long = flag.Bool("long", false, "run the tests, which take minutes")

func TestMain(m *testing.M) {
	if os.Getenv(ownCaddy) != "" {
		caddycmd.Main()
		return
	}
	flag.Parse()
	os.Exit(m.Run())
}

// inNamespace runs test in a network namespace of its own, with an /etc of its own:
// tailscaled writes the DNS settings of the machine.
func inNamespace(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	if netns.Inside() {
		dir := t.TempDir()
		if err := setUp(dir); err != nil {
			t.Fatal(err)
		}
		// The mount on /etc keeps what it needs of it.
		t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
		test(t)
		return
	}
	if !*long {
		t.Skip("takes minutes: run with -long")
	}
	tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("tailscaled needs a network interface: %v", err)
	}
	_ = tun.Close()
	command := func(args ...string) *exec.Cmd {
		cmd := netns.Command(args...)
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWNS
		return cmd
	}
	if err := command("-test.run=^$").Run(); err != nil {
		t.Skipf("cannot create namespaces: %v", err)
	}
	cmd := command("-test.run=^"+t.Name()+"$", "-test.v", "-long")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.MultiWriter(&out, os.Stdout), io.MultiWriter(&out, os.Stderr)
	if err := cmd.Run(); err != nil || !strings.Contains(out.String(), "--- PASS: "+t.Name()) {
		t.Errorf("in the namespace: %v", err)
	}
}

// setUp sets up the namespaces.
func setUp(dir string) error {
	if err := os.Setenv("TS_NO_LOGS_NO_SUPPORT", "true"); err != nil { // before the first node
		return err
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keeping mounts to the namespace: %w", err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mounting a tmpfs: %w", err)
	}
	upper, work := filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	for _, d := range []string{upper, work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	if err := syscall.Mount("overlay", "/etc", "overlay", 0, "lowerdir=/etc,upperdir="+upper+",workdir="+work); err != nil {
		return fmt.Errorf("mounting an /etc of its own: %w", err)
	}
	return netns.SetUp()
}

// tailnet is the control server of a test.
type tailnet struct {
	url string
	// key returns an auth key for the replicas, or for the clients' machine.
	key func(replica bool) string
}

// world is a cluster, two replicas in front of it, and a machine that is on the tailnet.
type world struct {
	*testing.T
	lab      *lab.Lab
	dir      string
	replicas [2]*replica
}

// startCluster starts a cluster, and a Headscale, which a test need not use.
func startCluster(t *testing.T) *world {
	t.Helper()
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{T: t, dir: t.TempDir()}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if w.lab, err = lab.Start(ctx, lab.Config{Dir: w.dir, Examples: filepath.Join(root, "examples"), Progress: os.Stderr}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.lab.Stop(); err != nil {
			t.Error(err)
		}
	})
	return w
}

// replica is a Caddy in a process of its own.
type replica struct {
	w         *world
	name      string // of its node, and in messages
	caddyfile string // its path
	*process.Process
}

// startReplicas starts two replicas of a site. Each binds what bind says about its node. They
// have one storage, and so one authority and one certificate.
func (w *world) startReplicas(tn tailnet, site string, bind func(node string) string) {
	w.Helper()
	for i := range w.replicas {
		r := &replica{w: w, name: fmt.Sprint("k8s-", i), caddyfile: filepath.Join(w.dir, fmt.Sprintf("replica%d.caddyfile", i))}
		w.replicas[i] = r
		if err := os.WriteFile(r.caddyfile, fmt.Appendf(nil, `{
	admin off
	persist_config off
	skip_install_trust
	auto_https disable_redirects
	storage file_system %s
	log {
		output file %s
		format json
	}
	grace_period 10s
	shutdown_delay 4s
	tailscale {
		control_url %s
		auth_key %s
		state_dir %s
	}
	servers {
		protocols h1 h2
	}
}
https://%s {
	bind %s
	tls internal
	tailscale_kubernetes {
		kubeconfig %s
		whoami
	}
}
`, w.storage(), r.log(), tn.url, tn.key(true), filepath.Join(w.dir, "nodes-"+r.name), site, bind(r.name), w.lab.Kubeconfig()), 0o600); err != nil {
			w.Fatal(err)
		}
		r.start()
		// The first one makes the authority.
		w.until(r.name+" has the authority", func() error { _, err := os.Stat(w.authority()); return err })
	}
}

func (w *world) storage() string { return filepath.Join(w.dir, "caddy") }

func (w *world) authority() string {
	return filepath.Join(w.storage(), "pki", "authorities", "local", "root.crt")
}

func (r *replica) log() string { return filepath.Join(r.w.dir, r.name+".log") }

// start starts the replica, or starts it again.
func (r *replica) start() {
	r.w.Helper()
	self, err := os.Executable()
	if err != nil {
		r.w.Fatal(err)
	}
	cmd := exec.Command(self, "run", "--config", r.caddyfile, "--adapter", "caddyfile")
	cmd.Env = append(os.Environ(), ownCaddy+"=yes")
	if r.Process, err = process.Start(cmd); err != nil {
		r.w.Fatal(err)
	}
	own := r.Process
	r.w.Cleanup(func() {
		own.Kill()
		if r.w.Failed() {
			said, err := os.ReadFile(r.log())
			r.w.Logf("%s's log (%v):\n%s", r.name, err, said)
		}
	})
}

// terminate sends SIGTERM and waits for the end.
func (r *replica) terminate() {
	r.w.Helper()
	if err := r.Signal(syscall.SIGTERM); err != nil {
		r.w.Fatal(err)
	}
	select {
	case <-r.Done():
	case <-time.After(time.Minute):
		r.w.Fatalf("%s still runs a minute after SIGTERM", r.name)
	}
}

// joinMachine puts the machine on the tailnet, with its interface, routes and DNS. It returns
// the client of its tailscaled.
func (w *world) joinMachine(tn tailnet) *local.Client {
	w.Helper()
	path, err := components.Path("tailscaled")
	if err != nil {
		w.Fatal(err)
	}
	dir := w.TempDir()
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		w.Fatal(err)
	}
	client := &local.Client{Socket: filepath.Join(dir, "socket"), UseSocketOnly: true}
	cmd := exec.Command(path, "--statedir="+dir, "--socket="+client.Socket, "--tun=tailscale0", "--port=0")
	cmd.Env = append(os.Environ(), "TS_LOGS_DIR="+dir)
	cmd.Stdout, cmd.Stderr = log, log
	daemon, err := process.Start(cmd)
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() {
		daemon.Kill()
		_ = log.Close()
		if w.Failed() {
			said, err := os.ReadFile(log.Name())
			w.Logf("tailscaled's log (%v):\n%s", err, said[max(0, len(said)-20000):])
		}
	})
	w.until("tailscaled answers", func() error { _, err := client.StatusWithoutPeers(w.Context()); return err })
	prefs := ipn.NewPrefs()
	prefs.ControlURL, prefs.Hostname, prefs.WantRunning = tn.url, "laptop", true
	if err := client.Start(w.Context(), ipn.Options{AuthKey: tn.key(false), UpdatePrefs: prefs}); err != nil {
		w.Fatal(err)
	}
	if err := client.StartLoginInteractive(w.Context()); err != nil {
		w.Fatal(err)
	}
	w.until("the machine is on the tailnet", func() error {
		status, err := client.StatusWithoutPeers(w.Context())
		if err == nil && status.BackendState != ipn.Running.String() {
			err = errors.New(status.BackendState)
		}
		return err
	})
	return client
}

// addresses returns the tailnet addresses of the node of that name, as the machine knows them.
func (w *world) addresses(machine *local.Client, name string) (ip4, ip6 netip.Addr) {
	w.Helper()
	w.until("the machine knows "+name, func() error {
		status, err := machine.Status(w.Context())
		if err != nil {
			return err
		}
		for _, peer := range status.Peer {
			if peer.HostName != name {
				continue
			}
			for _, ip := range peer.TailscaleIPs {
				if ip.Is4() {
					ip4 = ip
				} else {
					ip6 = ip
				}
			}
		}
		if !ip4.IsValid() || !ip6.IsValid() {
			return fmt.Errorf("it knows %v and %v", ip4, ip6)
		}
		return nil
	})
	return ip4, ip6
}

// kubeconfig writes a kubeconfig for the site at host, and returns its path.
func (w *world) kubeconfig(host string) string {
	w.Helper()
	authority, err := os.ReadFile(w.authority())
	if err != nil {
		w.Fatal(err)
	}
	path := filepath.Join(w.TempDir(), host)
	if err := clientcmd.WriteToFile(api.Config{
		Clusters:       map[string]*api.Cluster{"lab": {Server: "https://" + host, CertificateAuthorityData: authority}},
		AuthInfos:      map[string]*api.AuthInfo{"me": {Token: "unused"}},
		Contexts:       map[string]*api.Context{"lab": {Cluster: "lab", AuthInfo: "me"}},
		CurrentContext: "lab",
	}, path); err != nil {
		w.Fatal(err)
	}
	return path
}

// kubectl runs kubectl for two minutes at most, and returns its output.
func (w *world) kubectl(kubeconfig string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(w.Context(), 2*time.Minute)
	defer cancel()
	cmd, err := lab.Kubectl(ctx, kubeconfig, args...)
	if err != nil {
		return "", err
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("%w: %s", err, stderr.String())
	}
	return string(out), nil
}

// request is one run of kubectl.
type request struct {
	began time.Time
	took  time.Duration
	err   error
}

// load runs kubectl one time after another until it is stopped.
type load struct {
	mu   sync.Mutex
	runs []request
	stop context.CancelFunc
	done chan struct{}
}

// get starts a load of "kubectl get".
func (w *world) get(kubeconfig string) *load {
	ctx, cancel := context.WithCancel(w.Context())
	l := &load{stop: cancel, done: make(chan struct{})}
	go func() {
		defer close(l.done)
		for ctx.Err() == nil {
			began := time.Now()
			_, err := w.kubectl(kubeconfig, "get", "namespace", "default", "--output=name")
			l.mu.Lock()
			l.runs = append(l.runs, request{began, time.Since(began), err})
			l.mu.Unlock()
		}
	}()
	return l
}

// since returns the runs that began after t, and had ended.
func (l *load) since(t time.Time) (runs []request) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.runs {
		if r.began.After(t) {
			runs = append(runs, r)
		}
	}
	return runs
}

// outcome stops the load, and returns how many runs there were since t, how many of them
// failed, and how long the slowest took. Those that were under way at t count as well.
func (l *load) outcome(t time.Time) (made, lost, lostLater int, longest time.Duration, last error) {
	l.stop()
	<-l.done
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.runs {
		if r.began.Add(r.took).Before(t) {
			continue
		}
		made++
		longest = max(longest, r.took)
		if r.err != nil {
			lost, last = lost+1, r.err
			if r.began.After(t) {
				lostLater++
			}
		}
	}
	return made, lost, lostLater, longest, last
}

// stream is a kubectl that runs until it is stopped.
type stream struct {
	what  string
	out   lockedBuffer
	done  chan struct{}
	err   error
	ended time.Time
	kill  func()
}

// lockedBuffer is a [bytes.Buffer] for two goroutines.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// open starts kubectl, and waits until it prints want. It returns how long that took.
func (w *world) open(what, kubeconfig, want string, args ...string) (*stream, time.Duration) {
	w.Helper()
	began := time.Now()
	ctx, cancel := context.WithCancel(context.Background())
	cmd, err := lab.Kubectl(ctx, kubeconfig, args...)
	if err != nil {
		cancel()
		w.Fatal(err)
	}
	s := &stream{what: what, done: make(chan struct{}), kill: cancel}
	stdin, err := cmd.StdinPipe() // exec -i reads it
	if err != nil {
		w.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = &s.out, &s.out
	if err := cmd.Start(); err != nil {
		w.Fatal(err)
	}
	go func() {
		s.err = cmd.Wait()
		s.ended = time.Now()
		_ = stdin.Close()
		close(s.done)
	}()
	w.Cleanup(cancel)
	w.until(what+" begins", func() error {
		select {
		case <-s.done:
			w.Fatalf("%s has ended: %v: %s", what, s.err, s.out.String())
		default:
		}
		if !strings.Contains(s.out.String(), want) {
			return fmt.Errorf("it printed %q", s.out.String())
		}
		return nil
	})
	return s, time.Since(began)
}

// openStreams opens a watch and an exec, and logs how long that takes.
func (w *world) openStreams(when, kubeconfig string) []*stream {
	w.Helper()
	watch, took := w.open("a watch", kubeconfig, "default", "get", "namespaces", "--watch", "--no-headers")
	exec, execTook := w.open("an exec", kubeconfig, "begun", "exec", "-i", lab.Pod, "--", "sh", "-c", "echo begun; cat")
	w.Logf("%s: a watch opens within %.1f s, an exec within %.1f s", when, took.Seconds(), execTook.Seconds())
	return []*stream{watch, exec}
}

// logEnds logs how long after a fault the streams end. That is up to the client: a replica
// that is gone tells it nothing.
func (w *world) logEnds(streams []*stream, fault string, began time.Time) {
	w.Helper()
	limit, cancel := context.WithDeadline(w.Context(), began.Add(2*time.Minute))
	defer cancel()
	for _, s := range streams {
		select {
		case <-s.done:
		case <-limit.Done():
			s.kill()
			<-s.done
		}
		w.Logf("%s that was open when %s ended after %.1f s: %v: %s", s.what, fault, s.ended.Sub(began).Seconds(), s.err, lastLine(s.out.String()))
	}
}

// lastLine returns the last line of s.
func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

// until waits until f returns nil, for two minutes at most.
func (w *world) until(what string, f func() error) {
	w.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			w.Fatalf("it is not so that %s: %v", what, err)
		}
	}
}
