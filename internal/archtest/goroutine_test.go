// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package archtest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// services are the packages whose code runs as supervised services of the
// daemon. A panic in a goroutine of theirs would end the whole daemon.
var services = []string{"rest", "console", "hypervisor", "ha", "placement", "storage", "switch", "monitor", "task", "reconcile", "node"}

// harmless are goroutines that only wait for something, by file, with the
// number of them.
var harmless = map[string]int{
	"console/conn.go":            3, // requests thrown away, keep-alive, the end of a connection
	"console/transport.go":       1, // net/http, which contains its own
	"switch/answer.go":           1, // dhcp.Serve contains each message
	"switch/ovs/ovs.go":          1, // waits for the end of the connection
	"switch/openflow/session.go": 1, // its decoding is a header and two numbers
	"switch/hostnet/host.go":     2, // one call in another namespace; throws updates away
	"hypervisor/qmp/conn.go":     1, // the decoding in it is contained
	"hypervisor/qmp/events.go":   1, // copies to a channel
}

// TestGoroutinesOfServicesAreContained: each "go" and each Go of a WaitGroup is
// in a contain.Group, calls contain, or is listed above.
func TestGoroutinesOfServicesAreContained(t *testing.T) {
	found := map[string]int{}
	for _, p := range list(t) {
		if !slices.Contains(services, top(p.ImportPath)) || strings.Contains(p.ImportPath, "test") {
			continue
		}
		for _, name := range p.GoFiles {
			path := filepath.Join(p.Dir, name)
			fset := token.NewFileSet()
			f, err := parser.ParseFile(fset, path, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			rel := filepath.ToSlash(filepath.Join(short(p.ImportPath), name))
			ast.Inspect(f, func(n ast.Node) bool {
				if started, ok := goroutine(n); ok && !contained(started) {
					if found[rel]++; found[rel] > harmless[rel] {
						t.Errorf("%s: a panic in this goroutine ends the daemon; start it with a contain.Group, or wrap what it does in contain.Call", fset.Position(n.Pos()))
					}
				}
				return true
			})
		}
	}
	for rel, n := range harmless {
		if found[rel] != n {
			t.Errorf("%s: %d goroutines are not contained, the list says %d", rel, found[rel], n)
		}
	}
}

// goroutine returns what a statement starts in a goroutine of its own, unless a
// contain.Group does, which is called group, or tasks where it is a field.
func goroutine(n ast.Node) (started ast.Node, ok bool) {
	switch n := n.(type) {
	case *ast.GoStmt:
		return n.Call, true
	case *ast.CallExpr:
		sel, isSel := n.Fun.(*ast.SelectorExpr)
		if !isSel || sel.Sel.Name != "Go" || len(n.Args) != 1 {
			return nil, false
		}
		switch x := sel.X.(type) {
		case *ast.Ident:
			return n.Args[0], x.Name != "group"
		case *ast.SelectorExpr:
			return n.Args[0], x.Sel.Name != "tasks"
		}
		return n.Args[0], true
	}
	return nil, false
}

// contained reports that what a goroutine does is wrapped.
func contained(n ast.Node) (yes bool) {
	ast.Inspect(n, func(n ast.Node) bool {
		sel, ok := n.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		x, isIdent := sel.X.(*ast.Ident)
		if isIdent && x.Name == "contain" || sel.Sel.Name == "alone" {
			yes = true
		}
		return true
	})
	return yes
}
