// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// event is what a key means beyond editing.
type event int

const (
	evNone     event = iota
	evEnter          // the line is complete
	evCancel         // Ctrl-C
	evEnd            // Ctrl-D on an empty line
	evComplete       // TAB
	evTooLong        // the line went over MaxLine; what follows is dropped up to Enter
)

// editor is the line being typed. It is fed byte by byte and draws itself when
// asked, on a single row that scrolls sideways: so a line of any length costs
// at most a row per redraw, and a paste is drawn once.
type editor struct {
	prompt  string
	columns int

	line     []rune
	pos      int // cursor, in runes
	bytes    int
	tooLong  bool
	pasting  bool
	afterCR  bool
	esc      []byte // of an escape sequence that is not complete
	char     []byte // of a character that is not complete
	left     int    // first rune shown
	dirty    bool
	history  []string
	at       int    // shown history entry; len(history): the line itself
	unsent   string // the line itself, while history is shown
	killed   []rune // what Ctrl-K, U or W took, for Ctrl-Y
	screenOp string // to be written before the next drawing
}

const maxEscape = 16

func (e *editor) text() string { return string(e.line) }

// begin starts an empty line.
func (e *editor) begin(prompt string) {
	e.prompt = prompt
	e.line, e.pos, e.bytes, e.left, e.tooLong = nil, 0, 0, 0, false
	e.at, e.unsent, e.dirty = len(e.history), "", true
}

// remember adds a line to the history.
func (e *editor) remember(line string) {
	if strings.TrimSpace(line) == "" || len(line) > maxHistoryLine || len(e.history) > 0 && e.history[len(e.history)-1] == line {
		return
	}
	if len(e.history) >= maxHistory {
		e.history = slices.Delete(e.history, 0, 1)
	}
	e.history = append(e.history, line)
}

// feed takes one byte of input.
func (e *editor) feed(b byte) event {
	afterCR := e.afterCR
	e.afterCR = false
	switch {
	case len(e.esc) > 0:
		e.escape(b)
		return evNone
	case b == esc:
		e.esc, e.char = append(e.esc, b), e.char[:0]
		return evNone
	case b == '\r' || b == '\n':
		if b == '\n' && afterCR {
			return evNone
		}
		e.afterCR = b == '\r'
		e.char = e.char[:0]
		return evEnter
	case b == 0x03:
		e.char = e.char[:0]
		return evCancel
	case e.tooLong:
		return evNone
	case b == '\t':
		if e.pasting {
			return e.insert(' ')
		}
		return evComplete
	case b < 0x20 || b == 0x7f:
		if e.pasting {
			return evNone
		}
		return e.control(b)
	}
	return e.character(b)
}

// character gathers UTF-8. What is none, or cannot be shown, is dropped.
func (e *editor) character(b byte) event {
	if b < 0x80 {
		e.char = e.char[:0]
		return e.insert(rune(b))
	}
	e.char = append(e.char, b)
	if !utf8.FullRune(e.char) {
		return evNone
	}
	r, n := utf8.DecodeRune(e.char)
	bad := r == utf8.RuneError && n == 1
	e.char = e.char[:0]
	if bad || !unicode.IsPrint(r) {
		return evNone
	}
	return e.insert(r)
}

func (e *editor) insert(r rune) event {
	if e.bytes+utf8.RuneLen(r) > MaxLine {
		e.line, e.pos, e.bytes, e.left, e.tooLong = nil, 0, 0, 0, true
		return evTooLong
	}
	if e.pos == len(e.line) {
		e.line = append(e.line, r)
	} else {
		e.line = slices.Insert(e.line, e.pos, r)
	}
	e.pos++
	e.bytes += utf8.RuneLen(r)
	e.dirty = true
	return evNone
}

// insertText puts a completion at the cursor.
func (e *editor) insertText(s string) {
	for _, r := range s {
		e.insert(r)
	}
}

// remove deletes runes from..to and puts the cursor there.
func (e *editor) remove(from, to int, keep bool) {
	from, to = max(from, 0), min(to, len(e.line))
	if from >= to {
		return
	}
	if keep {
		e.killed = slices.Clone(e.line[from:to])
	}
	for _, r := range e.line[from:to] {
		e.bytes -= utf8.RuneLen(r)
	}
	e.line = slices.Delete(e.line, from, to)
	e.pos, e.dirty = from, true
}

func (e *editor) move(to int) {
	e.pos, e.dirty = min(max(to, 0), len(e.line)), true
}

func (e *editor) control(b byte) event {
	switch b {
	case 0x01: // Ctrl-A
		e.move(0)
	case 0x02: // Ctrl-B
		e.move(e.pos - 1)
	case 0x04: // Ctrl-D
		if len(e.line) == 0 {
			return evEnd
		}
		e.remove(e.pos, e.pos+1, false)
	case 0x05: // Ctrl-E
		e.move(len(e.line))
	case 0x06: // Ctrl-F
		e.move(e.pos + 1)
	case 0x08, 0x7f:
		e.remove(e.pos-1, e.pos, false)
	case 0x0b: // Ctrl-K
		e.remove(e.pos, len(e.line), true)
	case 0x0c: // Ctrl-L
		e.screenOp, e.dirty = "\x1b[H\x1b[2J", true
	case 0x0e: // Ctrl-N
		e.recall(e.at + 1)
	case 0x10: // Ctrl-P
		e.recall(e.at - 1)
	case 0x15: // Ctrl-U
		e.remove(0, e.pos, true)
	case 0x17: // Ctrl-W
		e.remove(e.wordLeft(), e.pos, true)
	case 0x19: // Ctrl-Y
		e.insertText(string(e.killed))
	}
	return evNone
}

func (e *editor) wordLeft() int {
	i := e.pos
	for i > 0 && e.line[i-1] == ' ' {
		i--
	}
	for i > 0 && e.line[i-1] != ' ' {
		i--
	}
	return i
}

func (e *editor) wordRight() int {
	i := e.pos
	for i < len(e.line) && e.line[i] == ' ' {
		i++
	}
	for i < len(e.line) && e.line[i] != ' ' {
		i++
	}
	return i
}

// recall shows an entry of the history.
func (e *editor) recall(at int) {
	if at < 0 || at > len(e.history) || at == e.at {
		return
	}
	if e.at == len(e.history) {
		e.unsent = e.text()
	}
	text := e.unsent
	if at < len(e.history) {
		text = e.history[at]
	}
	e.at, e.line, e.bytes = at, []rune(text), len(text)
	e.left = 0
	e.move(len(e.line))
}

// escape takes a byte of an escape sequence and carries it out when complete.
func (e *editor) escape(b byte) {
	if b == esc || b < 0x20 {
		e.esc = e.esc[:0] // something else begins; the rest of this one is lost
		return
	}
	e.esc = append(e.esc, b)
	seq := string(e.esc[1:])
	switch {
	case len(seq) == 1 && (b == '[' || b == 'O'):
		return
	case seq[0] == '[' && (b < 0x40 || b > 0x7e) && len(e.esc) < maxEscape:
		return
	}
	e.esc = e.esc[:0]
	switch seq {
	case "[200~":
		e.pasting = true
		return
	case "[201~":
		e.pasting = false
		return
	}
	if e.pasting || e.tooLong {
		return
	}
	switch seq {
	case "[A", "OA":
		e.recall(e.at - 1)
	case "[B", "OB":
		e.recall(e.at + 1)
	case "[C", "OC":
		e.move(e.pos + 1)
	case "[D", "OD":
		e.move(e.pos - 1)
	case "[H", "OH", "[1~", "[7~":
		e.move(0)
	case "[F", "OF", "[4~", "[8~":
		e.move(len(e.line))
	case "[3~":
		e.remove(e.pos, e.pos+1, false)
	case "[1;5D", "[1;3D", "b":
		e.move(e.wordLeft())
	case "[1;5C", "[1;3C", "f":
		e.move(e.wordRight())
	case "\x7f":
		e.remove(e.wordLeft(), e.pos, true)
	case "d":
		e.remove(e.pos, e.wordRight(), true)
	}
}

// draw returns what shows the line, or nothing when it is shown already.
func (e *editor) draw() string {
	if !e.dirty {
		return ""
	}
	e.dirty = false
	prompt := e.prompt
	if width(prompt) > e.columns/2 {
		prompt = "> "
	}
	room := max(e.columns-1-width(prompt), 1)
	e.scroll(room)
	end, used := e.left, 0
	for end < len(e.line) && used+runeWidth(e.line[end]) <= room {
		used += runeWidth(e.line[end])
		end++
	}
	cursor := width(prompt)
	for _, r := range e.line[e.left:e.pos] {
		cursor += runeWidth(r)
	}
	op := e.screenOp
	e.screenOp = ""
	return fmt.Sprintf("%s\r%s%s\x1b[K\r\x1b[%dC", op, prompt, string(e.line[e.left:end]), cursor)
}

// scroll makes the cursor visible.
func (e *editor) scroll(room int) {
	if e.pos < e.left {
		e.left = e.pos
	}
	used, first := 0, e.pos
	for first > e.left && used+runeWidth(e.line[first-1]) <= room {
		first--
		used += runeWidth(e.line[first])
	}
	if first > e.left {
		// Half a row further, so that typing does not scroll at every key.
		e.left = min(first+room/2, e.pos)
	}
	// Nor is room left empty behind the end, as after the window grew.
	used = 0
	for i := e.left; i < len(e.line) && used <= room; i++ {
		used += runeWidth(e.line[i])
	}
	for e.left > 0 && used+runeWidth(e.line[e.left-1]) <= room {
		e.left--
		used += runeWidth(e.line[e.left])
	}
}

func width(s string) int {
	n := 0
	for _, r := range s {
		n += runeWidth(r)
	}
	return n
}

// runeWidth is how many columns a character takes on a terminal, near enough:
// East Asian wide forms and emoji two, combining marks none.
func runeWidth(r rune) int {
	switch {
	case r < 0x300:
		return 1
	case unicode.In(r, unicode.Mn, unicode.Me):
		return 0
	case r >= 0x1100 && r <= 0x115f, r >= 0x2e80 && r <= 0xa4cf, r >= 0xac00 && r <= 0xd7a3, r >= 0xf900 && r <= 0xfaff,
		r >= 0xfe30 && r <= 0xfe6f, r >= 0xff00 && r <= 0xff60, r >= 0xffe0 && r <= 0xffe6, r >= 0x1f300 && r <= 0x1faff,
		r >= 0x20000 && r <= 0x3fffd:
		return 2
	}
	return 1
}
