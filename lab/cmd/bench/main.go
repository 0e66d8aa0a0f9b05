// SPDX-License-Identifier: Apache-2.0

// Command bench measures what a request to the API server costs on its way through
// the plugin, compared with a bare reverse_proxy, with the API server proxy of
// Tailscale's Kubernetes operator, and with no proxy. It writes docs/performance.md
// and its picture.
//
// All components are real: Headscale, kube-apiserver, WireGuard between tsnet nodes.
// The bench runs in a network namespace of its own, which ends with it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/netns"
)

// stageLimit is how long one kind of measurement may take before it fails.
const stageLimit = time.Hour

// options are the command's flags.
type options struct {
	rounds int
	most   int // rounds, where fewer do not decide
	slice  time.Duration
	only   string
	docs   string
	dir    string
	// profile is where proxies write CPU profiles, empty if they do not.
	profile string
}

// runs reports whether the measurement of that name is selected.
func (o options) runs(name string) bool {
	return o.only == "" || strings.Contains(","+o.only+",", ","+name+",")
}

// looks returns after how many rounds a comparison may end.
func (o options) looks() []int { return looks(o.rounds, o.most) }

func main() {
	var o options
	flag.IntVar(&o.rounds, "rounds", 10, "how often each comparison is repeated")
	flag.IntVar(&o.most, "max-rounds", 40, "how often a comparison is repeated at most, while a target is undecided")
	flag.DurationVar(&o.slice, "slice", 2*time.Second, "how long a proxy is under load in each round")
	flag.StringVar(&o.only, "only", "", "run only these measurements (comma-separated: handler, connect, kubectl, get, list, watch, stream, peers); does not write the docs")
	flag.StringVar(&o.docs, "docs", "", "folder for performance.md and its picture (default: the project's docs)")
	flag.StringVar(&o.dir, "dir", "", "folder for logs (default: .run/bench in the lab's folder)")
	flag.StringVar(&o.profile, "profile", "", "folder for a CPU profile of each proxy's process, which costs it some time")
	flag.Parse()

	var err error
	switch {
	case flag.Arg(0) == "proxy":
		err = serveProxy()
	case flag.Arg(0) == "answers":
		err = serveAnswers()
	case !netns.Inside():
		err = runInNamespace()
	default:
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		ctx, cancel := context.WithTimeout(ctx, 5*time.Hour) // a last resort
		err = run(ctx, o)
		cancel()
		stop()
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	root, err := lab.Root()
	if err != nil {
		return err
	}
	if o.dir == "" {
		o.dir = filepath.Join(root, "lab", ".run", "bench")
	}
	if o.docs == "" {
		o.docs = filepath.Join(root, "docs")
	}
	if o.profile != "" {
		if err := os.MkdirAll(o.profile, 0o700); err != nil {
			return err
		}
		if o.profile, err = filepath.Abs(o.profile); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(o.dir); err != nil {
		return err
	}
	if err := os.MkdirAll(o.dir, 0o700); err != nil {
		return err
	}
	fmt.Printf("Starting a tailnet and a cluster (logs: %s)\n", o.dir)
	b, err := newBench(ctx, o, root)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.stop()) }()

	r := newReport(o)
	for _, m := range []struct {
		name string
		run  func(context.Context, *report) error
	}{
		{"handler", b.handler},
		{"watch", b.watches},
		{"connect", b.connects},
		{"kubectl", b.kubectls},
		{"get", b.gets},
		{"list", b.lists},
		{"stream", b.streams},
		{"peers", b.peers},
	} {
		if !o.runs(m.name) {
			continue
		}
		fmt.Printf("\nMeasuring: %s\n", m.name)
		ctx, cancel := context.WithTimeout(ctx, stageLimit)
		err := m.run(ctx, r)
		cancel()
		if err != nil {
			r.print(os.Stdout) // the measurements made so far
			return fmt.Errorf("%s: %w", m.name, err)
		}
	}
	fmt.Println()
	r.print(os.Stdout)
	if o.only != "" {
		return nil
	}
	return r.write(o.docs)
}

// runInNamespace runs this command again in a new network namespace.
func runInNamespace() error {
	cmd := netns.Command(os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}
