// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// changes are lines that differ from another branch.
type changes map[string][]lines // by file, from the project's root

type lines struct{ first, last int }

// changedSince returns the lines that the working tree has and the branch base did not have
// when it was left.
func changedSince(ctx context.Context, root, base string) (changes, error) {
	if _, err := git(ctx, root, "rev-parse", "--verify", "--quiet", base); err != nil {
		base = "origin/" + base // a clone of another branch has no other
	}
	diff, err := git(ctx, root, "diff", "--unified=0", "--no-color", "--no-ext-diff", "--merge-base", base, "--", "*.go")
	if err != nil {
		return nil, fmt.Errorf("%w; fetch the branch that CHANGED compares with, or name another one in BASE", err)
	}
	c := parseDiff(diff)
	fresh, err := git(ctx, root, "ls-files", "--others", "--exclude-standard", "--", "*.go")
	if err != nil {
		return nil, err
	}
	for _, path := range strings.Fields(fresh) {
		c[path] = []lines{{1, 1 << 30}}
	}
	return c, nil
}

func git(ctx context.Context, root string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", args...)
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		said := ""
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			said = ": " + strings.TrimSpace(string(exit.Stderr))
		}
		return "", fmt.Errorf("git %s: %w%s", args[0], err, said)
	}
	return string(out), nil
}

var hunk = regexp.MustCompile(`^@@ -\S+ \+(\d+)(?:,(\d+))? @@`)

func parseDiff(diff string) changes {
	c := make(changes)
	path := ""
	for line := range strings.Lines(diff) {
		if name, ok := strings.CutPrefix(line, "+++ b/"); ok {
			path = strings.TrimSpace(name)
			continue
		}
		match := hunk.FindStringSubmatch(line)
		if match == nil {
			continue
		}
		first, _ := strconv.Atoi(match[1])
		count := 1
		if match[2] != "" {
			count, _ = strconv.Atoi(match[2])
		}
		if count > 0 {
			c[path] = append(c[path], lines{first, first + count - 1})
		}
	}
	return c
}

// in reports whether a file in the folder of a package has changed, tests aside.
func (c changes) in(folder string) bool {
	for path := range c {
		if filepath.Dir(path) == filepath.Clean(folder) && !strings.HasSuffix(path, "_test.go") {
			return true
		}
	}
	return false
}

// have reports whether a line of m has changed.
func (c changes) have(m *mutant) bool {
	for _, l := range c[m.File] {
		if l.first <= m.end.Line && m.start.Line <= l.last {
			return true
		}
	}
	return false
}
