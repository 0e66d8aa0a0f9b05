// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/tools/go/packages"
)

// variable is the environment variable that says which mutant a program is. Without it,
// the program is as it should be.
const variable = "MUTANT"

// helpers is the file that each package gets.
const helpers = `package %s

import (
	"os"
	"strconv"
)

var mutant__, _ = strconv.Atoi(os.Getenv(%q))

func zero__[T any](T) (zero T) { return }
`

// schema writes packages with all of their mutants in them. Each function that has mutants
// has a copy for each, to which it leaves its work if the environment says so. So a program
// is built once rather than once for each mutant. Lines stay where they are, as coverage
// is asked for by line.
type schema struct {
	root, dir string
	replace   map[string]string // files, and what the Go command reads in their place
}

func newSchema(root, dir string) *schema {
	return &schema{root: root, dir: dir, replace: make(map[string]string)}
}

// overlay returns a file for -overlay.
func (s *schema) overlay() (string, error) {
	encoded, err := json.Marshal(map[string]any{"Replace": s.replace})
	if err != nil {
		return "", err
	}
	path := filepath.Join(s.dir, "overlay.json")
	return path, os.WriteFile(path, encoded, 0o600)
}

func (s *schema) add(path, text string) error {
	s.replace[path] = filepath.Join(s.dir, fmt.Sprintf("file%d.go", len(s.replace)))
	return os.WriteFile(s.replace[path], []byte(text), 0o600)
}

// write writes a package with mutants. It returns those that are Go: a function may lack
// its return without a statement.
func (s *schema) write(pkg *packages.Package, mutants []*mutant) (valid []*mutant, err error) {
	texts := make(map[string]string)
	for {
		wrong, err := s.check(pkg, mutants, texts)
		if err != nil {
			return nil, err
		}
		if len(wrong) == 0 {
			break
		}
		mutants = slices.DeleteFunc(slices.Clone(mutants), func(m *mutant) bool { return wrong[m.id] })
	}
	for path, text := range texts {
		if err := s.add(path, text); err != nil {
			return nil, err
		}
	}
	path := filepath.Join(filepath.Dir(pkg.CompiledGoFiles[0]), "zz_mutants.go")
	return mutants, s.add(path, fmt.Sprintf(helpers, pkg.Name, variable))
}

// check puts mutants into the texts of a package's files, and returns the IDs of those
// that are no Go.
func (s *schema) check(pkg *packages.Package, mutants []*mutant, texts map[string]string) (wrong map[int]bool, err error) {
	fset := token.NewFileSet()
	var files []*ast.File
	spans := make(map[string][]span)
	for i, file := range pkg.Syntax {
		path := pkg.CompiledGoFiles[i]
		source, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		w := &writer{pkg: pkg, file: file, fset: pkg.Fset, source: string(source)}
		for _, decl := range file.Decls {
			w.declaration(decl, mutants)
		}
		texts[path], spans[path] = w.text()
		parsed, err := parser.ParseFile(fset, path, texts[path], parser.SkipObjectResolution)
		if err != nil {
			return nil, fmt.Errorf("mutants that do not parse: %w", err)
		}
		files = append(files, parsed)
	}
	stub, err := parser.ParseFile(fset, "", fmt.Sprintf("package %s\nvar mutant__ int\nfunc zero__[T any](T) (zero T) { return }\n", pkg.Name), 0)
	if err != nil {
		return nil, err
	}
	wrong = make(map[int]bool)
	var other []error
	config := types.Config{
		Importer: importer{pkg.Types},
		Sizes:    pkg.TypesSizes,
		Error: func(err error) {
			var t types.Error
			if errors.As(err, &t) {
				p := fset.PositionFor(t.Pos, false)
				for _, s := range spans[p.Filename] {
					if s.start <= p.Line && p.Line <= s.end {
						wrong[s.id] = true
						return
					}
				}
			}
			other = append(other, err)
		},
	}
	if pkg.Module != nil {
		config.GoVersion = "go" + pkg.Module.GoVersion
	}
	_, _ = config.Check(pkg.PkgPath, fset, append(files, stub), nil) // its errors were told above
	if len(wrong) == 0 && len(other) > 0 {
		return nil, fmt.Errorf("%s with mutants in it: %w", pkg.PkgPath, errors.Join(other...))
	}
	return wrong, nil
}

// importer finds the packages that one imports.
type importer struct{ of *types.Package }

func (i importer) Import(path string) (*types.Package, error) {
	if path == "unsafe" {
		return types.Unsafe, nil
	}
	for _, p := range i.of.Imports() {
		if p.Path() == path {
			return p, nil
		}
	}
	return nil, fmt.Errorf("no package %s", path)
}

// span are the lines of a mutant's copy.
type span struct{ id, start, end int }

// writer writes a file with its mutants.
type writer struct {
	pkg    *packages.Package
	file   *ast.File
	fset   *token.FileSet
	source string
	edits  []edit
	copies []mutated
}

// mutated is a copy of a mutant's function.
type mutated struct {
	id   int
	text string
}

func (w *writer) offset(p token.Pos) int { return w.fset.PositionFor(p, false).Offset }

// declaration adds the mutants of a declaration.
func (w *writer) declaration(decl ast.Decl, mutants []*mutant) {
	if f, ok := decl.(*ast.FuncDecl); ok {
		of := slices.DeleteFunc(slices.Clone(mutants), func(m *mutant) bool { return m.decl != ast.Node(f) })
		if len(of) > 0 {
			w.function(f, of)
		}
		return
	}
	w.variables(decl, mutants)
}

// variables adds the mutants of package variables. A variable gets its other value in place
// of its own, as others may follow from it: those of its file's imports have to name its type.
// Where they do not, it gets the other value once all variables have theirs.
func (w *writer) variables(decl ast.Decl, mutants []*mutant) {
	cases := make(map[ast.Node]string)
	for _, m := range mutants {
		if m.variable == "" || m.decl.Pos() < decl.Pos() || decl.End() < m.decl.End() {
			continue
		}
		base, end := w.offset(m.decl.Pos()), w.offset(m.decl.End())
		value := apply(w.source[base:end], base, m.edits)
		t, ok := w.typeName(w.pkg.Types.Scope().Lookup(m.variable).Type())
		if !ok {
			w.copies = append(w.copies, mutated{m.id, fmt.Sprintf("func init() { if mutant__ == %d { %s = %s } }\n", m.id, m.variable, value)})
			continue
		}
		name := fmt.Sprintf("%s__%d", m.variable, m.id)
		w.copies = append(w.copies, mutated{m.id, fmt.Sprintf("func %s() %s { return %s }\n", name, t, value)})
		if cases[m.decl] == "" {
			w.edits = append(w.edits, edit{end, end, " }()"})
		}
		cases[m.decl] += fmt.Sprintf("case %d: return %s(); ", m.id, name)
	}
	for value, of := range cases {
		t, _ := w.typeName(w.pkg.Types.Scope().Lookup(variableOf(value, mutants)).Type())
		at := w.offset(value.Pos())
		w.edits = append(w.edits, edit{at, at, "func() " + t + " { switch mutant__ { " + of + "}; return "})
	}
}

// variableOf returns the variable with a value that mutants change.
func variableOf(value ast.Node, mutants []*mutant) string {
	i := slices.IndexFunc(mutants, func(m *mutant) bool { return m.decl == value })
	return mutants[i].variable
}

// typeName returns t as the file names it, and whether it can.
func (w *writer) typeName(t types.Type) (name string, ok bool) {
	ok = true
	name = types.TypeString(t, func(p *types.Package) string {
		if p == w.pkg.Types {
			return ""
		}
		for _, spec := range w.file.Imports {
			if of := w.pkg.TypesInfo.PkgNameOf(spec); of != nil && of.Imported() == p && of.Name() != "_" && of.Name() != "." {
				return of.Name()
			}
		}
		ok = false
		return p.Name()
	})
	return name, ok
}

func (w *writer) function(f *ast.FuncDecl, mutants []*mutant) {
	var receiver, arguments []string
	for _, field := range fieldsOf(f.Recv) {
		w.name(field, "receiver__", &receiver)
	}
	for _, field := range fieldsOf(f.Type.Params) {
		w.name(field, "argument__", &arguments)
	}
	call := func(name string) string {
		if len(receiver) > 0 {
			name = receiver[0] + "." + name
		}
		var of []string
		for _, field := range fieldsOf(f.Type.TypeParams) {
			for _, t := range field.Names {
				of = append(of, t.Name)
			}
		}
		if len(of) > 0 {
			name += "[" + strings.Join(of, ", ") + "]"
		}
		return name + "(" + strings.Join(arguments, ", ") + ")"
	}
	var cases strings.Builder
	cases.WriteString("switch mutant__ { ")
	base, named := w.offset(f.Pos()), w.offset(f.Name.End())
	for _, m := range mutants {
		name := fmt.Sprintf("%s__%d", f.Name.Name, m.id)
		text := apply(w.source[named:w.offset(f.End())], named, m.edits)
		w.copies = append(w.copies, mutated{m.id, w.source[base:w.offset(f.Name.Pos())] + name + text + "\n"})
		if len(fieldsOf(f.Type.Results)) > 0 {
			fmt.Fprintf(&cases, "case %d: return %s; ", m.id, call(name))
		} else {
			fmt.Fprintf(&cases, "case %d: %s; return; ", m.id, call(name))
		}
	}
	at := w.offset(f.Body.Lbrace) + 1
	w.edits = append(w.edits, edit{at, at, cases.String() + "}; "})
}

// text returns the file with its mutants, and their lines.
func (w *writer) text() (string, []span) {
	var b strings.Builder
	b.WriteString(apply(w.source, 0, w.edits))
	line := 1 + strings.Count(b.String(), "\n")
	var spans []span
	for _, c := range w.copies {
		b.WriteString("\n" + c.text)
		lines := strings.Count(c.text, "\n")
		spans = append(spans, span{c.id, line + 1, line + lines})
		line += 1 + lines
	}
	return b.String(), spans
}

func fieldsOf(list *ast.FieldList) []*ast.Field {
	if list == nil {
		return nil
	}
	return list.List
}

// name adds to names what the parameters of field are called, as arguments of a call, and
// names those that have no name.
func (w *writer) name(field *ast.Field, prefix string, names *[]string) {
	spread := ""
	if _, ok := field.Type.(*ast.Ellipsis); ok {
		spread = "..."
	}
	if len(field.Names) == 0 {
		name := fmt.Sprint(prefix, len(*names))
		at := w.offset(field.Type.Pos())
		w.edits = append(w.edits, edit{at, at, name + " "})
		*names = append(*names, name+spread)
	}
	for _, id := range field.Names {
		name := id.Name
		if name == "_" {
			name = fmt.Sprint(prefix, len(*names))
			w.edits = append(w.edits, edit{w.offset(id.Pos()), w.offset(id.End()), name})
		}
		*names = append(*names, name+spread)
	}
}
