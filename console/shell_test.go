// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"strings"
	"testing"
	"time"
)

func TestShell(t *testing.T) {
	f := newFixture(t)
	s := f.onScreen(login{options: []string{"-tt"}})
	s.expect(`Muster 9\.9, cluster demo, node m1\. You are admin, administrator\.`)
	s.expect(prompt)
	s.send("vm show web1 -o name\r")
	s.expect(`vm/web1\r\n`)
	s.expect(prompt)
	s.send("muster vm show web2 -o name\r")
	s.expect(`vm/web2\r\n`)
	s.expect(prompt)
	s.send("vm show nope\r")
	s.expect(`muster: vm "nope" does not exist\r\n`)
	s.expect(prompt)
	s.send("context ls\r")
	s.expect(`not available in the shell`)
	s.expect(prompt)
	s.send("vm ls > /tmp/x\r")
	s.expect(`not possible here`)
	s.expect(prompt)
	s.send("help\r")
	s.expect(`Available Commands`)
	s.expect(`Ctrl-\] detaches`)
	s.expect(prompt)
	s.send("\x1b[A\x1b[A\x1b[A\x1b[A\r") // the fourth line back
	s.expect(`does not exist`)
	s.expect(prompt)
	s.send("history\r")
	s.expect(`1  vm show web1 -o name\r\n`)
	s.expect(prompt)
	s.send("vm shw\x03") // Ctrl-C drops the line
	s.expect(`\^C\r\n`)
	s.expect(prompt)
	s.send("vm show wbe1\x1b[D\x1b[D\x7f\x1b[Cb\x1b[F -o name\r") // wbe1, mended in the middle
	s.expect(`vm/web1\r\n`)
	s.expect(prompt)
	s.send("\x04")
	if code := s.exit(); code != 0 {
		t.Errorf("code %d", code)
	}
	for _, word := range []string{"exit", "quit"} {
		s := f.shell(login{})
		s.send(word + "\r")
		if code := s.exit(); code != 0 {
			t.Errorf("%s: code %d", word, code)
		}
	}
}

func TestCompletionByTab(t *testing.T) {
	f := newFixture(t)
	s := f.shell(login{})
	for _, c := range []struct{ typed, want string }{
		{"vm sho\t", `vm show `},
		{"vm show d\t", `vm show db1 `},      // a live name
		{"vm show w\t", `vm show web`},       // what both have in common
		{"vm show web\t", `web1  +web2\r\n`}, // and then the choice
		{"vm ls --la\t", `vm ls --labels `},
		{"vm ls -o j\t", `vm ls -o json `},
		{"vm ls --output=y\t", `vm ls --output=yaml `},
		{"muster vm sto\t", `muster vm stop `},
		{"get v\t", `get v(m|olume)?`},
		{"help vm sta\t", `help vm start `},
		{"his\t", `history `},
		{"user c\t", `user create `},
		{"context \t", `context `}, // nothing is offered
		{"vm ls --data\t", `vm ls --data`},
	} {
		s.send(c.typed)
		s.expect(c.want)
		s.send("\x03")
		s.expect(`\^C\r\n`)
		s.expect(prompt)
	}
	s.send("vm show d\t-o name\r")
	s.expect(`vm/db1\r\n`)
	s.send("exit\r")
	s.exit()
}

func TestCtrlCEndsTheCommandOnly(t *testing.T) {
	f := newFixture(t)
	s := f.shell(login{})
	for range 2 {
		s.send("watch vm\r")
		s.expect("web1")
		s.send("typed ahead\x03")
		s.expect(prompt)
		select {
		case <-f.rest.gone:
		case <-time.After(patience):
			t.Fatal("the watch goes on")
		}
	}
	s.send("vm show web1 -o name\r")
	s.expect(`vm/web1\r\n`)
	// Ctrl-C in the same packet as the command is for the command.
	s.expect(prompt)
	s.send("watch vm\r\x03")
	s.send("vm show web2 -o name\r")
	s.expect(`vm/web2\r\n`)
	s.send("exit\r")
	s.exit()
}

func TestTypedInputOfACommand(t *testing.T) {
	f := newFixture(t)
	s := f.shell(login{})
	s.send("image create disk --file -\rhellx\x7fo\rüä\x7f\r\x04")
	s.expect(`image disk created`)
	s.expect(prompt)
	f.rest.mu.Lock()
	got := strings.Join(f.rest.uploads, "|")
	f.rest.mu.Unlock()
	if got != "hello\nü\n" {
		t.Errorf("the content is %q", got)
	}
	s.send("exit\r")
	s.exit()
}

func TestConsoleAttachesAndDetaches(t *testing.T) {
	f := newFixture(t)
	attach := func(s *screen) {
		s.expect(`connected to web1 through m1; detach with Ctrl-\]`)
		s.expect("login: ")
		s.send("root\r\x03\x04\x1a") // all of it is for the guest
		s.expect("root\r\x03?")
		await(t, "the keys reach the guest", func() bool {
			f.rest.mu.Lock()
			defer f.rest.mu.Unlock()
			return bytes.HasSuffix(f.rest.typed, []byte("root\r\x03\x04\x1a"))
		})
		f.rest.print <- []byte("\x1b[?1049h\x1b[31mred\x1b]52;c;ZXZpbA==\x07\x1b[6n\x1b[c|\r\nline\n|")
		if got := s.expect(`\x1b\[\?1049h[^|]*\|[^|]*\|`); got != "\x1b[?1049h\x1b[31mred|\r\nline\n|" {
			t.Errorf("the guest's output came as %q", got)
		}
		s.send("\x1d")
		s.expect(`\x1b\[\?1049l\x1b\[!p\x1b\[\?9;1000`)
		s.expect("detached from web1")
	}
	s := f.onScreen(login{options: []string{"-tt"}}, "vm", "console", "web1")
	attach(s)
	if code := s.exit(); code != 0 {
		t.Errorf("code %d", code)
	}
	s = f.shell(login{})
	s.send("vm console web1\r")
	attach(s)
	s.expect(prompt)
	s.send("vm show web1 -o name\r") // the shell has its input back
	s.expect(`vm/web1\r\n`)
	s.expect(prompt)
	s.send("vm console web1\r")
	s.expect("login: ")
	f.rest.print <- nil
	s.expect("web1 has stopped")
	s.expect(prompt)
	s.send("vm show web2 -o name\r")
	s.expect(`vm/web2\r\n`)
	s.send("exit\r")
	s.exit()
}

func TestGuestEscapesInTheLogOnATerminal(t *testing.T) {
	f := newFixture(t)
	s := f.onScreen(login{options: []string{"-tt"}}, "vm", "console", "web1", "--log")
	if got := s.expect(`boot[^\n]*\n`); got != "boot done\r\n" {
		t.Errorf("the log came as %q", got)
	}
	s.exit()
}

func TestWindowChangesAreHeard(t *testing.T) {
	f := newFixture(t)
	s := f.shell(login{})
	long := strings.Repeat("a", 120)
	s.send(long)
	s.expect(`a{30}`)
	resize(t, s.pty, 200, 50)
	s.send("b") // redrawn with the new width: all of it fits
	await(t, "a full line", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return bytes.Contains(s.out[s.from:], []byte(long))
	})
	s.send("\x03")
	s.expect(prompt)
	s.send("exit\r")
	s.exit()
}

func TestTwoSessions(t *testing.T) {
	f := newFixture(t)
	one, two := f.shell(login{}), f.shell(login{})
	one.send("watch vm\r")
	one.expect("web1")
	two.send("vm show web1 -o name\r")
	two.expect(`vm/web1\r\n`)
	two.expect(prompt)
	one.send("\x03")
	one.expect(prompt)
	one.send("exit\r")
	one.exit()
	two.send("vm show web2 -o name\r")
	two.expect(`vm/web2\r\n`)
	two.send("exit\r")
	two.exit()
}

// pasteSize is what somebody may paste by mistake.
const pasteSize = 10 << 20

func TestAPasteOfTenMegabytes(t *testing.T) {
	f := newFixture(t)
	s := f.shell(login{})
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	s.send("\x1b[200~")
	chunk := strings.Repeat("x", 64<<10)
	for range pasteSize / len(chunk) {
		s.send(chunk)
	}
	s.send("\x1b[201~\r")
	s.expect(`the line is longer than 64 KiB; all of it is dropped up to the next Enter\r\n`)
	s.expect(prompt)
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 4<<20 {
		t.Errorf("the heap has grown by %d bytes", grown)
	}
	s.mu.Lock()
	if s.total > 1<<20 {
		t.Errorf("%d bytes were drawn", s.total)
	}
	s.mu.Unlock()
	s.send("vm show web1 -o name\r")
	s.expect(`vm/web1\r\n`)
	s.expect(prompt)
	// A line that is long but not too long works.
	s.send("vm show web1 -o name --labels ")
	s.send(strings.Repeat("y", 60<<10) + "\r")
	s.expect(`unknown flag`)
	s.expect(prompt)
	s.send("exit\r")
	s.exit()
}

// Of more than the shell keeps typed ahead, the rest waits; when nobody will take
// it any more the connection ends all the same, and with it the server.
func TestMuchTypedThatNobodyTakes(t *testing.T) {
	much := strings.Repeat("x", 16*maxTypeAhead)
	gone := func(t *testing.T, f *fixture) {
		t.Helper()
		await(t, "the connection is over", func() bool {
			f.srv.mu.Lock()
			defer f.srv.mu.Unlock()
			return len(f.srv.conns) == 0
		})
	}
	for name, words := range map[string][]string{"shell": nil, "command": {"watch", "vm"}} {
		t.Run("the client is lost in a "+name, func(t *testing.T) {
			f := newFixture(t)
			s := f.onScreen(login{options: []string{"-tt"}}, words...)
			if words == nil {
				s.expect(prompt)
				s.send("watch vm\r")
			}
			s.expect("web1")
			s.send(much)
			await(t, "no more is taken", func() bool {
				f.srv.mu.Lock()
				defer f.srv.mu.Unlock()
				for c := range f.srv.conns {
					c.mu.Lock()
					defer c.mu.Unlock()
					for term := range c.screen {
						term.mu.Lock()
						defer term.mu.Unlock()
						return len(term.buf) == maxTypeAhead
					}
				}
				return false
			})
			_ = s.cmd.Process.Kill()
			gone(t, f)
		})
	}
	t.Run("behind exit", func(t *testing.T) {
		f := newFixture(t)
		s := f.shell(login{})
		go func() { _, _ = s.pty.WriteString("exit\r" + much) }()
		if code := s.exit(); code != 0 {
			t.Errorf("code %d", code)
		}
		gone(t, f)
	})
	t.Run("the input of a command that takes none", func(t *testing.T) {
		f := newFixture(t)
		out, errOut, code := f.run(login{options: []string{"-tt"}, stdin: strings.NewReader(much)}, "vm", "show", "web1", "-o", "name")
		if code != 0 || out != "vm/web1\r\n" {
			t.Errorf("code %d, %q, stderr %q", code, out, errOut)
		}
		gone(t, f)
	})
}

// A paste takes a while to be worked off, which is of no use to a client that is
// gone, nor to a node that stops.
func TestWhatIsTypedEndsWithTheSession(t *testing.T) {
	term := newTerminal(nil, 80, 24, nil, nil)
	term.accept([]byte("xyz"))
	ctx, cancel := context.WithCancel(context.Background())
	if b, more, err := term.next(ctx); b != 'x' || !more || err != nil {
		t.Errorf("%q, %v, %v", b, more, err)
	}
	cancel()
	if b, _, err := term.next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%q, %v", b, err)
	}
}

// Many lines at once wait in the client; Ctrl-C ends a command in between.
func TestAPasteOfManyLines(t *testing.T) {
	f := newFixture(t)
	s := f.shell(login{})
	go func() {
		for range 100 {
			if _, err := s.pty.WriteString(strings.Repeat("history\r", 20)); err != nil {
				return
			}
		}
		_, _ = s.pty.WriteString("vm show web1 -o name\r")
	}()
	s.expect(`vm/web1\r\n`)
	s.expect(prompt)
	s.send("exit\r")
	s.exit()
}
