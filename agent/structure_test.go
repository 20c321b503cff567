package agent

import (
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Each file and each struct is about one concept: what outgrows these bounds has become several.
const (
	maxLines  = 400
	maxFields = 12
)

// TestFilesAndStructsAreAboutOneConcept counts the lines of the files of this package and of those that it is closest
// to, and the fields of their structs. An embedded struct is one field.
func TestFilesAndStructsAreAboutOneConcept(t *testing.T) {
	for _, dir := range []string{".", "../ownership", "../gossip"} {
		for set, file := range sources(t, dir) {
			if lines := set.File(file.Pos()).LineCount(); lines > maxLines {
				t.Errorf("%s has %d lines: want %d at most", set.Position(file.Pos()).Filename, lines, maxLines)
			}
			ast.Inspect(file, func(n ast.Node) bool {
				if s, ok := n.(*ast.StructType); ok && s.Fields.NumFields() > maxFields {
					t.Errorf("%s: a struct with %d fields: want %d at most", set.Position(s.Pos()), s.Fields.NumFields(), maxFields)
				}
				return true
			})
		}
	}
}

// TestDesiredIsNotChangedAfterItWasPlanned finds what writes into a plan.Desired that the package was given.
func TestDesiredIsNotChangedAfterItWasPlanned(t *testing.T) {
	for set, file := range sources(t, ".") {
		for _, decl := range file.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if !ok {
				continue
			}
			planned := desired(f)
			ast.Inspect(f, func(n ast.Node) bool {
				var written []ast.Expr
				switch n := n.(type) {
				case *ast.AssignStmt:
					written = n.Lhs
				case *ast.IncDecStmt:
					written = []ast.Expr{n.X}
				case *ast.CallExpr:
					if to, ok := n.Fun.(*ast.Ident); ok && slices.Contains([]string{"delete", "clear", "copy"}, to.Name) {
						written = n.Args[:1]
					}
				}
				for _, e := range written {
					if root, part := rootOf(e); part && slices.Contains(planned, root) {
						t.Errorf("%s: %s is changed, which was planned", set.Position(n.Pos()), root)
					}
				}
				return true
			})
		}
	}
}

// sources returns the files of a package that are no tests.
func sources(t *testing.T, dir string) map[*token.FileSet]*ast.File {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	files := map[*token.FileSet]*ast.File{}
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, path, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files[set] = file
	}
	if len(files) == 0 {
		t.Fatalf("there is no file in %s", dir)
	}
	return files
}

// desired returns the names of what a function has of type plan.Desired: parameters, and what it has planned or kept.
func desired(f *ast.FuncDecl) (names []string) {
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.Field:
			if strings.HasSuffix(types.ExprString(n.Type), "plan.Desired") {
				for _, name := range n.Names {
					names = append(names, name.Name)
				}
			}
		case *ast.AssignStmt:
			for _, from := range n.Rhs {
				call, ok := from.(*ast.CallExpr)
				if !ok {
					continue
				}
				if fun, ok := call.Fun.(*ast.SelectorExpr); ok && (fun.Sel.Name == "Build" || fun.Sel.Name == "Keeping") {
					if name, ok := n.Lhs[0].(*ast.Ident); ok {
						names = append(names, name.Name)
					}
				}
			}
		}
		return true
	})
	return names
}

// rootOf returns the variable that an expression is a part of; part is false where it is all of it.
func rootOf(e ast.Expr) (root string, part bool) {
	for {
		switch x := e.(type) {
		case *ast.SelectorExpr:
			e, part = x.X, true
		case *ast.IndexExpr:
			e, part = x.X, true
		case *ast.StarExpr:
			e, part = x.X, true
		case *ast.ParenExpr:
			e = x.X
		case *ast.Ident:
			return x.Name, part
		default:
			return "", false
		}
	}
}
