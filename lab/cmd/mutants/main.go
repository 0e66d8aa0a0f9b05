// SPDX-License-Identifier: Apache-2.0

// Command mutants measures the tests by what they notice. It changes the packages that
// security rests on, one statement, condition, value or result at a time, and runs the tests
// that meet the change: first those of the package, then those of packages that use it. Each
// change has to make one fail, or has to stand in exceptions.yaml with a reason.
//
// Tools that are kept do less: github.com/go-gremlins/gremlins v0.6.0 changes operators and
// branches only, and no statement, result or constant; it builds the tests once for each
// mutant, and runs all tests of a package.
//
// The source is never touched, as the Go command is told to read other files in its place.
// These hold all mutants of a package, and an environment variable says which of them a
// process is. So the tests of a package are built once.
//
// It ends with status 1 if a mutant survives, or if an exception stands for nothing.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/tools/go/packages"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// secure are the packages that security rests on.
var secure = []string{
	"impersonate", "internal/authn", "internal/tailnet", "internal/accessreview", "internal/transport", "internal/pin",
	"internal/revocation", "internal/sessionrecording", "internal/recorder", "internal/apievents", "internal/quota",
	"internal/requestinfo", "internal/upgrade", "internal/matcher", "internal/glob", "internal/once", "caddyfile", ".",
}

// beside are folders of tests in the lab that judge the mutants of a package as well.
var beside = map[string][]string{
	"internal/accessreview": {"lab/accessreview"}, // with the API server's own code
	"internal/tailnet":      {"lab/testcontrol"},  // with nodes on a tailnet
}

// settings are what a run is told.
type settings struct {
	root       string
	packages   []string
	by         string // whose tests are run: one of those below
	exceptions string
	base       string // branch that lines have to differ from; empty for all lines
	function   string // one that mutants have to be in; empty for all
	excepted   bool   // try the exceptions, and nothing else
	list       bool   // only list the mutants
	verbose    bool
	atOnce     int
	patience   time.Duration // how long a mutant may compute or wait, besides what the tests take
	scratch    string
}

func main() {
	var s settings
	list := flag.String("packages", strings.Join(secure, " "), "folders of the packages, separated by blanks")
	flag.StringVar(&s.by, "by", byAll, "whose tests are run: own, those of a mutant's own package; importers, also those of packages that import it; handler, also those of the handler, which take longest; all, those of all three")
	flag.StringVar(&s.exceptions, "exceptions", "lab/cmd/mutants/exceptions.yaml", "list of exceptions, from the project's root")
	flag.StringVar(&s.base, "changed", "", "try the mutants of those lines only that differ from this branch")
	flag.StringVar(&s.function, "in", "", "try the mutants of this function only, such as Limits.Apply")
	flag.BoolVar(&s.excepted, "excepted", false, "try the exceptions instead, to see which of them a test notices by now")
	flag.BoolVar(&s.list, "list", false, "list the mutants, and try none")
	flag.BoolVar(&s.verbose, "v", false, "say what notices each mutant")
	flag.IntVar(&s.atOnce, "at-once", 2*runtime.NumCPU(), "how many mutants are tried at the same time; tests wait more than they compute")
	flag.Parse()
	if !slices.Contains([]string{byOwn, byImporters, byHandler, byAll}, s.by) {
		fmt.Fprintf(os.Stderr, "mutants: -by %q: must be own, importers, handler or all\n", s.by)
		os.Exit(2)
	}
	s.packages, s.patience = strings.Fields(*list), 5*time.Second
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root, err := lab.Root()
	if err == nil {
		s.root = root
		_, err = run(ctx, s)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

// The values of settings.by.
const (
	byOwn       = "own"
	byImporters = "importers"
	byHandler   = "handler"
	byAll       = "all"
)

// row is what became of the mutants of a package.
type row struct {
	name                          string
	mutants, own, other, hung     int
	excepted, survivors, notTried int
	took                          time.Duration
}

// run tries the mutants. It is an error if one survives.
func run(ctx context.Context, s settings) (rows []row, err error) {
	if s.scratch, err = os.MkdirTemp("", "mutants-"); err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(s.scratch) }()
	began := time.Now()
	var changed changes
	if s.base != "" {
		if changed, err = changedSince(ctx, s.root, s.base); err != nil {
			return nil, err
		}
		s.packages = slices.DeleteFunc(slices.Clone(s.packages), func(name string) bool { return !changed.in(name) })
		if len(s.packages) == 0 {
			fmt.Printf("No line of these packages differs from %s.\n", s.base)
			return nil, nil
		}
	}
	loaded, err := load(ctx, s)
	if err != nil {
		return nil, err
	}
	r := &runner{settings: s, changed: changed, paths: paths(loaded), schema: newSchema(s.root, s.scratch), judges: make(map[string]*suite)}
	if err := r.find(ctx, loaded); err != nil {
		return nil, err
	}
	if s.list {
		for _, m := range r.mutants {
			fmt.Printf("%s:%d: %s: %s\n", m.File, m.start.Line, m.In, m.Change)
		}
	}
	if s.list || len(r.mutants) == 0 {
		fmt.Printf("%d mutants\n", len(r.mutants))
		return r.rows, nil
	}
	if r.overlay, err = r.schema.overlay(); err != nil {
		return nil, err
	}
	if s.by != byOwn {
		if r.importers, err = importers(ctx, s); err != nil {
			return nil, err
		}
	}
	for _, name := range s.packages {
		if err := r.tryAll(ctx, name); err != nil {
			return nil, err
		}
	}
	return r.rows, r.report(time.Since(began))
}

// load loads the packages.
func load(ctx context.Context, s settings) ([]*packages.Package, error) {
	var patterns []string
	for _, name := range s.packages {
		patterns = append(patterns, "./"+name)
	}
	loaded, err := packages.Load(&packages.Config{
		Context: ctx,
		Dir:     s.root,
		Mode: packages.NeedName | packages.NeedFiles | packages.NeedCompiledGoFiles | packages.NeedImports | packages.NeedModule |
			packages.NeedSyntax | packages.NeedTypes | packages.NeedTypesInfo | packages.NeedTypesSizes,
		BuildFlags: buildFlags,
	}, patterns...)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, pkg := range loaded {
		for _, err := range pkg.Errors {
			errs = append(errs, err)
		}
	}
	return loaded, errors.Join(errs...)
}

// importers returns, for the folder of each package, those of the packages that import it, of
// the lab's tests, and last of the handler, which comes down to all of them.
func importers(ctx context.Context, s settings) (map[string][]string, error) {
	loaded, err := packages.Load(&packages.Config{Context: ctx, Dir: s.root, Mode: packages.NeedName | packages.NeedImports | packages.NeedModule | packages.NeedFiles}, "./...")
	if err != nil {
		return nil, err
	}
	folders := make(map[string]string)
	for _, pkg := range loaded {
		folder := strings.TrimPrefix(strings.TrimPrefix(pkg.PkgPath, pkg.Module.Path), "/")
		folders[pkg.PkgPath] = cmp.Or(folder, ".")
	}
	by := make(map[string][]string)
	for _, pkg := range loaded {
		if folders[pkg.PkgPath] == "." {
			continue
		}
		for path := range pkg.Imports {
			if folder, ok := folders[path]; ok && s.by != byHandler {
				by[folder] = append(by[folder], folders[pkg.PkgPath])
			}
		}
	}
	for _, folder := range folders {
		slices.Sort(by[folder])
		by[folder] = append(by[folder], beside[folder]...)
		if folder != "." && s.by != byImporters {
			by[folder] = append(by[folder], ".")
		}
	}
	return by, nil
}

// paths returns the import paths of packages.
func paths(loaded []*packages.Package) (list []string) {
	for _, pkg := range loaded {
		list = append(list, pkg.PkgPath)
	}
	return list
}

// runner tries mutants.
type runner struct {
	settings
	changed changes // nil for all lines
	paths   []string
	schema  *schema
	overlay string
	mutants []*mutant // those to try
	rows    []row
	// importers are the folders of the packages that import the one in a folder.
	importers map[string][]string
	// judges are suites of these folders, each built once something survives those before.
	judges    map[string]*suite
	survivors []*mutant
	hanging   []*mutant
	lock      sync.Mutex
}

// find finds the mutants to try, and writes the program with them.
func (r *runner) find(ctx context.Context, loaded []*packages.Package) error {
	exceptions, err := readExceptions(filepath.Join(r.root, r.exceptions))
	if err != nil {
		return err
	}
	rows := make(map[string]*row)
	files := make(map[string]bool)
	var all []*mutant
	next := 1
	for _, pkg := range loaded {
		var chosen []*mutant
		for i, file := range pkg.Syntax {
			source, err := os.ReadFile(pkg.CompiledGoFiles[i])
			if err != nil {
				return err
			}
			path, err := filepath.Rel(r.root, pkg.CompiledGoFiles[i])
			if err != nil {
				return err
			}
			files[path] = true
			folder := filepath.Dir(path)
			if rows[folder] == nil {
				rows[folder] = &row{name: folder}
			}
			found := find(pkg, file, path, string(source))
			all = append(all, found...)
			for _, m := range found {
				m.id = next
				next++
				m.first, m.last = pkg.Fset.Position(m.decl.Pos()).Line, pkg.Fset.Position(m.decl.End()).Line
				if (r.changed != nil && !r.changed.have(m)) || (r.function != "" && m.In != r.function) {
					continue
				}
				reason := exceptions[m.key]
				if reason != "" {
					rows[folder].excepted++
				}
				if (reason != "") == r.excepted {
					chosen = append(chosen, m)
				}
			}
		}
		if len(chosen) == 0 {
			continue
		}
		valid, err := r.schema.write(pkg, chosen)
		if err != nil {
			return err
		}
		folder := filepath.Dir(chosen[0].File)
		rows[folder].notTried = len(chosen) - len(valid)
		rows[folder].mutants = len(valid)
		r.mutants = append(r.mutants, valid...)
	}
	for _, name := range r.packages {
		if row := rows[filepath.Clean(name)]; row != nil {
			r.rows = append(r.rows, *row)
		}
	}
	return stale(exceptions, all, files)
}

// tryAll tries the mutants of the package in a folder.
func (r *runner) tryAll(ctx context.Context, name string) error {
	name = filepath.Clean(name)
	at := slices.IndexFunc(r.rows, func(row row) bool { return row.name == name })
	mutants := slices.DeleteFunc(slices.Clone(r.mutants), func(m *mutant) bool { return filepath.Dir(m.File) != name })
	if at < 0 || len(mutants) == 0 {
		return nil
	}
	row := &r.rows[at]
	began := time.Now()
	own, err := newSuite(ctx, r.settings, name, r.overlay, []string{mutants[0].pkg}, mutants)
	if err != nil {
		return err
	}
	left, err := r.tryBy(ctx, own, mutants, &row.own, &row.hung)
	if err != nil {
		return err
	}
	for _, then := range r.importers[name] {
		if len(left) == 0 {
			break
		}
		if r.judges[then] == nil {
			if r.judges[then], err = newSuite(ctx, r.settings, then, r.overlay, r.paths, r.mutants); err != nil {
				return err
			}
		}
		if left, err = r.tryBy(ctx, r.judges[then], left, &row.other, &row.hung); err != nil {
			return err
		}
	}
	row.survivors = len(left)
	row.took = time.Since(began)
	r.survivors = append(r.survivors, left...)
	fmt.Printf("%s: %d mutants, %d survive, %.1f min\n", name, row.mutants, row.survivors, row.took.Minutes())
	return nil
}

// tryBy lets a suite judge mutants, counts those that it notices and those that hang it,
// and returns the others.
func (r *runner) tryBy(ctx context.Context, judge *suite, mutants []*mutant, noticed, hanging *int) (left []*mutant, err error) {
	if len(judge.dropped) > 0 {
		slices.Sort(judge.dropped)
		fmt.Printf("%s: these tests fail without any mutant, so they do not count: %s\n", judge.name, strings.Join(judge.dropped, " "))
	}
	var g errgroup.Group
	g.SetLimit(r.atOnce)
	for _, m := range mutants {
		g.Go(func() error {
			got, err := judge.try(ctx, m.id)
			if err != nil {
				return err
			}
			r.lock.Lock()
			defer r.lock.Unlock()
			switch got.verdict {
			case passed:
				left = append(left, m)
			case hung, stuck:
				*hanging++
				got.by = "it hangs"
				r.hanging = append(r.hanging, m)
			case failed:
				*noticed++
			}
			if r.verbose {
				fmt.Printf("%s:%d: %s: %s: %s\n", m.File, m.start.Line, m.Change, judge.name, cmp.Or(got.by, "passes"))
			}
			return nil
		})
	}
	err = g.Wait()
	slices.SortFunc(left, func(a, b *mutant) int { return a.id - b.id })
	return left, err
}

// report prints what became of the mutants. It is an error if one survives.
func (r *runner) report(took time.Duration) error {
	if len(r.survivors) > 0 {
		fmt.Println("\nThese survive. Write a test, or an exception with a reason:")
		for _, m := range r.survivors {
			fmt.Printf("# %s:%d\n%s", m.File, m.start.Line, m.yaml())
		}
	}
	for _, m := range r.hanging {
		fmt.Printf("\nThis hangs, which counts as noticed: %s:%d: %s: %s", m.File, m.start.Line, m.In, m.Change)
	}
	fmt.Print("\n\n")
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "PACKAGE\tMUTANTS\tBY ITS TESTS\tBY OTHERS\tHUNG\tSURVIVORS\tEXCEPTIONS\tNO GO\tMINUTES\t")
	total := row{name: "all", took: took}
	for _, row := range append(r.rows, total) {
		if row.name == "all" {
			row = total
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%.1f\t\n", row.name, row.mutants, row.own, row.other, row.hung, row.survivors, row.excepted, row.notTried, row.took.Minutes())
		total.mutants += row.mutants
		total.own += row.own
		total.other += row.other
		total.hung += row.hung
		total.survivors += row.survivors
		total.excepted += row.excepted
		total.notTried += row.notTried
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if n := len(r.survivors); n > 0 && !r.excepted {
		return fmt.Errorf("%d of %d mutants survive", n, len(r.mutants))
	}
	return nil
}
