// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"go/ast"
	"go/constant"
	"go/token"
	"go/types"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/tools/go/packages"
)

// mutant is the program with one change.
type mutant struct {
	key
	id  int
	pkg string // import path
	// start and end are what it changes, in the file as it is.
	start, end token.Position
	edits      []edit
	// decl is the function that it is in, or the value of a package's variable.
	decl     ast.Node
	variable string // that variable, empty in a function
	// first and last are the lines of decl.
	first, last int
}

// key names a mutant by what it says rather than by where it stands, so that a line
// may move.
type key struct {
	File   string `json:"file"`   // from the project's root
	In     string `json:"in"`     // function, method or variable
	Line   string `json:"line"`   // text of the line
	Change string `json:"change"` // what is done to it
}

// edit replaces the bytes from start to end of a file.
type edit struct {
	start, end int
	text       string
}

// apply returns source with edits, whose positions count from base.
func apply(source string, base int, edits []edit) string {
	edits = slices.Clone(edits)
	slices.SortStableFunc(edits, func(a, b edit) int { return a.start - b.start })
	var b strings.Builder
	at := 0
	for _, e := range edits {
		b.WriteString(source[at : e.start-base])
		b.WriteString(e.text)
		at = e.end - base
	}
	b.WriteString(source[at:])
	return b.String()
}

// finder finds the mutants of a file.
type finder struct {
	pkg    *packages.Package
	path   string // from the project's root
	source string
	found  []*mutant
	// The declaration that is looked at.
	decl         ast.Node
	in, variable string
}

// find returns the mutants of a file.
//
// A condition is always true, and always false, rather than negated, and each side of
// && and || is left out, rather than the two swapped: whatever notices one of these
// notices the other, and not the other way round.
func find(pkg *packages.Package, file *ast.File, path, source string) []*mutant {
	f := &finder{pkg: pkg, path: path, source: source}
	for _, decl := range file.Decls {
		switch d := decl.(type) {
		case *ast.FuncDecl:
			if d.Body == nil || d.Name.Name == "_" {
				continue
			}
			f.decl, f.in, f.variable = d, functionName(d), ""
			f.walk(d)
		case *ast.GenDecl:
			if d.Tok != token.VAR {
				continue
			}
			for _, spec := range d.Specs {
				v := spec.(*ast.ValueSpec)
				if len(v.Names) != len(v.Values) {
					continue
				}
				for i, name := range v.Names {
					if name.Name == "_" {
						continue
					}
					f.decl, f.in, f.variable = v.Values[i], name.Name, name.Name
					f.walk(v.Values[i])
				}
			}
		}
	}
	seen := make(map[key]int)
	for _, m := range f.found {
		if seen[m.key]++; seen[m.key] > 1 {
			m.Change += fmt.Sprintf(" (%d)", seen[m.key])
		}
	}
	return f.found
}

func functionName(d *ast.FuncDecl) string {
	if d.Recv == nil || len(d.Recv.List) == 0 {
		return d.Name.Name
	}
	t := d.Recv.List[0].Type
	if star, ok := t.(*ast.StarExpr); ok {
		t = star.X
	}
	switch generic := t.(type) {
	case *ast.IndexExpr:
		t = generic.X
	case *ast.IndexListExpr:
		t = generic.X
	}
	return types.ExprString(t) + "." + d.Name.Name
}

func (f *finder) walk(root ast.Node) {
	ast.PreorderStack(root, nil, func(n ast.Node, stack []ast.Node) bool {
		at := place{f, stack}
		switch n := n.(type) {
		case *ast.BlockStmt:
			f.statements(n.List, append(slices.Clone(stack), n))
		case *ast.CaseClause:
			f.statements(n.Body, append(slices.Clone(stack), n))
			f.cases(n, at)
		case *ast.CommClause:
			f.statements(n.Body, append(slices.Clone(stack), n))
		case *ast.IfStmt:
			f.condition(n.Cond)
		case *ast.ForStmt:
			if n.Cond != nil { // always true never ends
				f.always(n.Cond, "false")
			}
		case *ast.ReturnStmt:
			f.results(n, at)
		case *ast.BinaryExpr:
			f.operands(n)
		case *ast.CallExpr:
			f.arguments(n)
		case *ast.CompositeLit:
			f.elements(n, at)
		}
		return true
	})
}

// place is where a node stands: the nodes around it.
type place struct {
	f     *finder
	stack []ast.Node
}

// statement returns the innermost statement around the place that stands in a list, nil
// if there is none.
func (p place) statement(n ast.Node) ast.Stmt {
	inner := n
	for _, outer := range slices.Backward(p.stack) {
		if s, ok := inner.(ast.Stmt); ok && slices.Contains(listOf(outer), s) {
			return s
		}
		inner = outer
	}
	return nil
}

// signature returns that of the innermost function around the place, nil if there is none.
func (p place) signature() *types.Signature {
	for _, outer := range slices.Backward(p.stack) {
		switch fn := outer.(type) {
		case *ast.FuncLit:
			return p.f.pkg.TypesInfo.TypeOf(fn).(*types.Signature)
		case *ast.FuncDecl:
			return p.f.pkg.TypesInfo.Defs[fn.Name].Type().(*types.Signature)
		}
	}
	return nil
}

func listOf(n ast.Node) []ast.Stmt {
	switch n := n.(type) {
	case *ast.BlockStmt:
		return n.List
	case *ast.CaseClause:
		return n.Body
	case *ast.CommClause:
		return n.Body
	}
	return nil
}

func (f *finder) offset(p token.Pos) int { return f.pkg.Fset.PositionFor(p, false).Offset }

// text returns the source of n.
func (f *finder) text(n ast.Node) string { return f.source[f.offset(n.Pos()):f.offset(n.End())] }

// add adds a mutant that does what change says to n.
func (f *finder) add(change string, n ast.Node, edits ...edit) {
	start, end := f.pkg.Fset.PositionFor(n.Pos(), false), f.pkg.Fset.PositionFor(n.End(), false)
	text := strings.Join(strings.Fields(f.text(n)), " ")
	if runes := []rune(text); len(runes) > 80 {
		text = string(runes[:80]) + "..."
	}
	line, _, _ := strings.Cut(f.source[start.Offset-start.Column+1:], "\n")
	f.found = append(f.found, &mutant{
		key:   key{f.path, f.in, strings.TrimSpace(line), change + ": " + text},
		pkg:   f.pkg.PkgPath,
		start: start, end: end, edits: edits,
		decl: f.decl, variable: f.variable,
	})
}

func (f *finder) replace(n ast.Node, text string) edit {
	return edit{f.offset(n.Pos()), f.offset(n.End()), text}
}

func (f *finder) insert(p token.Pos, text string) edit {
	return edit{f.offset(p), f.offset(p), text}
}

// used returns statements that use the variables that n uses, as Go refuses variables
// that nothing uses.
func (f *finder) used(n ast.Node) string {
	var b strings.Builder
	seen := make(map[types.Object]bool)
	ast.Inspect(n, func(inner ast.Node) bool {
		id, ok := inner.(*ast.Ident)
		if !ok {
			return true
		}
		v, ok := f.pkg.TypesInfo.Uses[id].(*types.Var)
		local := ok && !v.IsField() && v.Parent() != f.pkg.Types.Scope() && v.Pkg() == f.pkg.Types
		if local && !seen[v] && (v.Pos() < n.Pos() || v.Pos() >= n.End()) {
			seen[v] = true
			fmt.Fprintf(&b, "_ = %s; ", v.Name())
		}
		return true
	})
	return b.String()
}

// statements takes each statement of a list away.
func (f *finder) statements(list []ast.Stmt, stack []ast.Node) {
	for i, s := range list {
		last := i == len(list)-1 && isBody(stack)
		switch s := s.(type) {
		case *ast.AssignStmt:
			if s.Tok == token.DEFINE {
				f.values(s, s.Lhs, s.Rhs)
				continue
			}
			if isBlank(s.Lhs) {
				continue
			}
		case *ast.DeclStmt:
			for _, spec := range s.Decl.(*ast.GenDecl).Specs {
				if v, ok := spec.(*ast.ValueSpec); ok && len(v.Values) > 0 && s.Decl.(*ast.GenDecl).Tok == token.VAR {
					f.values(s, identifiers(v.Names), v.Values)
				}
			}
			continue
		case *ast.ReturnStmt:
			if last { // a function has to end with it, or ends anyway
				continue
			}
		case *ast.ExprStmt, *ast.SendStmt, *ast.IncDecStmt, *ast.GoStmt, *ast.DeferStmt, *ast.BranchStmt, *ast.ForStmt, *ast.RangeStmt, *ast.SelectStmt:
		default: // the parts of the others are taken away
			continue
		}
		if len(list) == 1 && bodyOfIf(stack) { // a condition that is always false does that
			continue
		}
		f.add("remove", s, f.replace(s, strings.TrimSuffix(f.used(s), "; ")))
	}
}

// isBody reports whether the innermost node is the body of a function.
func isBody(stack []ast.Node) bool {
	switch stack[max(0, len(stack)-2)].(type) {
	case *ast.FuncDecl, *ast.FuncLit:
		return true
	}
	return false
}

// bodyOfIf reports whether the innermost node is the body of an if without else.
func bodyOfIf(stack []ast.Node) bool {
	if len(stack) < 2 {
		return false
	}
	s, ok := stack[len(stack)-2].(*ast.IfStmt)
	return ok && s.Else == nil && s.Body == stack[len(stack)-1]
}

func isBlank(list []ast.Expr) bool {
	return !slices.ContainsFunc(list, func(e ast.Expr) bool {
		id, ok := e.(*ast.Ident)
		return !ok || id.Name != "_"
	})
}

func identifiers(names []*ast.Ident) (list []ast.Expr) {
	for _, name := range names {
		list = append(list, name)
	}
	return list
}

// values gives variables that s defines their zero values. Errors stay: what looks at
// them is a condition.
func (f *finder) values(s ast.Stmt, names, values []ast.Expr) {
	for i, name := range names {
		id, ok := name.(*ast.Ident)
		if !ok || id.Name == "_" || (len(values) == len(names) && f.isZero(values[i])) {
			continue
		}
		if isError(f.pkg.TypesInfo.TypeOf(id)) {
			continue
		}
		f.add("zero "+id.Name, s, f.insert(s.End(), fmt.Sprintf("; %s = zero__(%s)", id.Name, id.Name)))
	}
}

func isError(t types.Type) bool {
	return t != nil && types.Identical(t, types.Universe.Lookup("error").Type())
}

// isZero reports whether e is its type's zero value, or an empty composite literal.
func (f *finder) isZero(e ast.Expr) bool {
	switch e := ast.Unparen(e).(type) {
	case *ast.CompositeLit:
		return len(e.Elts) == 0
	case *ast.UnaryExpr:
		if lit, ok := e.X.(*ast.CompositeLit); ok && e.Op == token.AND {
			return len(lit.Elts) == 0
		}
	}
	v := f.pkg.TypesInfo.Types[e]
	if v.IsNil() {
		return true
	}
	if v.Value == nil {
		return false
	}
	switch v.Value.Kind() {
	case constant.Bool:
		return !constant.BoolVal(v.Value)
	case constant.String:
		return constant.StringVal(v.Value) == ""
	}
	return constant.Sign(v.Value) == 0
}

// condition makes a condition always true and always false. Sides of && and || that are
// left out stand for one of the two.
func (f *finder) condition(cond ast.Expr) {
	if f.pkg.TypesInfo.Types[cond].Value != nil {
		return
	}
	op := token.ILLEGAL
	if b, ok := ast.Unparen(cond).(*ast.BinaryExpr); ok {
		op = b.Op
	}
	if op != token.LAND {
		f.always(cond, "true")
	}
	if op != token.LOR {
		f.always(cond, "false")
	}
}

// always gives a condition a value. It is still evaluated, so that its variables are used.
func (f *finder) always(cond ast.Expr, value string) {
	op := " || "
	if value == "false" {
		op = " && "
	}
	f.add("always "+value, cond, f.insert(cond.Pos(), "(("), f.insert(cond.End(), ")"+op+value+")"))
}

// operands leaves out the sides of && and ||, and empties constants that are compared.
func (f *finder) operands(e *ast.BinaryExpr) {
	if f.pkg.TypesInfo.Types[e].Value != nil {
		return
	}
	switch e.Op {
	case token.LAND, token.LOR:
		value := "true"
		if e.Op == token.LOR {
			value = "false"
		}
		for _, side := range []ast.Expr{e.X, e.Y} {
			// The sides of a side that is the same are left out one by one.
			if b, ok := ast.Unparen(side).(*ast.BinaryExpr); !ok || b.Op != e.Op {
				f.always(side, value)
			}
		}
	case token.EQL, token.NEQ, token.LSS, token.LEQ, token.GTR, token.GEQ:
		f.empty(e.X)
		f.empty(e.Y)
	}
}

// empty empties a constant.
func (f *finder) empty(e ast.Expr) {
	v := f.pkg.TypesInfo.Types[e]
	if v.Value == nil || f.isZero(e) {
		return
	}
	switch v.Value.Kind() {
	case constant.String:
		f.add("empty", e, f.replace(e, `""`))
	case constant.Int, constant.Float:
		f.add("empty", e, f.replace(e, "0"))
	}
}

// comparing are the functions of package strings and bytes that compare, search or cut.
var comparing = regexp.MustCompile(`^(Compare|Contains|Count|Cut|Equal|Fields|Has|Index|Last|Split|Trim)`)

// arguments empties the constants that a call compares with.
func (f *finder) arguments(call *ast.CallExpr) {
	sel, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return
	}
	fn, ok := f.pkg.TypesInfo.Uses[sel.Sel].(*types.Func)
	if !ok || fn.Pkg() == nil || !slices.Contains([]string{"strings", "bytes"}, fn.Pkg().Path()) || !comparing.MatchString(fn.Name()) {
		return
	}
	for _, arg := range call.Args {
		f.empty(arg)
	}
}

// cases makes the cases of a switch without a value always true and always false, and
// takes away or empties the values of another one.
func (f *finder) cases(c *ast.CaseClause, at place) {
	s, ok := at.stack[max(0, len(at.stack)-2)].(*ast.SwitchStmt)
	if ok && s.Tag == nil {
		for _, e := range c.List {
			f.condition(e)
		}
		return
	}
	if len(c.List) > 1 {
		for i, e := range c.List {
			f.add("omit", e, f.omit(c.List, i, c.Colon))
		}
		return
	}
	for _, e := range c.List {
		f.empty(e)
	}
}

// omit returns the edit that takes away an element of a list that ends before end.
func (f *finder) omit(list []ast.Expr, i int, end token.Pos) edit {
	switch {
	case i < len(list)-1:
		return edit{f.offset(list[i].Pos()), f.offset(list[i+1].Pos()), ""}
	case i > 0:
		return edit{f.offset(list[i-1].End()), f.offset(list[i].End()), ""}
	}
	return edit{f.offset(list[i].Pos()), f.offset(end), ""}
}

// elements takes away the elements of lists and maps, and the fields of structs.
func (f *finder) elements(lit *ast.CompositeLit, at place) {
	t := f.pkg.TypesInfo.TypeOf(lit)
	if p, ok := t.Underlying().(*types.Pointer); ok {
		t = p.Elem()
	}
	_, isStruct := t.Underlying().(*types.Struct)
	_, isArray := t.Underlying().(*types.Array)
	for i, e := range lit.Elts {
		pair, keyed := e.(*ast.KeyValueExpr)
		if (isStruct && (!keyed || f.isZero(pair.Value))) || (isArray && !keyed && i < len(lit.Elts)-1) {
			continue
		}
		if v := f.pkg.TypesInfo.Types[e].Value; v != nil && v.Kind() == constant.Float {
			continue // a bucket of a histogram
		}
		edits := []edit{f.omit(lit.Elts, i, lit.Rbrace)}
		if s := at.statement(lit); s != nil {
			edits = append(edits, f.insert(s.Pos(), f.used(e)))
		}
		f.add("omit", e, edits...)
	}
}

// results returns zero values, one at a time.
func (f *finder) results(s *ast.ReturnStmt, at place) {
	signature := at.signature()
	if signature == nil || len(s.Results) == 0 {
		return
	}
	stmt := at.statement(s)
	if stmt == nil {
		return
	}
	results := signature.Results()
	if results.Len() != len(s.Results) { // those of a call
		var zeros []string
		for i := range results.Len() {
			zero := zeroOf(results.At(i).Type())
			if zero == "" {
				return
			}
			zeros = append(zeros, zero)
		}
		f.add("return zero", s, f.insert(stmt.Pos(), f.used(s)), f.replace(s.Results[0], strings.Join(zeros, ", ")))
		return
	}
	for i, e := range s.Results {
		t := results.At(i).Type()
		v := f.pkg.TypesInfo.Types[e]
		if basic, ok := t.Underlying().(*types.Basic); ok && basic.Info()&types.IsBoolean != 0 {
			switch {
			case v.Value == nil:
				f.condition(e)
			case f.isZero(e):
				f.add("return true", e, f.replace(e, "true"))
			default:
				f.add("return false", e, f.replace(e, "false"))
			}
			continue
		}
		if f.isZero(e) {
			continue
		}
		zero := zeroOf(t)
		if zero == "" {
			zero = "zero__(" + f.text(e) + ")"
		}
		f.add("return zero", e, f.insert(stmt.Pos(), f.used(e)), f.replace(e, zero))
	}
}

// zeroOf returns the zero value of t in Go, or "" if it cannot be written without t's name.
func zeroOf(t types.Type) string {
	if _, ok := t.(*types.TypeParam); ok {
		return ""
	}
	switch u := t.Underlying().(type) {
	case *types.Basic:
		switch {
		case u.Info()&types.IsString != 0:
			return `""`
		case u.Info()&types.IsBoolean != 0:
			return "false"
		case u.Info()&types.IsNumeric != 0:
			return "0"
		}
		return "nil"
	case *types.Struct, *types.Array:
		return ""
	}
	return "nil"
}
