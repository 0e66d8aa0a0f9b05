// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// switchName is the environment variable that says which mutant a program is. Without
// it, all lines are in place.
const switchName = "CONFORMANCE_MUTANT"

// switched is the program with all mutants in it. Each function that has mutants has a
// copy for each, to which it leaves its work if the environment says so. So a suite is
// built once rather than once for each mutant.
type switched struct {
	overlay string // a file for -overlay
	// alone are the attempts that are not in it, as they change no function's body.
	alone map[int]bool
}

// edit replaces the bytes from start to end of a source.
type edit struct {
	start, end int
	text       string
}

// newSwitched writes the program with all attempts in it to the folder dir.
func newSwitched(root, dir string, attempts []attempt) (*switched, error) {
	s := &switched{overlay: filepath.Join(dir, "overlay.json"), alone: make(map[int]bool)}
	byPath := make(map[string][]int)
	for i, a := range attempts {
		byPath[a.path] = append(byPath[a.path], i)
	}
	replace := make(map[string]string)
	files := 0
	add := func(path, source string) error {
		replace[path] = filepath.Join(dir, fmt.Sprintf("file%d.go", files))
		files++
		return os.WriteFile(replace[path], []byte(source), 0o600)
	}
	for path, numbers := range byPath {
		path = filepath.Join(root, path)
		source, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		pkg, changed, err := s.withSwitches(string(source), attempts, numbers)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if err := add(path, changed); err != nil {
			return nil, err
		}
		variable := filepath.Join(filepath.Dir(path), "conformance_mutant.go")
		if err := add(variable, fmt.Sprintf("package %s\n\nimport \"os\"\n\nvar mutant__ = os.Getenv(%q)\n", pkg, switchName)); err != nil {
			return nil, err
		}
	}
	encoded, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return nil, err
	}
	return s, os.WriteFile(s.overlay, encoded, 0o600)
}

// withSwitches returns the source of a file with the attempts of those numbers in it,
// and the name of its package.
func (s *switched) withSwitches(source string, attempts []attempt, numbers []int) (pkg, changed string, err error) {
	fset := token.NewFileSet()
	parsed, err := parser.ParseFile(fset, "", source, parser.SkipObjectResolution)
	if err != nil {
		return "", "", err
	}
	offset := func(p token.Pos) int { return fset.File(p).Offset(p) }
	mutants := make(map[*ast.FuncDecl][]int)
	for _, i := range numbers {
		start := strings.Index(source, attempts[i].old)
		end := start + len(strings.TrimRight(attempts[i].old, "\n"))
		f := slices.IndexFunc(parsed.Decls, func(d ast.Decl) bool {
			f, ok := d.(*ast.FuncDecl)
			return ok && f.Body != nil && offset(f.Body.Lbrace) < start && end <= offset(f.End())
		})
		if f < 0 {
			s.alone[i] = true
			continue
		}
		function := parsed.Decls[f].(*ast.FuncDecl)
		mutants[function] = append(mutants[function], i)
	}

	var edits []edit
	copies := ""
	for f, numbers := range mutants {
		var receiver, arguments []string
		for _, field := range fieldsOf(f.Recv) {
			edits = append(edits, nameField(field, "receiver__", offset, &receiver)...)
		}
		for _, field := range fieldsOf(f.Type.Params) {
			edits = append(edits, nameField(field, "argument__", offset, &arguments)...)
		}
		call := func(name string) string {
			if len(receiver) > 0 {
				name = receiver[0] + "." + name
			}
			var types []string
			for _, field := range fieldsOf(f.Type.TypeParams) {
				for _, t := range field.Names {
					types = append(types, t.Name)
				}
			}
			if len(types) > 0 {
				name += "[" + strings.Join(types, ", ") + "]"
			}
			return name + "(" + strings.Join(arguments, ", ") + ")"
		}
		cases := "\nswitch mutant__ {\n"
		for _, i := range numbers {
			m := attempts[i].mutant
			name := fmt.Sprintf("%s__%d", f.Name.Name, i)
			head := source[offset(f.Pos()):offset(f.Name.Pos())]
			rest := source[offset(f.Name.End()):offset(f.End())] + "\n"
			copies += "\n" + head + name + strings.Replace(rest, m.old, m.new, 1)
			if len(fieldsOf(f.Type.Results)) > 0 {
				cases += fmt.Sprintf("case \"%d\":\nreturn %s\n", i, call(name))
			} else {
				cases += fmt.Sprintf("case \"%d\":\n%s\nreturn\n", i, call(name))
			}
		}
		at := offset(f.Body.Lbrace) + 1
		edits = append(edits, edit{at, at, cases + "}\n"})
	}
	slices.SortFunc(edits, func(a, b edit) int { return b.start - a.start })
	for _, e := range edits {
		source = source[:e.start] + e.text + source[e.end:]
	}
	return parsed.Name.Name, source + copies, nil
}

func fieldsOf(list *ast.FieldList) []*ast.Field {
	if list == nil {
		return nil
	}
	return list.List
}

// nameField adds to names what the parameters of field are called, as arguments of a
// call, and returns the edits that name those that have no name.
func nameField(field *ast.Field, prefix string, offset func(token.Pos) int, names *[]string) (edits []edit) {
	spread := ""
	if _, ok := field.Type.(*ast.Ellipsis); ok {
		spread = "..."
	}
	if len(field.Names) == 0 {
		name := fmt.Sprint(prefix, len(*names))
		at := offset(field.Type.Pos())
		edits = append(edits, edit{at, at, name + " "})
		*names = append(*names, name+spread)
	}
	for _, ident := range field.Names {
		name := ident.Name
		if name == "_" {
			name = fmt.Sprint(prefix, len(*names))
			edits = append(edits, edit{offset(ident.Pos()), offset(ident.End()), name})
		}
		*names = append(*names, name+spread)
	}
	return edits
}
