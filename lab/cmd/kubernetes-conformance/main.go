// SPDX-License-Identifier: Apache-2.0

// Command kubernetes-conformance runs Kubernetes' own tests twice against the lab's cluster with
// a real node: directly, as an administrator, and through the plugin, as a caller who is granted
// system:masters. It prints the results of both as a table in Markdown.
//
// The exit status is 1 if a test passes directly and not through the plugin, or fails directly
// and [kubetest.KnownFailures] does not say why, and 2 if the tests could not be run.
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
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/kubetest"
)

// The statuses that the command exits with if something is wrong.
const (
	exitDifferent = 1
	exitNotRun    = 2
)

// options are the command's flags.
type options struct {
	part, sets, focus, dir string
	procs                  int
	setTimeout             time.Duration
}

func main() {
	var o options
	flag.StringVar(&o.part, "part", kubetest.PartAll, "what to run: all, or ci for what continuous integration has time for")
	flag.StringVar(&o.sets, "sets", "", "run only the sets with these names, separated by commas")
	flag.StringVar(&o.focus, "focus", "", "run only tests whose names match this regular expression, in place of sets")
	flag.StringVar(&o.dir, "dir", "", "folder for logs and reports (default: .run/kubernetes-conformance in the lab's folder)")
	flag.IntVar(&o.procs, "procs", 5, "how many tests run at once")
	flag.DurationVar(&o.setTimeout, "set-timeout", 2*time.Hour, "how long one run of a set may take")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	different, err := run(ctx, o)
	stop()
	switch {
	case err != nil:
		fmt.Fprintln(os.Stderr, "kubernetes-conformance:", err)
		os.Exit(exitNotRun)
	case different != nil:
		fmt.Fprintln(os.Stderr, "kubernetes-conformance:", different)
		os.Exit(exitDifferent)
	}
}

// run runs the tests. It returns what is different through the plugin, and what kept the tests
// from running.
func run(ctx context.Context, o options) (different, err error) {
	sets, err := chosen(o)
	if err != nil {
		return nil, err
	}
	known, err := kubetest.KnownFailures()
	if err != nil {
		return nil, err
	}
	root, err := lab.Root()
	if err != nil {
		return nil, err
	}
	if o.dir == "" {
		o.dir = filepath.Join(root, "lab", ".run", "kubernetes-conformance")
	}
	if o.dir, err = filepath.Abs(o.dir); err != nil {
		return nil, err
	}
	if err := os.RemoveAll(o.dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.dir, 0o700); err != nil {
		return nil, err
	}
	images, err := writeImages(ctx, root, o.dir)
	if err != nil {
		return nil, err
	}
	fmt.Printf("Starting a tailnet and a cluster (logs: %s)\n", o.dir)
	t, err := start(ctx, root, o.dir, images)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, t.stop()) }()

	var comparisons []kubetest.Comparison
	// What is known by then is printed in any case: a whole run takes hours.
	defer func() {
		fmt.Println()
		for _, c := range comparisons {
			fmt.Println(c.Details())
		}
		fmt.Print(kubetest.Table(comparisons))
	}()
	j := judge{t, known, kubetest.Runner{Dir: o.dir, Procs: o.procs, SetTimeout: o.setTimeout}}
	for _, set := range sets {
		c, err := j.compare(ctx, set)
		if err != nil {
			return different, err
		}
		comparisons = append(comparisons, c)
		different = errors.Join(different, c.Err())
	}
	return different, nil
}

// chosen returns the sets to run.
func chosen(o options) ([]kubetest.Set, error) {
	if o.focus != "" {
		return []kubetest.Set{{Name: "focus", Focus: []string{o.focus}}}, nil
	}
	sets, err := kubetest.Sets(o.part)
	if err != nil {
		return nil, err
	}
	return kubetest.Named(sets, o.sets)
}

// judge compares runs of sets.
type judge struct {
	target *target
	known  map[string]string
	runner kubetest.Runner
}

// compare runs a set directly and then through the plugin. What is different, or fails, is run
// again both ways, one test at a time.
func (j judge) compare(ctx context.Context, set kubetest.Set) (kubetest.Comparison, error) {
	c, err := j.bothWays(ctx, set)
	if err != nil {
		return c, err
	}
	if again := c.RunAgain(); again != nil {
		j.runner.Procs = 1
		second, err := j.bothWays(ctx, *again)
		if err != nil {
			// All of them may have skipped themselves. The first results stand.
			fmt.Printf("  running again what is different: %v\n", err)
			return c, ctx.Err()
		}
		c.Merge(second)
	}
	return c, nil
}

// bothWays runs a set directly and then through the plugin.
func (j judge) bothWays(ctx context.Context, set kubetest.Set) (kubetest.Comparison, error) {
	var reports [2]kubetest.Report
	for i, way := range []struct{ name, kubeconfig string }{{"directly", j.target.direct}, {"through-the-plugin", j.target.through}} {
		began := time.Now()
		var err error
		if reports[i], err = j.runner.Run(ctx, set, way.name, way.kubeconfig); err != nil {
			return kubetest.Comparison{}, fmt.Errorf("%s, %s: %w", set.Name, way.name, err)
		}
		count := reports[i].Count()
		fmt.Printf("  %5.0f s  %s, %s: %d passed, %d failed, %d skipped themselves\n", time.Since(began).Seconds(),
			set.Name, way.name, count[kubetest.Passed], count[kubetest.Failed], count[kubetest.Skipped])
	}
	return kubetest.Compare(set.Name, reports[0], reports[1], j.known), nil
}

// writeImages writes the images that the tests need into a file of dir, and returns its path.
func writeImages(ctx context.Context, root, dir string) (string, error) {
	list := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes")
	list.Dir = filepath.Join(root, "lab", "tools", "kubernetes")
	out, err := list.Output()
	if err != nil {
		return "", fmt.Errorf("finding Kubernetes' module: %w", err)
	}
	bin, err := components.Dir()
	if err != nil {
		return "", err
	}
	parts := filepath.Join(bin, "kubetest")
	if err := os.MkdirAll(parts, 0o755); err != nil {
		return "", err
	}
	file := filepath.Join(dir, "images.tar")
	return file, kubetest.WriteImages(ctx, parts, strings.TrimSpace(string(out)), file)
}
