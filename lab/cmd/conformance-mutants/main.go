// SPDX-License-Identifier: Apache-2.0

// Command conformance-mutants measures the tests by what they catch: it takes away
// the lines that security rests on, one at a time, and runs the suite that has to
// fail then. The source is never touched, as the Go command is told to read another
// file in its place.
//
// It ends with status 1 if the loss of any line goes unnoticed, or if a line is no
// longer where the table says.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// mutant is the program without one of its lines.
type mutant struct {
	// name is the line that is gone, in words.
	name string
	// old is the line, which stands once in its file, and new what replaces it.
	old, new string
	// by is what has to notice: attacks, or the tests of packages. Default: that
	// of its file.
	by string
}

// file is a file and its mutants.
type file struct {
	path    string // from the project's root
	by      string
	mutants []mutant
}

// attacks is the suite that attacks a proxy: command conformance.
const attacks = "attacks"

// atOnce is how many mutants are tried at the same time. Tests wait more than they
// compute.
const atOnce = 2

func main() {
	only := flag.String("run", "", "regular expression of the mutants to try, as file: name (default: all)")
	by := flag.String("by", "", "try those only that this suite has to notice: attacks, or tests (default: both)")
	find := flag.Bool("find", false, "only look whether the lines are where the table says")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *only, *by, *find); err != nil {
		fmt.Fprintln(os.Stderr, "conformance-mutants:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, only, by string, find bool) error {
	pattern, err := regexp.Compile(only)
	if err != nil {
		return err
	}
	root, err := lab.Root()
	if err != nil {
		return err
	}
	var tried []attempt
	for _, f := range table {
		for _, m := range f.mutants {
			if m.by == "" {
				m.by = f.by
			}
			if !pattern.MatchString(f.path+": "+m.name) || (by != "" && (by == attacks) != (m.by == attacks)) {
				continue
			}
			tried = append(tried, attempt{f.path, m})
		}
	}
	s := &suites{root: root, limits: make(map[string]time.Duration)}
	if !find {
		// What fails with every line in place shows nothing.
		if err := s.measure(ctx, tried); err != nil {
			return err
		}
	}
	var bad atomic.Int32
	var g errgroup.Group
	g.SetLimit(atOnce)
	for _, a := range tried {
		g.Go(func() error {
			began := time.Now()
			source, err := mutate(filepath.Join(root, a.path), a.mutant)
			noticed := ""
			if err == nil && !find {
				noticed, err = s.try(ctx, a, source)
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				bad.Add(1)
				noticed = "NOT CAUGHT: " + err.Error()
			}
			fmt.Printf("%-40s %-62s %-24s %5.1f s  %s\n", a.path, a.name, a.by, time.Since(began).Seconds(), noticed)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if n := bad.Load(); n > 0 {
		return fmt.Errorf("%d of %d mutants were not caught", n, len(tried))
	}
	if find {
		fmt.Printf("The lines of all %d mutants are where the table says.\n", len(tried))
		return nil
	}
	fmt.Printf("All %d mutants were caught.\n", len(tried))
	return nil
}

// attempt is a mutant of the file at a path.
type attempt struct {
	path string
	mutant
}

// suites runs the suites.
type suites struct {
	root string
	// limits is how long each may take: that a suite hangs is noticing as well, that
	// it is slow is not.
	limits map[string]time.Duration
	// lab is one at a time.
	lab sync.Mutex
}

// measure runs each suite that the attempts need as it is, which has to pass.
func (s *suites) measure(ctx context.Context, attempts []attempt) error {
	for _, a := range attempts {
		for _, suite := range strings.Fields(a.by) {
			if s.limits[suite] > 0 {
				continue
			}
			s.limits[suite] = 10 * time.Minute
			began := time.Now()
			noticed, err := s.run(ctx, suite, nil)
			if err != nil {
				return fmt.Errorf("%s: %w", suite, err)
			}
			if noticed != "" {
				return fmt.Errorf("%s fails as it is: %s", suite, noticed)
			}
			took := time.Since(began)
			s.limits[suite] = 2*time.Minute + 3*took
			fmt.Printf("%-40s %-62s %-24s %5.1f s\n", "", "with every line in place all is well", suite, took.Seconds())
		}
	}
	return nil
}

// mutate returns the source of a file without m's line.
func mutate(path string, m mutant) (string, error) {
	source, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	if n := strings.Count(string(source), m.old); n != 1 {
		return "", fmt.Errorf("its line stands %d times in the file; want once", n)
	}
	return strings.Replace(string(source), m.old, m.new, 1), nil
}

// try runs the suites of a until one fails with source in the place of its file, and
// returns what failed. It is an error if nothing did.
func (s *suites) try(ctx context.Context, a attempt, source string) (noticed string, err error) {
	dir, err := os.MkdirTemp("", "mutant-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	mutated := filepath.Join(dir, "mutated.go")
	if err := os.WriteFile(mutated, []byte(source), 0o600); err != nil {
		return "", err
	}
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(s.root, a.path): mutated}})
	if err != nil {
		return "", err
	}
	overlayFile := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(overlayFile, overlay, 0o600); err != nil {
		return "", err
	}
	for _, suite := range strings.Fields(a.by) {
		if noticed, err := s.run(ctx, suite, []string{"-overlay=" + overlayFile}); err != nil || noticed != "" {
			return noticed, err
		}
	}
	return "", errors.New("all is well without it")
}

// run runs a suite and returns what failed, if anything did. It is an error if
// nothing could be run.
func (s *suites) run(ctx context.Context, suite string, flags []string) (noticed string, err error) {
	flags = append(flags, "-gcflags=all=-dwarf=false", "-ldflags=-w")
	if suite == attacks {
		return s.attack(ctx, flags)
	}
	return s.test(ctx, suite, flags)
}

// attack builds command conformance and runs it.
func (s *suites) attack(ctx context.Context, flags []string) (noticed string, err error) {
	dir, err := os.MkdirTemp("", "mutant-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	program := filepath.Join(dir, "conformance")
	build := command(ctx, filepath.Join(s.root, "lab"), "go", append([]string{"build", "-o", program}, append(flags, "./cmd/conformance")...)...)
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("it does not compile: %s", out)
	}
	s.lab.Lock()
	defer s.lab.Unlock()
	ctx, cancel := context.WithTimeout(ctx, s.limits[attacks])
	defer cancel()
	out, err := command(ctx, s.root, program, "-first").CombinedOutput()
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
		return "", nil
	case !errors.As(err, &exit) || exit.ExitCode() != 1:
		return "", fmt.Errorf("the attacks could not be made: %w: %s", err, lastLine(out))
	}
	// The last one: those before are a naive proxy's, which has to fail.
	failures := regexp.MustCompile(`first failure: (.*)`).FindAllSubmatch(out, -1)
	if len(failures) == 0 {
		return lastLine(out), nil
	}
	return string(failures[len(failures)-1][1]), nil
}

// slow are the tests of a package that wait for what takes seconds. They come last,
// as most mutants are caught before.
var slow = map[string]string{
	".": "^(TestSession_FailingRecorder|TestSession_LostRecorder|TestSession_ManyLeaveNothingBehind)$",
}

// test runs the tests of a package. The lab is a module of its own.
func (s *suites) test(ctx context.Context, pkg string, flags []string) (noticed string, err error) {
	dir, limit := s.root, s.limits[pkg]
	if inLab, ok := strings.CutPrefix(pkg, "./lab/"); ok {
		s.lab.Lock()
		defer s.lab.Unlock()
		dir, pkg = filepath.Join(s.root, "lab"), "./"+inLab
	}
	flags = append([]string{"test", "-count=1", "-failfast", "-vet=off", "-timeout=" + limit.String()}, flags...)
	passes := [][]string{nil}
	if tests := slow[pkg]; tests != "" {
		passes = [][]string{{"-skip=" + tests}, {"-run=" + tests}}
	}
	for _, pass := range passes {
		out, err := command(ctx, dir, "go", slices.Concat(flags, pass, []string{pkg})...).CombinedOutput()
		switch {
		case ctx.Err() != nil:
			return "", ctx.Err()
		case strings.Contains(string(out), "[no tests to run]"):
			return "", fmt.Errorf("%s has no such tests: %s", pkg, pass)
		case err == nil:
			continue
		case strings.Contains(string(out), "[build failed]"), strings.Contains(string(out), "[setup failed]"):
			return "", fmt.Errorf("it does not compile: %s", out)
		}
		return found(out, `--- FAIL: (\S+)`, `panic: .*running tests:\n\s+(\S+)`, `(panic: .*)`), nil
	}
	return "", nil
}

// command returns a command that is told to end, rather than killed, when ctx is
// done: it has processes of its own to stop.
func command(ctx context.Context, dir, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	return cmd
}

// found returns what the first of the patterns that matches has in parentheses.
func found(out []byte, patterns ...string) string {
	for _, pattern := range patterns {
		if match := regexp.MustCompile(pattern).FindSubmatch(out); match != nil {
			return string(match[1])
		}
	}
	return lastLine(out)
}

func lastLine(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return lines[len(lines)-1]
}
