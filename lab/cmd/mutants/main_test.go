// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// module returns settings for the module in testdata.
func module(t *testing.T) settings {
	t.Helper()
	root, err := filepath.Abs(filepath.Join("testdata", "module"))
	if err != nil {
		t.Fatal(err)
	}
	return settings{root: root, packages: []string{"gate"}, exceptions: "exceptions.yaml", by: byAll, atOnce: 2, patience: 5 * time.Second}
}

func TestFind_EveryKindOfChange(t *testing.T) {
	s := module(t)
	loaded, err := load(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	path := loaded[0].CompiledGoFiles[0]
	source, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string][]string)
	for _, m := range find(loaded[0], loaded[0].Syntax[0], "gate/gate.go", string(source)) {
		got[m.In] = append(got[m.In], m.Change)
	}
	want := map[string][]string{
		"Days":   {`omit: time.Sunday`},
		"Denied": {`omit: "root"`},
		"Check": {
			`remove: for _, name := range Denied { if v.Name == name { return errors.New("denied") } ...`,
			`always true: v.Name == "" || strings.HasPrefix(v.Name, "system:")`,
			`always false: v.Name == ""`, `always false: strings.HasPrefix(v.Name, "system:")`, `empty: "system:"`,
			`return zero: errors.New("no such visitor")`,
			`always true: v.Name == name`, `always false: v.Name == name`,
			`return zero: errors.New("denied")`,
		},
		"Enter": {
			`zero times: times, known := before[name]`, `zero known: times, known := before[name]`,
			`remove: defer func() { before[name]++ }()`, `remove: before[name]++`,
			`always true: !known`, `always false: !known`,
			`return zero: &Visitor{Name: name}`, `omit: Name: name`,
			`return zero: &Visitor{Name: name, Groups: []string{"known"}}`, `return zero: times`,
			`omit: Name: name`, `omit: Groups: []string{"known"}`, `omit: "known"`,
		},
		"Kind": {
			`remove: return "weekend"`, `omit: "saturday"`, `omit: "sunday"`, `return zero: "weekend"`,
			`remove: return "open"`, `always true: open`, `always false: open`, `return zero: "open"`,
		},
		"Visitor.Wait": {`remove: for n > 0 { n-- }`, `always false: n > 0`, `remove: n--`},
		"First": {
			`remove: for _, one := range all { if keep(one) { return one, true } }`, `always true: keep(one)`, `always false: keep(one)`,
			`return zero: one`, `return false: true`, `return zero: first`, `return true: false`,
		},
		"Unused": {`return zero: n + 1`},
		"Cached": {`always true: ok`, `always false: ok`, `return zero: v`, `return zero: 2 * n`},
	}
	if diff := cmp.Diff(want, got, cmpopts.SortSlices(strings.Compare)); diff != "" {
		t.Errorf("mutants (-want +got):\n%s", diff)
	}
}

func TestRun_TellsApartWhatBecomesOfMutants(t *testing.T) {
	s := module(t)
	rows, err := run(t.Context(), s)
	if err == nil || !strings.Contains(err.Error(), "mutants survive") {
		t.Errorf("got error %v; want one that says that mutants survive", err)
	}
	for i := range rows {
		rows[i].took = 0
	}
	want := []row{{name: "gate", mutants: 46, own: 39, other: 1, hung: 1, excepted: 1, survivors: 5}}
	if diff := cmp.Diff(want, rows, cmp.AllowUnexported(row{})); diff != "" {
		t.Errorf("rows (-want +got):\n%s", diff)
	}
}

func TestRun_ExceptionForNothingFails(t *testing.T) {
	s := module(t)
	list := filepath.Join(t.TempDir(), "exceptions.yaml")
	k := key{File: "gate/gate.go", In: "Check", Line: "if v.Name == nil {", Change: "always true: v.Name == nil"}
	if err := os.WriteFile(list, []byte(k.yaml()+"    it's equivalent\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.exceptions, err = filepath.Rel(s.root, list); err != nil {
		t.Fatal(err)
	}
	if _, err := run(t.Context(), s); err == nil || !strings.Contains(err.Error(), "stands for nothing") || !strings.Contains(err.Error(), k.Line) {
		t.Errorf("got error %v; want one that names the exception", err)
	}
	if err := os.WriteFile(list, []byte(k.yaml()), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := run(t.Context(), s); err == nil || !strings.Contains(err.Error(), "has no reason") {
		t.Errorf("got error %v; want one about the reason", err)
	}
}

func TestChanged_AreTheLinesSinceTheBranch(t *testing.T) {
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("git is not installed")
	}
	root := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run := func(args ...string) {
		t.Helper()
		cmd := exec.Command("git", append([]string{"-c", "user.name=test", "-c", "user.email=test@example.com"}, args...)...)
		cmd.Dir = root
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %s: %v: %s", args, err, out)
		}
	}
	write("old.go", "a\nb\nc\nd\n")
	write("same.go", "a\n")
	run("init", "-q", "-b", "main")
	run("add", ".")
	run("commit", "-q", "-m", "old")
	run("checkout", "-q", "-b", "change")
	write("old.go", "a\nB\nc\nd\ne\n") // one line each is changed and added
	run("commit", "-q", "-a", "-m", "change")
	write("new.go", "a\n")
	got, err := changedSince(t.Context(), root, "main")
	if err != nil {
		t.Fatal(err)
	}
	want := changes{"old.go": {{2, 2}, {5, 5}}, "new.go": {{1, 1 << 30}}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(lines{})); diff != "" {
		t.Errorf("changes (-want +got):\n%s", diff)
	}
	m := &mutant{key: key{File: "old.go"}}
	for line, want := range map[int]bool{1: false, 2: true, 3: false, 5: true} {
		m.start.Line, m.end.Line = line, line
		if got.have(m) != want {
			t.Errorf("line %d: got %t; want %t", line, !want, want)
		}
	}
	if !got.in(".") || got.in("internal") || (changes{"a_test.go": nil}).in(".") {
		t.Error("got other folders with changes than the root")
	}
	if _, err := changedSince(t.Context(), root, "nosuch"); err == nil || !strings.Contains(err.Error(), "BASE") {
		t.Errorf("got error %v; want one that names BASE", err)
	}
}

func TestEnds_KeepsBoth(t *testing.T) {
	e := &ends{}
	for range 1000 {
		_, _ = e.Write([]byte(strings.Repeat("x", 1000)))
	}
	_, _ = e.Write([]byte("last"))
	if got := e.bytes(); len(got) > 4*end || !strings.HasPrefix(string(got), "xxx") || !strings.HasSuffix(string(got), "last") {
		t.Errorf("got %d bytes", len(got))
	}
}

// What is listed has to be there.
func TestSecure_PackagesExist(t *testing.T) {
	for _, name := range secure {
		if files, err := filepath.Glob(filepath.Join("..", "..", "..", name, "*.go")); err != nil || len(files) == 0 {
			t.Errorf("no package in %s", name)
		}
	}
	if !slices.IsSorted(secure) && secure[len(secure)-1] != "." {
		t.Error("the handler, whose tests take longest, has to come last")
	}
}
