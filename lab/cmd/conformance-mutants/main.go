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
	"strings"
	"syscall"
	"time"

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

// timeout is how long a suite may take, with what it takes to build it. That it took
// longer shows nothing.
const timeout = 15 * time.Minute

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
	dir, err := os.MkdirTemp("", "mutants-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	tried, bad := 0, 0
	for _, f := range table {
		for _, m := range f.mutants {
			if m.by == "" {
				m.by = f.by
			}
			if !pattern.MatchString(f.path+": "+m.name) || (by != "" && (by == attacks) != (m.by == attacks)) {
				continue
			}
			began := time.Now()
			tried++
			source, err := mutate(filepath.Join(root, f.path), m)
			noticed := ""
			if err == nil && !find {
				noticed, err = try(ctx, root, dir, f.path, source, m.by)
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				bad++
				noticed = "NOT CAUGHT: " + err.Error()
			}
			fmt.Printf("%-26s %-62s %-24s %5.1f s  %s\n", f.path, m.name, m.by, time.Since(began).Seconds(), noticed)
		}
	}
	if bad > 0 {
		return fmt.Errorf("%d of %d mutants were not caught", bad, tried)
	}
	if find {
		fmt.Printf("The lines of all %d mutants are where the table says.\n", tried)
		return nil
	}
	fmt.Printf("All %d mutants were caught.\n", tried)
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

// try runs a suite with source in the place of a file, and returns what failed. It
// is an error if nothing did, or if nothing was run.
func try(ctx context.Context, root, dir, path, source, suite string) (noticed string, err error) {
	mutated := filepath.Join(dir, "mutated.go")
	if err := os.WriteFile(mutated, []byte(source), 0o600); err != nil {
		return "", err
	}
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(root, path): mutated}})
	if err != nil {
		return "", err
	}
	overlayFile := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(overlayFile, overlay, 0o600); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	flags := []string{"-overlay=" + overlayFile, "-gcflags=all=-dwarf=false", "-ldflags=-w"}
	if suite == attacks {
		return attack(ctx, root, filepath.Join(dir, "conformance"), flags)
	}
	return test(ctx, root, strings.Fields(suite), flags)
}

// attack builds command conformance and runs it.
func attack(ctx context.Context, root, program string, flags []string) (noticed string, err error) {
	build := command(ctx, filepath.Join(root, "lab"), "go", append([]string{"build", "-o", program}, append(flags, "./cmd/conformance")...)...)
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("it does not compile: %s", out)
	}
	out, err := command(ctx, root, program, "-first").CombinedOutput()
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
		return "", errors.New("all attacks fail without it as well")
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

// test runs the tests of packages. Those of the lab are a module of their own.
func test(ctx context.Context, root string, packages, flags []string) (noticed string, err error) {
	if strings.HasPrefix(packages[0], "./lab/") {
		root = filepath.Join(root, "lab")
		for i, p := range packages {
			packages[i] = "./" + strings.TrimPrefix(p, "./lab/")
		}
	}
	args := append([]string{"test", "-count=1", "-failfast", "-vet=off", "-timeout=120s"}, flags...)
	out, err := command(ctx, root, "go", append(args, packages...)...).CombinedOutput()
	switch {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case err == nil:
		return "", errors.New("all tests pass without it as well")
	case strings.Contains(string(out), "[build failed]"), strings.Contains(string(out), "[setup failed]"):
		return "", fmt.Errorf("it does not compile: %s", out)
	}
	return found(out, `--- FAIL: (\S+)`, `panic: .*running tests:\n\s+(\S+)`, `(panic: .*)`), nil
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
