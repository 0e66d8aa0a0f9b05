// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/tools/cover"
)

// buildFlags are those of every build, the same as in make test.
var buildFlags = []string{"-gcflags=all=-dwarf=false", "-ldflags=-w"}

// memory is how much a mutant may allocate: some never stop. In KiB.
const memory = 3 << 20

// suite is the tests of a package, built with all mutants in it.
type suite struct {
	name    string // the package's folder, from the project's root
	dir     string
	program string
	scratch string
	// patience is how long any run may take, besides what its tests take.
	patience time.Duration
	tests    []test
	dropped  []string // tests that fail without any mutant
}

// test is a test, and the mutants that it meets.
type test struct {
	name  string
	cost  time.Duration
	meets map[int]bool
}

// newSuite builds the tests of the package in folder name, and runs each of them without any
// mutant, once to see what it meets in packages, and once to see that it passes. The first is
// another program, as the Go command reads no other files in place of those it covers.
func newSuite(ctx context.Context, s settings, name, overlay string, packages []string, mutants []*mutant) (*suite, error) {
	t := &suite{name: name, dir: filepath.Join(s.root, name), scratch: s.scratch, patience: s.patience}
	base := filepath.Join(s.scratch, "suite-"+strings.NewReplacer("/", "-", ".", "root").Replace(name))
	t.program = base
	covered := *t
	covered.program = base + "-cover"
	if err := t.build(ctx, "-overlay="+overlay); err != nil {
		return nil, fmt.Errorf("the tests of %s with mutants in them do not compile: %w", name, err)
	}
	if _, err := os.Stat(t.program); errors.Is(err, os.ErrNotExist) {
		return t, nil // there are no tests
	}
	if err := covered.build(ctx, "-cover", "-coverpkg="+strings.Join(packages, ",")); err != nil {
		return nil, fmt.Errorf("the tests of %s do not compile: %w", name, err)
	}
	defer func() { _ = os.Remove(covered.program) }()
	list := exec.CommandContext(ctx, t.program, "-test.list=^(Test|Fuzz|Example)")
	list.Dir = t.dir
	out, err := list.Output()
	if err != nil {
		return nil, fmt.Errorf("the tests of %s cannot be listed: %w", name, err)
	}
	var g errgroup.Group
	g.SetLimit(s.atOnce)
	var lock sync.Mutex
	for i, name := range strings.Fields(string(out)) {
		g.Go(func() error {
			profile := filepath.Join(s.scratch, fmt.Sprintf("profile-%d", i))
			defer func() { _ = os.Remove(profile) }()
			began := time.Now()
			got, err := covered.run(ctx, 0, []string{name}, 5*time.Minute, "-test.coverprofile="+profile)
			if err != nil {
				return err
			}
			took := time.Since(began)
			if got.verdict == passed {
				if got, err = t.run(ctx, 0, []string{name}, 5*time.Minute); err != nil {
					return err
				}
			}
			lock.Lock()
			defer lock.Unlock()
			if got.verdict != passed {
				t.dropped = append(t.dropped, name)
				return nil
			}
			meets, err := met(profile, mutants)
			if err != nil {
				return err
			}
			t.tests = append(t.tests, test{name, took, meets})
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	if len(t.tests) == 0 {
		return t, nil
	}
	slices.SortFunc(t.tests, func(a, b test) int { return cmp.Or(cmp.Compare(a.cost, b.cost), cmp.Compare(a.name, b.name)) })
	starting := t.tests[0].cost // what every process takes
	for i := range t.tests {
		t.tests[i].cost -= starting
	}
	return t, nil
}

func (t *suite) build(ctx context.Context, args ...string) error {
	build := exec.CommandContext(ctx, "go", slices.Concat([]string{"test", "-c", "-vet=off"}, buildFlags, args, []string{"-o", t.program, "."})...)
	build.Dir = t.dir
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// met returns the mutants whose lines ran, as a coverage profile has it. One that stands in
// no block of the profile, as the value of a case, is met wherever its function is.
func met(profile string, mutants []*mutant) (map[int]bool, error) {
	profiles, err := cover.ParseProfiles(profile)
	if err != nil {
		return nil, err
	}
	files := make(map[string]*cover.Profile)
	for _, p := range profiles {
		files[p.FileName] = p
	}
	ids := make(map[int]bool)
	for _, m := range mutants {
		p := files[m.pkg+"/"+filepath.Base(m.File)]
		if p == nil {
			continue
		}
		if m.variable != "" || runs(p, m) {
			ids[m.id] = true
		}
	}
	return ids, nil
}

func runs(p *cover.Profile, m *mutant) bool {
	innermost := -1
	somewhere := false
	for i, b := range p.Blocks {
		if b.Count > 0 && m.first <= b.StartLine && b.StartLine <= m.last {
			somewhere = true
		}
		if !contains(b, m.start.Line, m.start.Column) {
			continue
		}
		if innermost < 0 || after(b, p.Blocks[innermost]) {
			innermost = i
		}
	}
	if innermost < 0 {
		return somewhere
	}
	return p.Blocks[innermost].Count > 0
}

func contains(b cover.ProfileBlock, line, column int) bool {
	return (b.StartLine < line || b.StartLine == line && b.StartCol <= column) &&
		(line < b.EndLine || line == b.EndLine && column < b.EndCol)
}

// after reports whether a begins behind b, and so is within it if both have something
// in common.
func after(a, b cover.ProfileBlock) bool {
	return cmp.Or(cmp.Compare(a.StartLine, b.StartLine), cmp.Compare(a.StartCol, b.StartCol)) > 0
}

// verdict is what became of a run.
type verdict int

const (
	passed verdict = iota
	failed
	hung  // it computes without end
	stuck // it waits without end
)

// outcome is what became of a run, and the test that failed.
type outcome struct {
	verdict verdict
	by      string
}

// try runs the tests that meet a mutant, the cheap ones first, until one fails.
func (t *suite) try(ctx context.Context, id int) (outcome, error) {
	var batches [3][]string
	var costs [3]time.Duration
	for _, test := range t.tests {
		if !test.meets[id] {
			continue
		}
		i := 0
		switch {
		case test.cost > time.Second:
			i = 2
		case test.cost > 100*time.Millisecond:
			i = 1
		}
		batches[i] = append(batches[i], test.name)
		costs[i] += test.cost
	}
	for i, tests := range batches {
		if len(tests) == 0 {
			continue
		}
		limit := t.patience + 4*costs[i]
		got, err := t.run(ctx, id, tests, limit, "-test.failfast")
		// What takes long, or hangs, may have waited for something that a slow test or a
		// busy machine brings later.
		if err == nil && (got.verdict == stuck || got.verdict == failed && i > 0) {
			got, err = t.run(ctx, id, tests, 2*limit, "-test.failfast")
		}
		if err != nil || got.verdict != passed {
			return got, err
		}
	}
	return outcome{}, nil
}

// run runs tests as that mutant. They hang if they compute for longer than twice the limit,
// and are stuck if they do nothing for the limit: how long they take besides depends on what
// else the machine does. Where that cannot be seen, they are stuck after twenty limits.
func (t *suite) run(ctx context.Context, id int, tests []string, limit time.Duration, args ...string) (outcome, error) {
	temp, err := os.MkdirTemp(t.scratch, "t")
	if err != nil {
		return outcome{}, err
	}
	defer func() { _ = os.RemoveAll(temp) }()
	limited, cancel := context.WithTimeout(ctx, 20*limit)
	defer cancel()
	computing := int(2 * limit.Seconds())
	args = append([]string{"-c", fmt.Sprintf(`ulimit -d %d && ulimit -t %d && exec "$0" "$@"`, memory, computing), t.program,
		"-test.timeout=0", "-test.run=^(" + strings.Join(tests, "|") + ")$"}, args...)
	cmd := exec.CommandContext(limited, "sh", args...)
	cmd.Dir = t.dir
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", variable, id), "TMPDIR="+temp)
	out := &ends{}
	cmd.Stdout, cmd.Stderr = out, out
	// A test that is ended leaves the processes that it started.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Start(); err != nil {
		return outcome{}, err
	}
	go func() {
		if idles(limited, cmd.Process.Pid, limit) {
			cancel()
		}
	}()
	err = cmd.Wait()
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // there is mostly nothing left
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return outcome{}, ctx.Err()
	case limited.Err() != nil:
		return outcome{stuck, ""}, nil
	case outOfTime(err):
		return outcome{hung, ""}, nil
	case err == nil, errors.Is(err, exec.ErrWaitDelay):
		return outcome{}, nil
	case !errors.As(err, &exit) || exit.ExitCode() > 2:
		return outcome{}, fmt.Errorf("the tests of %s cannot be run: %w: %s", t.name, err, out)
	}
	return outcome{failed, failure(out.bytes())}, nil
}

// outOfTime reports whether err says that a program has computed for too long.
func outOfTime(err error) bool {
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		return false
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && (status.Signal() == syscall.SIGXCPU || status.Signal() == syscall.SIGKILL)
}

// idles waits until no thread of a process has had anything to do for that long, and
// reports whether that happens before ctx ends. What waits for a processor has something
// to do.
func idles(ctx context.Context, process int, long time.Duration) bool {
	const period = 100 * time.Millisecond
	tick := time.NewTicker(period)
	defer tick.Stop()
	for idle := time.Duration(0); idle < long; idle += period {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
		if busy(process) {
			idle = 0
		}
	}
	return true
}

// busy reports whether a thread of a process does anything but wait to be woken: it runs,
// waits for a processor or for a disk, or somebody has stopped it.
func busy(process int) bool {
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", process))
	if err != nil {
		return true
	}
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		_, rest, _ := bytes.Cut(stat, []byte(") "))
		if len(rest) > 0 && rest[0] != 'S' {
			return true
		}
	}
	return len(stats) == 0
}

var failures = []*regexp.Regexp{regexp.MustCompile(`(?m)^\s*--- FAIL: (\S+)`), regexp.MustCompile(`(?m)^((?:panic|fatal error): .*)`)}

// failure returns the test that failed.
func failure(out []byte) string {
	for _, pattern := range failures {
		if match := pattern.FindSubmatch(out); match != nil {
			return string(match[1])
		}
	}
	return "a program that exits"
}

// ends keeps both ends of what is written.
type ends struct{ head, tail []byte }

// end is how much ends keeps of each.
const end = 64 << 10

func (e *ends) Write(p []byte) (int, error) {
	n := len(p)
	head := min(n, end-len(e.head))
	e.head = append(e.head, p[:head]...)
	e.tail = append(e.tail, p[head:]...)
	if len(e.tail) > 2*end {
		e.tail = bytes.Clone(e.tail[len(e.tail)-end:])
	}
	return n, nil
}

func (e *ends) bytes() []byte { return slices.Concat(e.head, e.tail) }

func (e *ends) String() string { return string(e.bytes()) }
