// SPDX-License-Identifier: Apache-2.0

// Command conformance-mutants measures the tests by what they catch: it takes away
// the lines that security rests on, one at a time, and runs the suite that has to
// fail then. The source is never touched, as the Go command is told to read another
// file in its place. That file has all mutants of a file in it, and an environment
// variable says which of them a suite runs with, so that each suite is built once.
//
// It ends with status 1 if the loss of any line goes unnoticed, or if a line is no
// longer where the table says.
package main

import (
	"cmp"
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
const atOnce = 4

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
	dir, err := os.MkdirTemp("", "mutants-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	s := &suites{root: root, dir: dir, programs: make(map[string]program)}
	if !find {
		for _, a := range tried {
			if err := a.check(root); err != nil {
				return fmt.Errorf("%s: %s: %w", a.path, a.name, err)
			}
		}
		if err := s.build(ctx, tried); err != nil {
			return err
		}
	}
	var bad atomic.Int32
	var g errgroup.Group
	g.SetLimit(atOnce)
	for i, a := range tried {
		g.Go(func() error {
			began := time.Now()
			err := a.check(root)
			noticed := ""
			if err == nil && !find {
				noticed, err = s.try(ctx, i, a)
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

// check returns an error unless a's line stands once in its file.
func (a attempt) check(root string) error {
	source, err := os.ReadFile(filepath.Join(root, a.path))
	if err != nil {
		return err
	}
	if n := strings.Count(string(source), a.old); n != 1 {
		return fmt.Errorf("its line stands %d times in the file; want once", n)
	}
	return nil
}

// suites runs the suites.
type suites struct {
	root, dir string
	switched  *switched
	programs  map[string]program
	// lab is one at a time.
	lab sync.Mutex
}

// program is a suite that has been built.
type program struct {
	path string
	// limit is how long it may take: that a suite hangs is noticing as well, that it is
	// slow is not.
	limit time.Duration
}

// flags are those of every build.
var flags = []string{"-gcflags=all=-dwarf=false", "-ldflags=-w"}

// build builds each suite that the attempts need, with all of them in it, and runs it
// with every line in place. It has to pass: what fails as it is shows nothing.
func (s *suites) build(ctx context.Context, attempts []attempt) (err error) {
	if s.switched, err = newSwitched(s.root, s.dir, attempts); err != nil {
		return err
	}
	for _, a := range attempts {
		for _, suite := range strings.Fields(a.by) {
			if _, ok := s.programs[suite]; ok {
				continue
			}
			p := program{filepath.Join(s.dir, fmt.Sprintf("suite%d", len(s.programs))), 10 * time.Minute}
			if err := s.compile(ctx, suite, s.switched.overlay, p.path); err != nil {
				return fmt.Errorf("%s: %w", suite, err)
			}
			began := time.Now()
			noticed, err := s.run(ctx, suite, p, "")
			if err != nil {
				return fmt.Errorf("%s: %w", suite, err)
			}
			if noticed != "" {
				return fmt.Errorf("%s fails as it is: %s", suite, noticed)
			}
			took := time.Since(began)
			p.limit = time.Minute + 3*took
			s.programs[suite] = p
			fmt.Printf("%-40s %-62s %-24s %5.1f s\n", "", "with every line in place all is well", suite, took.Seconds())
		}
	}
	return nil
}

// try runs the suites of a, the attempt of that number, until one fails, and returns
// what failed. It is an error if nothing did.
func (s *suites) try(ctx context.Context, number int, a attempt) (noticed string, err error) {
	for _, suite := range strings.Fields(a.by) {
		p := s.programs[suite]
		if s.switched.alone[number] {
			if p.path, err = s.compileAlone(ctx, suite, number, a); err != nil {
				return "", err
			}
		}
		if noticed, err := s.run(ctx, suite, p, fmt.Sprint(number)); err != nil || noticed != "" {
			return noticed, err
		}
	}
	return "", errors.New("all is well without it")
}

// compileAlone builds a suite with nothing but a in it.
func (s *suites) compileAlone(ctx context.Context, suite string, number int, a attempt) (path string, err error) {
	file := filepath.Join(s.root, a.path)
	source, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	base := filepath.Join(s.dir, fmt.Sprintf("alone%d", number))
	if err := os.WriteFile(base+".go", []byte(strings.Replace(string(source), a.old, a.new, 1)), 0o600); err != nil {
		return "", err
	}
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{file: base + ".go"}})
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(base+".json", overlay, 0o600); err != nil {
		return "", err
	}
	return base, s.compile(ctx, suite, base+".json", base)
}

// folder returns the folder of a suite's package, and whether the lab runs in it.
func (s *suites) folder(suite string) (dir string, lab bool) {
	if suite == attacks {
		return filepath.Join(s.root, "lab", "cmd", "conformance"), true
	}
	return filepath.Join(s.root, suite), strings.HasPrefix(suite, "./lab/")
}

// compile builds a suite with an overlay.
func (s *suites) compile(ctx context.Context, suite, overlay, path string) error {
	args := []string{"test", "-c", "-vet=off"}
	if suite == attacks {
		args = []string{"build"}
	}
	dir, _ := s.folder(suite)
	build := command(ctx, dir, "go", slices.Concat(args, flags, []string{"-overlay=" + overlay, "-o", path, "."})...)
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("it does not compile: %s", out)
	}
	return nil
}

// slow are the tests of a package that wait for what takes seconds. They come last,
// as most mutants are caught before.
var slow = map[string]string{
	".": "^(TestSession_FailingRecorder|TestSession_LostRecorder|TestSession_ManyLeaveNothingBehind)$",
}

// counts are the tests of how much memory is allocated, which is more in a program that
// has all mutants in it.
const counts = "Alloc"

// run runs a suite as that mutant, and returns what failed, if anything did. It is an
// error if nothing could be run.
func (s *suites) run(ctx context.Context, suite string, p program, mutant string) (noticed string, err error) {
	dir, lab := s.folder(suite)
	if lab {
		s.lab.Lock()
		defer s.lab.Unlock()
	}
	if suite == attacks {
		return s.attack(ctx, p, mutant)
	}
	passes := [][]string{{"-test.skip=" + counts}}
	if tests := slow[suite]; tests != "" {
		passes = [][]string{{"-test.skip=" + counts + "|" + tests}, {"-test.run=" + tests}}
	}
	for _, pass := range passes {
		test := command(ctx, dir, p.path, append(pass, "-test.failfast", "-test.timeout="+p.limit.String())...)
		test.Env = append(os.Environ(), switchName+"="+mutant)
		out, err := test.CombinedOutput()
		switch {
		case ctx.Err() != nil:
			return "", ctx.Err()
		case strings.Contains(string(out), "no tests to run"):
			return "", fmt.Errorf("%s has no such tests: %s", suite, pass)
		case err != nil:
			return found(out, `--- FAIL: (\S+)`, `panic: .*running tests:\n\s+(\S+)`, `(panic: .*)`), nil
		}
	}
	return "", nil
}

// attack runs command conformance as that mutant.
func (s *suites) attack(ctx context.Context, p program, mutant string) (noticed string, err error) {
	limited, cancel := context.WithTimeout(ctx, p.limit)
	defer cancel()
	attack := command(limited, s.root, p.path, "-first")
	attack.Env = append(os.Environ(), switchName+"="+mutant)
	out, err := attack.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case limited.Err() != nil:
		return "it hangs", nil
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
	return cmp.Or(lines[len(lines)-1], "it says nothing")
}
