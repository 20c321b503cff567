package ownership

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The doc's premises name what keeps each of them: a method at least, and nothing that the code does not have.
func TestEachPremiseNamesWhatKeepsIt(t *testing.T) {
	all := names(t, ".", "")
	for _, pkg := range []string{"egress", "plan", "store"} {
		maps.Copy(all, names(t, "../"+pkg, pkg+"."))
	}
	for i, text := range premises(t) {
		kept := false
		for _, name := range regexp.MustCompile(`\b(?:[a-z]+\.)?[A-Za-z]\w*\.[A-Za-z]\w+`).FindAllString(text, -1) {
			method, is := all[name]
			if kept = kept || method; !is {
				t.Errorf("premise %d names %s, which is not in the code", i+1, name)
			}
		}
		if !kept {
			t.Errorf("premise %d names no method that keeps it: %s", i+1, text)
		}
	}
}

// Each premise is left out by a deliberate fault that a schedule or a test finds, or a test of its own is about it.
func TestEachPremiseIsTriedWithoutIt(t *testing.T) {
	tried := map[int]bool{}
	for _, m := range mutations {
		tried[m.premise] = true
	}
	tests := names(t, ".", "")
	for _, pkg := range []string{"agent", "store"} {
		maps.Copy(tests, names(t, "../"+pkg, pkg+"."))
	}
	for premise, test := range premiseTests {
		if tried[premise] = true; !tests[test] {
			t.Errorf("%s, of premise %d, is not there", test, premise)
		}
	}
	for i := range premises(t) {
		if !tried[i+1] {
			t.Errorf("nothing shows that premise %d is needed, or kept", i+1)
		}
	}
}

// Time is an argument, and whoever calls a machine waits until it has answered. What it imports is a matter of
// internal/imports.
func TestTheMachineHasNoClockAndStartsNothing(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	clock := []string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		set := token.NewFileSet()
		f, err := parser.ParseFile(set, file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt, *ast.SelectStmt, *ast.SendStmt:
				t.Errorf("%s: a goroutine or a channel", set.Position(n.Pos()))
			case *ast.SelectorExpr:
				if of, is := n.X.(*ast.Ident); is && of.Name == "time" && slices.Contains(clock, n.Sel.Name) {
					t.Errorf("%s: time.%s", set.Position(n.Pos()), n.Sel.Name)
				}
			}
			return true
		})
	}
}

// premises returns the numbered ones of the package's doc.
func premises(t *testing.T) (out []string) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), "doc.go", nil, parser.ParseComments|parser.PackageClauseOnly)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(f.Doc.Text(), "\n") {
		switch next := fmt.Sprintf("%d. ", len(out)+1); {
		case strings.HasPrefix(strings.TrimLeft(line, " "), next) && strings.HasPrefix(line, " "):
			out = append(out, strings.TrimPrefix(strings.TrimLeft(line, " "), next))
		case len(out) > 0 && strings.HasPrefix(line, " "):
			out[len(out)-1] += " " + strings.TrimSpace(line)
		}
	}
	if len(out) < 20 {
		t.Fatalf("%d premises in doc.go, want some 20", len(out))
	}
	return out
}

// names returns what a package declares, as Type.member for methods and fields; true for functions and methods.
func names(t *testing.T, dir, prefix string) map[string]bool {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]bool{}
	for _, file := range files {
		if !strings.HasSuffix(file.Name(), ".go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), dir+"/"+file.Name(), nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				name := d.Name.Name
				if d.Recv != nil {
					of := d.Recv.List[0].Type
					if star, is := of.(*ast.StarExpr); is {
						of = star.X
					}
					name = fmt.Sprint(of, ".", name)
				}
				out[prefix+name] = true
			case *ast.GenDecl:
				declared(d, prefix, out)
			}
		}
	}
	return out
}

// declared adds the constants, variables, types and fields of a declaration.
func declared(d *ast.GenDecl, prefix string, out map[string]bool) {
	for _, s := range d.Specs {
		switch s := s.(type) {
		case *ast.ValueSpec:
			for _, n := range s.Names {
				out[prefix+n.Name] = false
			}
		case *ast.TypeSpec:
			out[prefix+s.Name.Name] = false
			if of, is := s.Type.(*ast.StructType); is {
				for _, f := range of.Fields.List {
					for _, n := range f.Names {
						out[prefix+s.Name.Name+"."+n.Name] = false
					}
				}
			}
		}
	}
}
