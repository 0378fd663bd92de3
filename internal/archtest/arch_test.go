// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package archtest holds the rules of the layers as tests; see
// docs/architecture.md. It has no other content.
package archtest

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/muster-vm/muster/"

type pkg struct {
	ImportPath string
	Dir        string
	Doc        string
	GoFiles    []string
	Imports    []string
	Deps       []string
	Standard   bool
}

// list asks the go command for all packages of the module.
func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Dir,Doc,GoFiles,Imports,Deps", "./...")
	cmd.Dir = "../.."
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pkgs []pkg
	dec := json.NewDecoder(out)
	for {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("go list: %v", err)
	}
	if len(pkgs) < 10 {
		t.Fatalf("go list found only %d packages", len(pkgs))
	}
	return pkgs
}

func short(p string) string { return strings.TrimPrefix(p, module) }

func top(p string) string {
	first, _, _ := strings.Cut(short(p), "/")
	return first
}

// layers from the top down. A package imports only packages of lower layers,
// or of its own module folder.
var layers = [][]string{
	{"cmd"},
	{"node"},
	{"rest", "console", "web", "hypervisor", "ha", "placement", "storage", "switch", "monitor", "task"},
	{"reconcile"},
	{"configdb"},
	{"api"},
	{"internal"},
}

func layer(p string) int {
	return slices.IndexFunc(layers, func(l []string) bool { return slices.Contains(l, top(p)) })
}

func TestImportsGoDownOnly(t *testing.T) {
	for _, p := range list(t) {
		from := layer(p.ImportPath)
		if from < 0 {
			t.Errorf("%s is in no layer", short(p.ImportPath))
			continue
		}
		for _, imp := range p.Imports {
			if !strings.HasPrefix(imp, module) || top(imp) == top(p.ImportPath) {
				continue
			}
			to := layer(imp)
			switch {
			case top(p.ImportPath) == "internal":
				// A leaf may use the types of api and nothing else of ours,
				// except the command line, which is a program in a folder.
				if top(imp) != "api" {
					t.Errorf("%s imports %s: internal packages are leaves", short(p.ImportPath), short(imp))
				}
			case to == from:
				t.Errorf("%s imports its sibling %s", short(p.ImportPath), short(imp))
			case to < from:
				t.Errorf("%s imports %s, which is above it", short(p.ImportPath), short(imp))
			}
		}
	}
}

func TestLibrariesStayInTheirFolders(t *testing.T) {
	rules := []struct {
		lib     string
		allowed []string
	}{
		{"github.com/hashicorp/raft", []string{"configdb"}},
		{"github.com/hashicorp/raft-boltdb", []string{"configdb"}},
		{"go.etcd.io/bbolt", []string{"configdb"}},
		{"github.com/hashicorp/memberlist", []string{"internal/gossip"}},
		{"github.com/hashicorp/go-msgpack", []string{"internal/gossip"}},
		{"github.com/digitalocean/go-qemu", []string{"hypervisor/qmp", "internal/qmptest"}},
		{"github.com/ovn-kubernetes/libovsdb", []string{"switch"}},
		{"github.com/gorilla/mux", []string{"rest"}},
		{"github.com/bougou/go-ipmi", []string{"internal/power"}},
		{"github.com/stmcginnis/gofish", []string{"internal/power"}},
		{"github.com/spf13/cobra", []string{"internal/cli", "console", "cmd/muster"}},
	}
	for _, p := range list(t) {
		for _, imp := range p.Imports {
			for _, r := range rules {
				if imp != r.lib && !strings.HasPrefix(imp, r.lib+"/") {
					continue
				}
				if !slices.ContainsFunc(r.allowed, func(a string) bool {
					s := short(p.ImportPath)
					return s == a || strings.HasPrefix(s, a+"/")
				}) {
					t.Errorf("%s imports %s, allowed only in %v", short(p.ImportPath), imp, r.allowed)
				}
			}
		}
	}
}

func TestSmallProgramsStaySmall(t *testing.T) {
	for _, p := range list(t) {
		switch s := short(p.ImportPath); s {
		case "api":
			for _, imp := range p.Imports {
				if strings.Contains(imp, ".") {
					t.Errorf("api imports %s: it may use the standard library only", imp)
				}
			}
		case "cmd/muster-guard", "internal/guard":
			for _, imp := range p.Deps {
				if strings.Contains(strings.Split(imp, "/")[0], ".") && !strings.HasPrefix(imp, "golang.org/x/sys") &&
					!strings.HasPrefix(imp, module+"internal/guard") && !strings.HasPrefix(imp, module+"internal/version") {
					t.Errorf("%s depends on %s: the guard has the standard library and x/sys only", s, imp)
				}
			}
		case "cmd/muster":
			for _, imp := range p.Deps {
				if strings.HasPrefix(imp, module) && (top(imp) == "node" || top(imp) == "configdb" || layer(imp) == 2) {
					t.Errorf("cmd/muster depends on %s: it talks only REST", short(imp))
				}
			}
		}
	}
}

func TestEveryPackageSaysWhatItIs(t *testing.T) {
	for _, p := range list(t) {
		if len(p.GoFiles) > 0 && p.Doc == "" {
			t.Errorf("%s has no package comment", short(p.ImportPath))
		}
	}
}

func TestMainsAreShort(t *testing.T) {
	const most = 150
	mains, err := filepath.Glob("../../cmd/*/main.go")
	if err != nil || len(mains) == 0 {
		t.Fatalf("no programs found: %v", err)
	}
	for _, m := range mains {
		b, err := os.ReadFile(m)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(b), "\n"); n > most {
			t.Errorf("%s has %d lines, at most %d", m, n, most)
		}
	}
}

func TestForbiddenFolderNames(t *testing.T) {
	for _, p := range list(t) {
		for _, part := range strings.Split(short(p.ImportPath), "/") {
			if slices.Contains([]string{"util", "utils", "common", "manager", "helper", "helpers", "misc"}, part) {
				t.Errorf("%s: a folder's name says its role", short(p.ImportPath))
			}
		}
	}
}

// scripts/test runs all packages with the race detector, and those that have tests which are
// not built with it once more without.
func TestWhatIsNotBuiltWithTheRaceDetectorIsRun(t *testing.T) {
	script, err := os.ReadFile("../../scripts/test")
	if err != nil {
		t.Fatal(err)
	}
	var plain []string
	for line := range strings.Lines(string(script)) {
		if words := strings.Fields(line); len(words) > 2 && words[0] == "go" && words[1] == "test" && strings.HasPrefix(words[2], "./") {
			plain = append(plain, words[2:]...)
		}
	}
	raced, found := testFiles(t, "-race"), 0
	for _, file := range testFiles(t) {
		if slices.Contains(raced, file) {
			continue
		}
		found++
		if dir := "./" + short(filepath.Dir(file)); !slices.Contains(plain, dir) {
			t.Errorf("%s is not built with the race detector, and scripts/test runs %s only with it", short(file), dir)
		}
	}
	if found == 0 {
		t.Error("no such file was found, and ha has one")
	}
}

// testFiles are those of all packages, as go test builds them.
func testFiles(t *testing.T, args ...string) []string {
	t.Helper()
	const format = `{{$p := .ImportPath}}{{range .TestGoFiles}}{{$p}}/{{.}}{{"\n"}}{{end}}{{range .XTestGoFiles}}{{$p}}/{{.}}{{"\n"}}{{end}}`
	cmd := exec.Command("go", append(append([]string{"list"}, args...), "-f", format, "./...")...)
	cmd.Dir, cmd.Stderr = "../..", os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	return strings.Fields(string(out))
}
