// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/muster-vm/muster/internal/cli"
)

// Bracketed paste lets the editor tell pasted text from typed keys; it is on
// only while the editor reads.
const (
	pasteOn  = "\x1b[?2004h"
	pasteOff = "\x1b[?2004l"
)

// shell is an interactive session.
type shell struct {
	s    *session
	t    *terminal
	ed   editor
	done bool
	told string // of a lost quorum
}

// builtins are words of the shell itself.
var builtins = []string{"clear", "exit", "help", "history", "quit"}

// interact is the loop of prompt and command.
func (s *session) interact(ctx context.Context, t *terminal) int {
	sh := &shell{s: s, t: t}
	if t.show(sh.greeting()) != nil {
		return cli.ExitFailed
	}
	for !sh.done {
		if sh.tellQuorum() != nil {
			break // the client has left
		}
		line, err := sh.readLine(ctx)
		if err != nil {
			break // the client has left
		}
		sh.execute(ctx, line)
	}
	return cli.ExitDone
}

func (sh *shell) greeting() string {
	cfg := &sh.s.c.s.cfg
	return fmt.Sprintf("Muster %s, cluster %s, node %s. You are %s, %s.\r\nTAB completes, help lists the commands, exit or Ctrl-D leaves.\r\n",
		plain(cfg.Version), plain(cfg.Cluster()), plain(cfg.Node()), sh.s.c.user, sh.s.c.role)
}

func (sh *shell) prompt() string {
	cfg := &sh.s.c.s.cfg
	return plain(sh.s.c.user + "@" + cfg.Cluster() + ":" + cfg.Node() + "> ")
}

// plain keeps printable ASCII: names are nothing else.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r > 0x7e {
			return -1
		}
		return r
	}, s)
}

// readLine edits one line. What is drawn waits until no more input does.
func (sh *shell) readLine(ctx context.Context) (string, error) {
	ed := &sh.ed
	ed.begin(sh.prompt())
	if err := sh.t.show(pasteOn); err != nil {
		return "", err
	}
	for more := false; ; {
		if !more {
			if err := sh.draw(); err != nil {
				return "", err
			}
		}
		b, waiting, err := sh.t.next(ctx)
		if errors.Is(err, errResized) {
			more, ed.dirty = false, true
			continue
		}
		if err != nil {
			return "", err
		}
		more = waiting
		switch ed.feed(b) {
		case evEnter:
			line := ed.text()
			ed.move(len(ed.line))
			err := errors.Join(sh.draw(), sh.t.show("\r\n"+pasteOff))
			ed.remember(line)
			return line, err
		case evCancel:
			err = errors.Join(sh.draw(), sh.t.show("^C\r\n"))
			ed.begin(sh.prompt())
			ed.pasting = false
		case evEnd:
			sh.done = true
			return "", sh.t.show(pasteOff + "\r\n")
		case evComplete:
			err = sh.complete(ctx)
		case evTooLong:
			err = sh.t.show(fmt.Sprintf("\r\x1b[Kmuster: the line is longer than %d KiB; all of it is dropped up to the next Enter\r\n", MaxLine>>10))
		}
		if err != nil {
			return "", err
		}
	}
}

func (sh *shell) draw() error {
	sh.ed.columns, _ = sh.t.size()
	return sh.t.show(sh.ed.draw())
}

// execute runs a line.
func (sh *shell) execute(ctx context.Context, line string) {
	words, err := split(line)
	if err == nil && len(words) == 0 {
		return
	}
	word := ""
	if len(words) > 0 {
		word = words[0]
	}
	switch word {
	case "exit", "quit", "logout":
		sh.done = true
		return
	case "history":
		for i, l := range sh.ed.history {
			fmt.Fprintf(sh.t, "%4d  %s\n", i+1, l)
		}
		return
	case "clear":
		_ = sh.t.show("\x1b[H\x1b[2J")
		return
	case "?":
		line = "help"
	}
	sh.s.onTerminal(ctx, sh.t, line)
	if line == "help" {
		fmt.Fprint(sh.t, helpNote)
	}
}

const helpNote = `
In this shell the word muster may be left out. There are also history, clear
and exit. TAB completes commands, flags and names; Ctrl-C ends a command; arrow
keys recall and edit lines. Ctrl-] detaches from the console of a VM.
`

// complete answers a TAB.
func (sh *shell) complete(ctx context.Context) error {
	ed := &sh.ed
	head, tail := string(ed.line[:ed.pos]), ed.line[ed.pos:]
	if len(tail) > 0 && tail[0] != ' ' {
		return nil // in the middle of a word
	}
	words, ok := unfinished(head)
	if !ok {
		return nil
	}
	word := words[len(words)-1]
	found := sh.candidates(ctx, words)
	switch common := commonPrefix(found); {
	case len(found) == 0:
		return nil
	case len(found) == 1:
		ed.insertText(strings.TrimPrefix(common, word))
		if len(tail) == 0 && !strings.HasSuffix(common, "=") {
			ed.insertText(" ")
		}
		return nil
	case len(common) > len(word):
		ed.insertText(strings.TrimPrefix(common, word))
		return nil
	}
	columns, _ := sh.t.size()
	ed.dirty = true
	return sh.t.show("\r\n" + listed(found, columns))
}

// candidates asks the command line, with a deadline; Ctrl-C ends the wait.
func (sh *shell) candidates(ctx context.Context, words []string) []string {
	ctx, cancel := context.WithTimeout(ctx, completionDeadline)
	defer cancel()
	_, end := sh.t.begin(cancel)
	defer end()
	st := sh.s.streams()
	st.In, st.Out, st.Err = strings.NewReader(""), io.Discard, io.Discard
	var out []string
	word := words[len(words)-1]
	if len(words) == 1 {
		for _, b := range builtins {
			if strings.HasPrefix(b, word) && b != "help" {
				out = append(out, b)
			}
		}
	}
	for _, c := range cli.Complete(ctx, words, st) {
		if plain(c) == c && strings.HasPrefix(c, word) {
			out = append(out, c)
		}
	}
	return out
}

func commonPrefix(list []string) string {
	if len(list) == 0 {
		return ""
	}
	p := list[0]
	for _, s := range list[1:] {
		for !strings.HasPrefix(s, p) {
			p = p[:len(p)-1]
		}
	}
	return p
}

// listed shows candidates in columns.
func listed(found []string, columns int) string {
	rest := 0
	if len(found) > maxListed {
		rest = len(found) - maxListed
		found = found[:maxListed]
	}
	widest := 0
	for _, f := range found {
		widest = max(widest, len(f))
	}
	perRow := max(columns/(widest+2), 1)
	var b strings.Builder
	for i, f := range found {
		b.WriteString(f)
		if (i+1)%perRow == 0 || i == len(found)-1 {
			b.WriteString("\r\n")
		} else {
			b.WriteString(strings.Repeat(" ", widest+2-len(f)))
		}
	}
	if rest > 0 {
		fmt.Fprintf(&b, "and %d more\r\n", rest)
	}
	return b.String()
}

// script runs the lines of a client that has no terminal, such as ssh -T with
// its input from a file. The commands have no input of their own.
func (s *session) script(ctx context.Context) int {
	s.c.busy.Add(1)
	defer s.c.busy.Add(-1)
	code := cli.ExitDone
	lines := bufio.NewScanner(&input{ch: s.ch})
	lines.Buffer(nil, MaxLine)
	for ctx.Err() == nil && lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		switch line {
		case "exit", "quit", "logout":
			return code
		}
		if line != "" && !strings.HasPrefix(line, "#") {
			code = s.plain(ctx, line, strings.NewReader(""))
		}
	}
	if err := lines.Err(); err != nil {
		fmt.Fprintf(s.ch.Stderr(), "muster: read commands: %v (a line has at most %d KiB)\n", err, MaxLine>>10)
		return cli.ExitUsage
	}
	return code
}
