// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"strings"
	"testing"
	"unicode/utf8"
)

// typed feeds text to a new line and returns it as it is at Enter, or the
// last event.
func typed(e *editor, text string) (string, event) {
	e.columns = 80
	e.begin("> ")
	last := evNone
	for _, b := range []byte(text) {
		if ev := e.feed(b); ev != evNone {
			last = ev
			if ev == evEnter {
				return e.text(), ev
			}
		}
	}
	return e.text(), last
}

func TestEditor(t *testing.T) {
	for name, c := range map[string]struct{ in, want string }{
		"text":                    {"vm ls", "vm ls"},
		"backspace":               {"vmx\x7f ls\b\bls", "vm ls"},
		"left and insert":         {"vm s\x1b[Dl", "vm ls"},
		"home and end":            {"m ls\x1b[Hv\x1b[F!", "vm ls!"},
		"Ctrl-A and Ctrl-E":       {"m ls\x01v\x05!", "vm ls!"},
		"delete":                  {"vxm\x1b[D\x1b[D\x1b[3~", "vm"},
		"Ctrl-W":                  {"vm show  web1\x17x", "vm show  x"},
		"Ctrl-U and Ctrl-Y":       {"abc def\x1b[D\x1b[D\x1b[D\x15\x19\x19", "abc abc def"},
		"Ctrl-K":                  {"abc def\x01\x1b[1;5C\x0b", "abc"},
		"word left":               {"abc def\x1bbX", "abc Xdef"},
		"characters":              {"grüße☕\x7f!", "grüße!"},
		"broken UTF-8":            {"a\xff\xc3b", "ab"},
		"unknown sequences":       {"a\x1b[99;99~\x1b[?1;2c\x1bOP\x1bzb", "ab"},
		"endless sequence":        {"a\x1b[" + strings.Repeat("1", 40) + "b", "a" + strings.Repeat("1", 26) + "b"},
		"no bytes hide":           {"a\x00\x11\x13b", "ab"},
		"a pasted TAB is a blank": {"\x1b[200~a\tb\x04\x15c\x1b[201~d", "a bcd"},
		"beyond both ends":        {"\x1b[D\x7f\x1b[Ca\x1b[C\x1b[3~b", "ab"},
	} {
		t.Run(name, func(t *testing.T) {
			var e editor
			if got, _ := typed(&e, c.in+"\r"); got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
	var e editor
	for in, want := range map[string]event{"\x04": evEnd, "a\x04": evNone, "a\x03": evCancel, "a\t": evComplete, "a\n": evEnter} {
		if _, ev := typed(&e, in); ev != want {
			t.Errorf("%q: event %d, want %d", in, ev, want)
		}
	}
}

func TestEditorHistory(t *testing.T) {
	var e editor
	e.columns = 80
	for range 3 * maxHistory {
		e.remember("one")
		e.remember("two")
		e.remember("  ")
		e.remember(strings.Repeat("x", maxHistoryLine+1))
	}
	if len(e.history) != maxHistory {
		t.Errorf("%d lines are kept", len(e.history))
	}
	for in, want := range map[string]string{
		"\x1b[A": "two", "\x1b[A\x1b[A": "one", "new\x1b[A\x1b[B": "new", "\x10!\x0e\x10": "two", "\x1b[B": "",
	} {
		if got, _ := typed(&e, in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestEditorCRLFIsOneEnter(t *testing.T) {
	var e editor
	e.begin("> ")
	var enters int
	for _, b := range []byte("a\r\nb\n\r") {
		if e.feed(b) == evEnter {
			enters++
			e.begin("> ")
		}
	}
	if enters != 3 {
		t.Errorf("%d lines", enters)
	}
}

func TestLineOverTheLimit(t *testing.T) {
	var e editor
	text, _ := typed(&e, strings.Repeat("é", MaxLine/2)+"\r")
	if len(text) != MaxLine {
		t.Errorf("a line of the limit has %d bytes", len(text))
	}
	text, ev := typed(&e, strings.Repeat("é", MaxLine))
	if ev != evTooLong || text != "" {
		t.Errorf("event %d, %d bytes", ev, len(text))
	}
	if ev := e.feed('\r'); ev != evEnter || e.text() != "" {
		t.Errorf("what followed is %q", e.text())
	}
}

func FuzzEditor(f *testing.F) {
	f.Add([]byte("vm ls\x1b[A\x01\x0b\x19\x17\x1b[200~\t\x1b[201~☕漢\x7f\r"), uint8(40))
	f.Fuzz(func(t *testing.T, in []byte, columns uint8) {
		e := editor{columns: max(int(columns), minColumns)}
		e.begin("admin@demo:m1> ")
		for _, b := range in {
			if e.feed(b) == evEnter {
				e.remember(e.text())
				e.begin("> ")
			}
			row := e.draw()
			if !utf8.ValidString(e.text()) || len(e.text()) != e.bytes || e.pos < 0 || e.pos > len(e.line) || e.left > e.pos {
				t.Fatalf("%q: line %q of %d bytes, cursor %d, left %d", in, e.text(), e.bytes, e.pos, e.left)
			}
			if _, shown, ok := strings.Cut(row, "\r"); ok {
				shown, _, _ = strings.Cut(shown, "\x1b[K")
				if width(shown) >= e.columns {
					t.Fatalf("%q: a row of %d columns on %d", in, width(shown), e.columns)
				}
			}
		}
	})
}
