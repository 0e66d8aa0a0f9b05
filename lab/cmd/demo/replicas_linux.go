// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/replicas"
)

// theName is the one name of both replicas.
const theName = lab.ProxyName + "." + lab.Domain

// becameReplica reports whether this process was a replica, until it has ended.
func becameReplica() bool { return replicas.BeCaddy() }

// startReplicas runs the demo of two replicas, in namespaces of its own.
func startReplicas(ctx context.Context, dir string, once bool) error {
	if !replicas.Inside() {
		return startInNamespace()
	}
	dir, err := folder(dir)
	if err != nil {
		return err
	}
	return runReplicas(ctx, dir, once)
}

// startInNamespace runs this program again in namespaces of its own, in which this machine
// can be on the tailnet, and waits for its end.
func startInNamespace() error {
	if err := replicas.Unavailable("-nothing"); err != nil {
		return fmt.Errorf("kubectl has to run on a machine that is on the tailnet, in namespaces of its own: %w; run the demo as root on Linux", err)
	}
	runtime.LockOSThread() // the namespaces end with the thread that started them
	cmd := replicas.Command(os.Args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s) // it stops everything
		}
	}()
	err := cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		os.Exit(exit.ExitCode()) // it has said why
	}
	return err
}

// runReplicas shows that kubectl goes on while one of two replicas behind one name is killed.
func runReplicas(ctx context.Context, dir string, once bool) (err error) {
	namespace := filepath.Join(dir, "namespace")
	machineDir := filepath.Join(dir, "machine")
	if err := errors.Join(os.Mkdir(namespace, 0o700), os.Mkdir(machineDir, 0o700)); err != nil {
		return err
	}
	if err := replicas.SetUp(namespace); err != nil {
		return err
	}
	fmt.Printf("Starting a tailnet, a cluster and two replicas (logs: %s)\n", dir)
	w, err := replicas.Start(ctx, dir, os.Stdout)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Stop()) }()
	tailnet, err := w.Headscale(ctx, "alice@example.com")
	if err != nil {
		return err
	}
	defer w.KillReplicas()
	if err := w.StartReplicas(ctx, tailnet, theName, func(node string) string { return "tailscale/" + node }); err != nil {
		return err
	}
	machine, err := replicas.Join(ctx, tailnet, machineDir)
	if err != nil {
		return err
	}
	defer machine.Leave()

	first, _, err := machine.Addresses(ctx, w.Replicas[0].Name)
	if err != nil {
		return err
	}
	_, second, err := machine.Addresses(ctx, w.Replicas[1].Name)
	if err != nil {
		return err
	}
	if err := w.Lab.Headscale.SetRecords(
		tailcfg.DNSRecord{Name: theName, Type: "A", Value: first.String()},
		tailcfg.DNSRecord{Name: theName, Type: "AAAA", Value: second.String()},
	); err != nil {
		return err
	}
	alice := &asker{kubeconfig: filepath.Join(dir, "alice.kubeconfig")}
	if err := w.WriteKubeconfig(alice.kubeconfig, theName); err != nil {
		return err
	}
	if err := replicas.Until(ctx, "kubectl is answered", func() error { return alice.ask(ctx).err }); err != nil {
		return err
	}
	fmt.Printf(`
One name, two replicas: %s is %v (%s) and %v (%s).
On alice's machine, which is on the tailnet with tailscaled, kubectl runs again and again:

	alice$ kubectl get namespace default

`, theName, first, w.Replicas[0].Name, second, w.Replicas[1].Name)
	if err := killOne(ctx, w, alice); err != nil {
		return err
	}
	if once {
		return nil
	}
	printReplicas(w, alice)
	<-ctx.Done()
	fmt.Println("\nStopping.")
	return nil
}

// runs is how often kubectl runs before and after each change.
const runs = 4

// killOne kills the replica that answers while kubectl runs again and again, and starts it
// again.
func killOne(ctx context.Context, w *replicas.World, alice *asker) error {
	asking, stop := context.WithCancel(ctx)
	var done sync.WaitGroup
	defer done.Wait()
	defer stop()
	done.Go(func() { alice.askAndPrint(asking) })
	if err := alice.wait(ctx, runs); err != nil {
		return err
	}
	victim := w.Replicas[0]
	if alice.answeredBy(w.Replicas[1].Name) > runs/2 { // a client may use the other one once
		victim = w.Replicas[1]
	}
	fmt.Printf("\tkill -9: %s is gone\n", victim.Name)
	killed := time.Now()
	victim.Kill()
	if err := alice.wait(ctx, runs); err != nil {
		return err
	}
	began := time.Now()
	out, err := alice.kubectl(ctx, "exec", lab.Pod, "--", "echo", "a new exec works too")
	if err != nil {
		return fmt.Errorf("kubectl exec without %s: %w: %s", victim.Name, err, out)
	}
	fmt.Printf("\t%s (%.1f s)\n", strings.TrimSpace(out), time.Since(began).Seconds())
	fmt.Printf("\t%s starts again\n", victim.Name)
	if err := victim.Start(); err != nil {
		return err
	}
	if err := replicas.Until(ctx, victim.Name+" answers again", func() error {
		if by := alice.last().by; by != victim.Name {
			return fmt.Errorf("%s does", by)
		}
		return nil
	}); err != nil {
		return err
	}
	if err := alice.wait(ctx, runs); err != nil {
		return err
	}
	stop()
	done.Wait()
	return alice.sum(killed)
}

// asker is a device that asks the API server.
type asker struct {
	kubeconfig string

	mu   sync.Mutex
	asks []kubectlRun
}

// kubectlRun is one run of kubectl.
type kubectlRun struct {
	began time.Time
	took  time.Duration
	by    string // the replica that answered
	err   error
}

// kubectl runs kubectl, and returns what it prints.
func (a *asker) kubectl(ctx context.Context, args ...string) (string, error) {
	cmd, err := lab.Kubectl(ctx, a.kubeconfig, args...)
	if err != nil {
		return "", err
	}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// servedBy finds the header of the answer in what kubectl logs.
var servedBy = regexp.MustCompile(`X-Replica: (\S+)`)

// ask runs kubectl once.
func (a *asker) ask(ctx context.Context) kubectlRun {
	began := time.Now()
	out, err := a.kubectl(ctx, "get", "namespace", "default", "--output=name", "--v=8")
	one := kubectlRun{began: began, took: time.Since(began), err: err}
	if all := servedBy.FindAllStringSubmatch(out, -1); all != nil {
		one.by = all[len(all)-1][1] // that of the request, after any for discovery
	}
	switch {
	case err != nil:
		lines := bytes.Split(bytes.TrimSpace([]byte(out)), []byte("\n"))
		one.err = fmt.Errorf("%w: %s", err, lines[len(lines)-1])
	case one.by == "" || !strings.Contains(out, "namespace/default"):
		one.err = fmt.Errorf("kubectl printed %q", out)
	}
	return one
}

// askAndPrint asks until ctx is done, and prints who answers.
func (a *asker) askAndPrint(ctx context.Context) {
	for ctx.Err() == nil {
		one := a.ask(ctx)
		if ctx.Err() != nil {
			return // it was interrupted
		}
		a.mu.Lock()
		a.asks = append(a.asks, one)
		a.mu.Unlock()
		if one.err != nil {
			fmt.Printf("\t%s  lost after %.1f s: %v\n", one.began.Format(time.TimeOnly), one.took.Seconds(), one.err)
			continue
		}
		fmt.Printf("\t%s  namespace/default, through %s, after %.1f s\n", one.began.Format(time.TimeOnly), one.by, one.took.Seconds())
	}
}

// last returns the last run that has ended.
func (a *asker) last() kubectlRun {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.asks) == 0 {
		return kubectlRun{}
	}
	return a.asks[len(a.asks)-1]
}

// answeredBy returns how many answers came from a replica.
func (a *asker) answeredBy(name string) (n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, one := range a.asks {
		if one.by == name {
			n++
		}
	}
	return n
}

// wait waits until kubectl has run n more times.
func (a *asker) wait(ctx context.Context, n int) error {
	ended := func() int {
		a.mu.Lock()
		defer a.mu.Unlock()
		return len(a.asks)
	}
	want := ended() + n
	return replicas.Until(ctx, "kubectl has run again", func() error {
		if got := ended(); got < want {
			return fmt.Errorf("%d times; want %d", got, want)
		}
		return nil
	})
}

// sum prints how many runs there were. It is an error if one was lost that began after a
// replica was killed: what is on its way to one that is killed can be lost.
func (a *asker) sum(killed time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var lost, later int
	var longest time.Duration
	for _, one := range a.asks {
		longest = max(longest, one.took)
		if one.err != nil {
			lost++
			if one.began.After(killed) {
				later++
			}
		}
	}
	fmt.Printf("\nkubectl runs: %d; lost: %d; longest wait: %.1f s.\n", len(a.asks), lost, longest.Seconds())
	if lost > later {
		fmt.Println("A request that its replica is answering when that is killed is lost. kubectl notices after 45 s.")
	}
	if later > 0 {
		return fmt.Errorf("%d requests that began without the replica were lost", later)
	}
	return nil
}

// printReplicas prints how to go on by hand.
func printReplicas(w *replicas.World, alice *asker) {
	kubectl, err := components.Path("kubectl")
	if err != nil {
		kubectl = "kubectl"
	}
	fmt.Printf(`
All of it runs until you press Ctrl-C. In another shell, as alice's machine:

	nsenter --target %d --net --mount env KUBECONFIG=%s %s get pods
`, os.Getpid(), alice.kubeconfig, kubectl)
	for _, r := range w.Replicas {
		fmt.Printf("	kill -STOP %d   # %s hangs, until kill -CONT\n", r.Pid(), r.Name)
	}
}
