// SPDX-License-Identifier: Apache-2.0

package replicas

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

var long = flag.Bool("long", false, "run the tests, which take minutes")

func TestMain(m *testing.M) {
	if BeCaddy() {
		return
	}
	flag.Parse()
	os.Exit(m.Run())
}

// inNamespace runs test in namespaces of its own.
func inNamespace(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	if Inside() {
		dir := t.TempDir()
		if err := SetUp(dir); err != nil {
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
	if err := Unavailable("-test.run=^$"); err != nil {
		t.Skip(err)
	}
	cmd := Command("-test.run=^"+t.Name()+"$", "-test.v", "-long")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.MultiWriter(&out, os.Stdout), io.MultiWriter(&out, os.Stderr)
	runtime.LockOSThread() // the namespaces end with the thread that started them
	defer runtime.UnlockOSThread()
	if err := cmd.Run(); err != nil || !strings.Contains(out.String(), "--- PASS: "+t.Name()) {
		t.Errorf("in the namespace: %v", err)
	}
}

// world is a cluster, two replicas in front of it, and a machine that is on the tailnet.
type world struct {
	*testing.T
	*World
}

// startCluster starts a cluster, and a Headscale, which a test need not use.
func startCluster(t *testing.T) *world {
	t.Helper()
	started, err := Start(t.Context(), t.TempDir(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t, started}
	t.Cleanup(func() { w.check(w.Stop()) })
	return w
}

// check ends the test if err is not nil.
func (w *world) check(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// startReplicas starts the replicas of a site. Each binds what bind says about its node.
func (w *world) startReplicas(tn Tailnet, site string, bind func(node string) string) {
	w.Helper()
	w.Cleanup(func() {
		w.KillReplicas()
		for _, r := range w.Replicas {
			if w.Failed() && r != nil {
				said, err := os.ReadFile(r.Log)
				w.Logf("%s's log (%v):\n%s", r.Name, err, said)
			}
		}
	})
	w.check(w.StartReplicas(w.Context(), tn, site, bind))
}

// joinMachine puts the machine on the tailnet.
func (w *world) joinMachine(tn Tailnet) *Machine {
	w.Helper()
	machine, err := Join(w.Context(), tn, w.TempDir())
	w.check(err)
	w.Cleanup(func() {
		machine.Leave()
		if w.Failed() {
			said, err := os.ReadFile(machine.Log)
			w.Logf("tailscaled's log (%v):\n%s", err, said[max(0, len(said)-20000):])
		}
	})
	return machine
}

// kubeconfig writes a kubeconfig for the site at host, and returns its path.
func (w *world) kubeconfig(host string) string {
	w.Helper()
	path := filepath.Join(w.TempDir(), host)
	w.check(w.WriteKubeconfig(path, host))
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
	w.check(Until(w.Context(), what, f))
}
