// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"bytes"
	"context"
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

// inShell runs a line as a shell inside a daemon does.
func inShell(t *testing.T, f *fakeCluster, stdin string, words ...string) (code int, out, errOut string) {
	t.Helper()
	var o, e bytes.Buffer
	s := shellStreams(f)
	s.In, s.Out, s.Err = strings.NewReader(stdin), &o, &e
	return Run(t.Context(), words, s), o.String(), e.String()
}

// roundTrip answers requests by a handler, without streams.
type roundTrip struct{ h http.Handler }

func (r roundTrip) RoundTrip(q *http.Request) (*http.Response, error) {
	rec := httptest.NewRecorder()
	r.h.ServeHTTP(rec, q)
	return rec.Result(), nil
}

func shellStreams(f *fakeCluster) Streams {
	return Streams{
		In: strings.NewReader(""), Out: &bytes.Buffer{}, Err: &bytes.Buffer{}, Now: time.Now, Version: "1",
		Getenv: func(name string) string { panic("the shell reads " + name) },
		Shell:  &Shell{Transport: roundTrip{f.node("local")}, Node: "m1"},
	}
}

func TestInsideTheShell(t *testing.T) {
	f, _ := newFake(t, t.TempDir())
	t.Cleanup(f.close)
	secret := filepath.Join(t.TempDir(), "secret.pub")
	if err := os.WriteFile(secret, []byte("ssh-ed25519 AAAA\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		words, stdin string
		code         int
		has          string
	}{
		{"muster vm create web1 --no-wait", "", 0, "asked for"},
		{"vm ls -o name", "", 0, "vm/web1"},
		{"raw put app/x -f -", "hello", 0, "revision"},
		{"raw get app/x", "", 0, "hello"},
		{"apply -f -", "meta: {kind: pool, name: p}\nspec: {type: dir, path: /srv/p}\n", 0, "created"},
		{"user create ann --ssh-key-file -", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFvKrZdGm0YVJ8oCjO3b4bq3wq0n0C0XbH4V2l0Y5Q2B x", 0, "created"},
		{"vm ls --data-dir /x", "", ExitRefused, "not available"},
		{"--server https://x vm ls", "", ExitRefused, "not available"},
		{"raw put app/x -f " + secret, "", ExitRefused, "opens no files"},
		{"apply -f " + secret, "", ExitRefused, "opens no files"},
		{"image create x --file " + secret, "", ExitRefused, "opens no files"},
		{"image upload x --file " + secret, "", ExitRefused, "opens no files"},
		{"user create x --ssh-key-file " + secret, "", ExitRefused, "opens no files"},
		{"context set x --server https://y", "", ExitRefused, "not available"},
		{"completion bash", "", ExitRefused, "not available"},
		{"cluster init", "", ExitRefused, "not available"},
		{"__complete vm", "", ExitUsage, "unknown"},
		{"", "", 0, "Usage:"},
	} {
		code, out, errOut := inShell(t, f, c.stdin, strings.Fields(c.words)...)
		if code != c.code || !strings.Contains(out+errOut, c.has) {
			t.Errorf("%s: code %d, want %d: %q %q", c.words, code, c.code, out, errOut)
		}
	}
}

func TestCompleteInsideTheShell(t *testing.T) {
	f, _ := newFake(t, t.TempDir())
	t.Cleanup(f.close)
	f.seed(t, api.KindVM, `{"meta":{"name":"web1"},"spec":{"cpus":1,"memory":"512M"}}`)
	f.seed(t, api.KindVM, `{"meta":{"name":"db1"},"spec":{"cpus":1,"memory":"512M"}}`)
	for words, want := range map[string]string{
		"v|":                        "version|vm|volume",
		"vm|star":                   "start",
		"muster|vm|start|":          "db1|web1",
		"vm|start|web1|":            "db1",
		"vm|show|w":                 "web1",
		"vm|show|web1|":             "",
		"vm|--project|x|show|d":     "db1",
		"get|vm|":                   "db1|web1",
		"vm|create|x|--ha|":         "none|restart",
		"vm|create|x|--ha=r":        "--ha=restart",
		"vm|ls|-o|y":                "yaml",
		"user|create|x|--role|":     "administrator|operator|viewer",
		"vm|ls|--serv":              "",
		"vm|create|x|--no-w":        "--no-wait",
		"vm|ls|--|--no":             "",
		"context|":                  "",
		"cluster|":                  "backup|ca|reboot|set|status|token|transfer",
		"help|vm|pau":               "pause",
		"nonsense|":                 "",
		"cluster|token|create|--ro": "--role",
	} {
		in := strings.Split(strings.TrimSuffix(words, "|"), "|")
		if strings.HasSuffix(words, "|") && words != "v|" {
			in = append(in, "")
		}
		if got := strings.Join(Complete(t.Context(), in, shellStreams(f)), "|"); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// Whatever command is added: in a shell it must not reach for the process.
func TestOnlyKnownPlacesTouchTheProcess(t *testing.T) {
	allowed := map[string][]string{
		"backup.go":           {"Lstat", "Open", "OpenFile", "O_CREATE", "O_EXCL", "O_WRONLY", "Remove", "Rename"},
		"app.go":              {"Stdin", "Stdout", "Stderr", "Getenv"}, // System
		"console.go":          {"Interrupt"},                           // not in a shell
		"contexts.go":         {"ReadFile", "Stat", "MkdirAll", "CreateTemp", "Rename", "Remove"},
		"docs.go":             {"MkdirAll", "WriteFile"},
		"globals.go":          {"ReadFile"}, // --cacert
		"haproof.go":          {"Open"},
		"image.go":            {"Stat", "Open"},
		"raw.go":              {"Open"},                   // readFile
		"vnc.go":              {"Interrupt", "WriteFile"}, // vm vnc is not in a shell, screenshot takes - there
		"terminal_windows.go": {"Stdout"},
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		tree, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(tree, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if x, ok := sel.X.(*ast.Ident); ok && x.Name == "os" && !slices.Contains(allowed[file], sel.Sel.Name) {
				t.Errorf("%s uses os.%s: a shell inside the daemon runs this too; take it from Streams, or refuse it there (noLocalFile) and add it here", file, sel.Sel.Name)
			}
			return true
		})
	}
}

// completing starts a fake cluster with the VM web1, and returns a function that
// runs a script in a real shell, in which muster is this program.
func completing(t *testing.T) func(shell string, args ...string) string {
	t.Helper()
	f, env := newFake(t, t.TempDir())
	t.Cleanup(f.close)
	f.seed(t, api.KindVM, `{"meta":{"name":"web1"},"spec":{"cpus":1,"memory":"512M"}}`)
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(dir, "muster")); err != nil { // testscript.Main goes by the name
		t.Fatal(err)
	}
	return func(shell string, args ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, shell, args...)
		cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "HOME="+dir, "TERM=dumb", "ZDOTDIR="+dir, "XDG_CONFIG_HOME="+dir, "XDG_DATA_HOME="+dir)
		for k, v := range env {
			cmd.Env = append(cmd.Env, k+"="+v)
		}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s (install the Debian package): %v\n%s", shell, err, out)
		}
		return string(out)
	}
}

// The scripts that "muster completion" prints work in the real shells.

func TestCompletionInBash(t *testing.T) {
	run := completing(t)
	out := run("bash", "--norc", "--noprofile", "-c", `
source <(muster completion bash) || exit 9
complete -p muster || exit 8
COMP_WORDS=(muster vm show w); COMP_CWORD=3; COMP_LINE='muster vm show w'; COMP_POINT=${#COMP_LINE}
_init_completion() { words=("${COMP_WORDS[@]}"); cword=$COMP_CWORD; cur=${COMP_WORDS[COMP_CWORD]}; prev=${COMP_WORDS[COMP_CWORD-1]}; }
__start_muster
echo "names: ${COMPREPLY[*]}"
COMP_WORDS=(muster vm sho); COMP_CWORD=2; COMP_LINE='muster vm sho'; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
__start_muster
echo "verbs: ${COMPREPLY[*]}"
`)
	for _, want := range []string{"complete -o default -F __start_muster muster", "names: web1", "verbs: show"} {
		if !strings.Contains(out, want) {
			t.Errorf("want %q in:\n%s", want, out)
		}
	}
}

// zsh completes in its line editor only, so it runs on a pseudo terminal.
func TestCompletionInZsh(t *testing.T) {
	run := completing(t)
	out := run("zsh", "-f", "-c", `
zmodload zsh/zpty || exit 9
try() { # LINE PATTERN: types the line and TAB in a new shell
	zpty z zsh -f -i
	zpty -w z 'PROMPT=; autoload -Uz compinit; compinit -u -D; source <(muster completion zsh); echo READY-$((40+2))'
	zpty -r z got '*READY-42*' || exit 8
	zpty -n -w z "$1"$'\t'
	zpty -r z got "$2" || exit 7
	print -r -- "completed: ${got}"
	zpty -d z
}
try 'muster vm show we' '*web1*'
try 'muster vm sho' '*show*'
try 'muster vm ls --outp' '*--output*'
`)
	for _, want := range []string{"show web1", "vm show", "--output"} {
		if !strings.Contains(out, want) {
			t.Errorf("want %q in:\n%s", want, out)
		}
	}
}

func TestCompletionInFish(t *testing.T) {
	run := completing(t)
	out := run("fish", "--no-config", "-c", `
muster completion fish | source
echo names (complete -C "muster vm show w")
echo verbs (complete -C "muster vm sho")
echo flags (complete -C "muster vm ls --outp")
`)
	for _, want := range []string{"names web1", "verbs show", "flags --output"} {
		if !strings.Contains(out, want) {
			t.Errorf("want %q in:\n%s", want, out)
		}
	}
}
