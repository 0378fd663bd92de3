// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"bytes"
	"io"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"
)

// Limits of the filter.
const (
	// maxSequence is the longest control sequence that is let through; no
	// terminal needs more.
	maxSequence = 128
	// maxString is how long the filter swallows a control string that does not
	// end. Then it takes the rest as text, so that a guest which forgets the end
	// does not silence its console for good.
	maxString = 64 << 10
)

type filterState int

const (
	stateText     filterState = iota
	stateEscape               // after ESC
	stateEscapeIn             // after ESC and an intermediate byte
	stateDropped              // after ESC and an intermediate byte that must not pass
	stateControl              // after CSI
	stateOSC                  // in an operating system command
	stateString               // in DCS, SOS, PM or APC
	statePalette              // after OSC P: Linux's palette, which has no end mark
)

// filter passes what a guest prints and takes out what would let it act on the
// person's terminal and not just show something there:
//
//   - operating system commands (clipboard, titles, colours, files), device
//     control strings and other control strings;
//   - every question that a terminal answers, since the answer would arrive as
//     if the person had typed it: device attributes, status and cursor reports,
//     mode and setting reports, window operations, the answer-back character;
//   - printing (media copy) and 8-bit control characters, of which those in
//     UTF-8 are understood as what they stand for.
//
// Colours, cursor movement, erasing, scrolling, the alternate screen, key and
// mouse modes pass; reset undoes them. The terminal is taken to be set to
// UTF-8. The filter is used by one goroutine at a time; mu only orders reset
// after the last write.
type filter struct {
	mu    sync.Mutex
	out   io.Writer
	state filterState
	// seq is the sequence so far, from ESC on.
	seq  []byte
	skip int  // bytes swallowed of a string, or left of a palette
	esc  bool // the last byte of a string was ESC
	// more bytes of a character of several bytes follow.
	char []byte
	more int
	// alternate and origin are set while the guest has these modes on; to leave
	// them moves the cursor, so that is done only then.
	alternate, origin bool
	// changed is set when a mode, a character set or the like was changed, and
	// painted while colours are on.
	changed, painted bool
	buf              bytes.Buffer
}

func newFilter(out io.Writer) *filter { return &filter{out: out} }

// Write implements io.Writer. It reports all of p as written unless the writer
// below fails.
func (f *filter) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.buf.Reset()
	for _, b := range p {
		f.byte(b)
	}
	if f.buf.Len() == 0 {
		return len(p), nil
	}
	if _, err := f.out.Write(f.buf.Bytes()); err != nil {
		return 0, err
	}
	if f.buf.Cap() > maxString {
		f.buf = bytes.Buffer{} // one large write must not hold its memory
	}
	return len(p), nil
}

const (
	bel = 0x07
	can = 0x18
	sub = 0x1a
	esc = 0x1b
)

func (f *filter) byte(b byte) {
	switch f.state {
	case stateOSC, stateString:
		f.string(b)
		return
	case statePalette:
		if f.skip--; f.skip <= 0 || b < 0x20 {
			f.state = stateText
		}
		return
	}
	if f.more > 0 {
		if b >= 0x80 && b <= 0xbf {
			f.char = append(f.char, b)
			if f.more--; f.more == 0 {
				f.character()
			}
			return
		}
		f.more = 0 // a character that was cut off: nothing of it is shown
	}
	switch {
	case b == esc:
		f.state, f.seq = stateEscape, append(f.seq[:0], esc)
	case b < 0x20 || b == 0x7f:
		f.control(b)
	case b < 0x80:
		f.plain(b)
	default:
		f.lead(b)
	}
}

// control passes the control characters that only move the cursor or ring.
// Inside a sequence they end it: what the guest meant is then not certain.
func (f *filter) control(b byte) {
	f.state = stateText
	switch b {
	case '\b', '\t', '\n', '\v', '\f', '\r', bel, 0x0e, 0x0f:
		f.changed = f.changed || b == 0x0e
		f.buf.WriteByte(b)
	}
}

// plain takes a byte from 0x20 to 0x7e.
func (f *filter) plain(b byte) {
	switch f.state {
	case stateEscape:
		f.afterEscape(b)
	case stateDropped:
		if b >= 0x30 {
			f.state = stateText
		}
	case stateEscapeIn:
		f.seq = append(f.seq, b)
		switch {
		case len(f.seq) > maxSequence:
			f.state = stateText
		case b >= 0x30:
			f.state, f.changed = stateText, true
			f.buf.Write(f.seq) // character sets and the like
		}
	case stateControl:
		f.seq = append(f.seq, b)
		switch {
		case b >= 0x40:
			f.state = stateText
			f.sequence()
		case len(f.seq) > maxSequence:
			f.state = stateText
		}
	default:
		f.buf.WriteByte(b)
	}
}

func (f *filter) afterEscape(b byte) {
	switch b {
	case '[':
		f.state, f.seq = stateControl, append(f.seq, b)
	case ']':
		f.state, f.skip, f.esc = stateOSC, 0, false
	case 'P', 'X', '^', '_', 'k': // k: the title of screen and tmux
		f.state, f.skip, f.esc = stateString, 0, false
	case '7', '8', '=', '>', 'D', 'E', 'H', 'M', 'N', 'O':
		f.state = stateText
		f.changed = f.changed || b == '=' || b == '>'
		f.buf.Write(append(f.seq, b))
	case '(', ')', '*', '+', '#':
		f.state, f.seq = stateEscapeIn, append(f.seq, b)
	default:
		// ESC Z asks, ESC c clears all, ESC % leaves UTF-8, ESC l locks memory.
		f.state = stateText
		if b < 0x30 {
			f.state, f.seq = stateDropped, f.seq[:0]
		}
	}
}

// finals are the control sequences that pass: those that show something. A
// question, a report or an operation on the window is not among them.
const finals = "@ABCDEFGHIJKLMPSTXZ`abdefgmrsu"

// Modes that pass. The others lock the keyboard, resize the window, write log
// files or make the terminal report by itself.
var (
	ansiModes    = []string{"4", "20"}
	privateModes = []string{
		"1", "5", "6", "7", "12", "25", "45", "47", "66", "69", "9", "1000", "1002", "1003", "1004", "1005", "1006",
		"1015", "1016", "1047", "1048", "1049", "2004", "2026",
	}
)

// sequence passes the control sequence that has just ended, or what of it may
// pass.
func (f *filter) sequence() {
	body, final := f.seq[2:len(f.seq)-1], f.seq[len(f.seq)-1]
	switch {
	case final != 'h' && final != 'l':
		if allowed(body, final) {
			switch final {
			case 'm':
				f.painted = len(body) > 0 && string(body) != "0"
			case 'r', 'q':
				f.changed = true
			}
			f.buf.Write(f.seq)
		}
	case bytes.HasPrefix(body, []byte("?")):
		f.modes("?", body[1:], final, privateModes)
	default:
		f.modes("", body, final, ansiModes)
	}
}

// modes passes those of a list of modes that are known to be harmless.
func (f *filter) modes(prefix string, body []byte, final byte, known []string) {
	var pass []string
	for mode := range strings.SplitSeq(string(body), ";") {
		if !slices.Contains(known, mode) {
			continue
		}
		pass = append(pass, mode)
		switch {
		case prefix == "":
		case mode == "47", mode == "1047", mode == "1049":
			f.alternate = final == 'h'
		case mode == "6":
			f.origin = final == 'h'
		}
	}
	if len(pass) > 0 {
		f.changed = true
		f.buf.WriteString("\x1b[" + prefix + strings.Join(pass, ";") + string(final))
	}
}

// allowed decides about a sequence other than a change of modes.
func allowed(body []byte, final byte) bool {
	private, intermediate := byte(0), byte(0)
	for i, b := range body {
		switch {
		case b >= 0x3c && b <= 0x3f:
			if i > 0 {
				return false
			}
			private = b
		case b < 0x30:
			intermediate = b
		}
	}
	switch {
	case intermediate == ' ' && final == 'q', intermediate == '!' && final == 'p':
		return private == 0 // shape of the cursor, soft reset
	case intermediate != 0:
		return false
	case private == '?':
		return final == 'J' || final == 'K'
	case final == 'T' && bytes.IndexByte(body, ';') >= 0:
		return false // highlight tracking: the terminal waits for an answer
	case private != 0:
		// > and < and =: key protocols of terminals, and questions.
		return false
	}
	return bytes.IndexByte([]byte(finals), final) >= 0
}

// lead takes the first byte of a character of several bytes. Anything that is
// not UTF-8 is dropped, as it might be an 8-bit control character.
func (f *filter) lead(b byte) {
	f.char = append(f.char[:0], b)
	switch {
	case b >= 0xc2 && b <= 0xdf:
		f.more = 1
	case b >= 0xe0 && b <= 0xef:
		f.more = 2
	case b >= 0xf0 && b <= 0xf4:
		f.more = 3
	}
}

// character passes a complete one. U+0080 to U+009F are the control characters
// of 8 bits: each stands for ESC and a letter.
func (f *filter) character() {
	if f.char[0] == 0xc2 && f.char[1] < 0xa0 {
		f.state, f.seq = stateEscape, append(f.seq[:0], esc)
		f.plain(f.char[1] - 0x40)
		return
	}
	f.state = stateText     // a sequence consists of ASCII only
	if utf8.Valid(f.char) { // an overlong form may hide a control character
		f.buf.Write(f.char)
	}
}

// string swallows a control string up to its end.
func (f *filter) string(b byte) {
	f.skip++
	wasEsc, osc := f.esc, f.state == stateOSC
	f.esc = b == esc
	switch {
	case wasEsc && b != '\\':
		// ESC and anything but \ : the string is over and a sequence begins.
		f.state, f.seq = stateText, f.seq[:0]
		f.byte(esc)
		f.byte(b)
	case wasEsc, b == can, b == sub, b == bel && osc:
		f.state = stateText
	case f.char1(b, 0x9c): // U+009C, string terminator
		f.state = stateText
	case osc && f.skip == 1 && b == 'R':
		f.state = stateText // Linux: reset the palette
	case osc && f.skip == 1 && b == 'P':
		f.state, f.skip = statePalette, 7
	case osc && (b == '\n' || b == '\r'):
		f.state = stateText
		f.buf.WriteByte(b)
	case f.skip >= maxString:
		f.state = stateText
	}
}

// char1 reports whether b completes the character U+00xx inside a string.
func (f *filter) char1(b, want byte) bool {
	if b == 0xc2 {
		f.char = append(f.char[:0], b)
		return false
	}
	hit := b == want && len(f.char) == 1 && f.char[0] == 0xc2
	f.char = f.char[:0]
	return hit
}

// The resets bring a terminal back to what a shell expects, whatever a guest
// has done to it. They leave the text on the screen and the cursor in its
// place.
const (
	resetOrigin = "\x1b[?6l"
	resetScreen = "\x1b[?1049l"
	resetModes  = "\x1b[!p" + // soft reset: origin, insert, margins, colours
		"\x1b[?9;1000;1001;1002;1003;1004;1005;1006;1015;1016;2004;2026l" + // mouse, focus, bracketed paste, held output
		"\x1b[?1;5;66;69l" + // keys, reverse screen, keypad, side margins
		"\x1b[?7;25h" + // wrap, cursor
		"\x1b[4;20l" + "\x1b>" + // insert, newline mode; keypad
		"\x1b[0m\x1b(B\x1b)B\x0f" + // colours, character sets
		"\x1b7\x1b[r\x1b8" + // scrolling region; it moves the cursor, so keep it
		"\x1b[0 q" // shape of the cursor
)

// reset returns what brings the terminal back, and forgets an unfinished
// sequence.
func (f *filter) reset() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := resetModes
	if f.origin {
		out = resetOrigin + out
	}
	if f.alternate {
		out = resetScreen + out
	}
	f.state, f.more, f.alternate, f.origin, f.esc = stateText, 0, false, false, false
	f.changed, f.painted = false, false
	return out
}

// tidy is reset as far as it is needed, for after a command that was no
// console: most change nothing.
func (f *filter) tidy() string {
	f.mu.Lock()
	changed, painted := f.changed, f.painted
	f.state, f.more, f.painted = stateText, 0, false
	f.mu.Unlock()
	switch {
	case changed:
		return f.reset()
	case painted:
		return "\x1b[0m"
	}
	return ""
}
