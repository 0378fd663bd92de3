// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"bytes"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

func filtered(s string) string {
	var b bytes.Buffer
	_, _ = newFilter(&b).Write([]byte(s))
	return b.String()
}

func TestFilter(t *testing.T) {
	for name, c := range map[string]struct{ in, want string }{
		"text passes":                         {"login: grüße ☕ 漢字\r\n\t\b\a", "login: grüße ☕ 漢字\r\n\t\b\a"},
		"colours and cursor pass":             {"\x1b[1;31mred\x1b[0m\x1b[2J\x1b[10;3H\x1b[K\x1b[38:2:1:2:3m", "\x1b[1;31mred\x1b[0m\x1b[2J\x1b[10;3H\x1b[K\x1b[38:2:1:2:3m"},
		"full screen programs pass":           {"\x1b[?1049h\x1b[?25l\x1b[1;24r\x1b(0lqk\x1b(B\x1b7\x1b8\x1bM\x1b=", "\x1b[?1049h\x1b[?25l\x1b[1;24r\x1b(0lqk\x1b(B\x1b7\x1b8\x1bM\x1b="},
		"clipboard":                           {"a\x1b]52;c;ZXZpbA==\x07b", "ab"},
		"clipboard ended by ST":               {"a\x1b]52;c;ZXZpbA==\x1b\\b", "ab"},
		"title":                               {"a\x1b]0;rm -rf /\x07b", "ab"},
		"title of screen":                     {"a\x1bkrm\x1b\\b", "ab"},
		"title report":                        {"a\x1b[21tb", "ab"},
		"window operations":                   {"\x1b[8;999;999t\x1b[2t", ""},
		"device attributes":                   {"\x1b[c\x1b[0c\x1b[>c\x1b[=c\x1bZ", ""},
		"status reports":                      {"\x1b[5n\x1b[6n\x1b[?6n\x1b[x", ""},
		"mode and setting reports":            {"\x1b[?1$p\x1b[4$p\x1bP$qm\x1b\\\x1b[1$w\x1b[>q\x1b[?u\x1b[?4m", ""},
		"checksum of the screen":              {"\x1b[1;1;1;1;9;9*y", ""},
		"answer back":                         {"a\x05b", "ab"},
		"printing":                            {"\x1b[5iSECRET\x1b[4i\x1b[?5i", "SECRET"},
		"programmable keys":                   {"\x1bP1;1|17/6c73\x1b\\", ""},
		"application and privacy":             {"\x1b_Gx\x1b\\\x1b^y\x1b\\\x1bXz\x1b\\", ""},
		"8-bit controls in UTF-8":             {"a\u009b6nb\u009d52;c;eA==\u009cc\u0090q\u009cd\u0085", "abcd\x1bE"},
		"8-bit controls as bytes":             {"a\x9b6nb\x9d52;x\x9c", "a6nb52;x"},
		"broken UTF-8":                        {"a\xc3\x28\xff\xe2\x82z", "a(z"},
		"leaving UTF-8":                       {"\x1b%@\x9b6n\x1b G", "6n"},
		"full reset":                          {"a\x1bcb", "ab"},
		"key protocols":                       {"\x1b[>1u\x1b[>4;2m\x1b[=1u", ""},
		"keyboard lock":                       {"\x1b[2h\x1b[4h", "\x1b[4h"},
		"harmful modes among harmless":        {"\x1b[?25;38;2048;7h", "\x1b[?25;7h"},
		"highlight tracking":                  {"\x1b[1;1;1;1;1T\x1b[2T", "\x1b[2T"},
		"a new line ends a title":             {"\x1b]0;x\nlogin:", "\nlogin:"},
		"Linux palette":                       {"\x1b]P0abcdef\x1b]Rlogin:", "login:"},
		"a sequence inside a sequence":        {"\x1b[3\x1b[6n\x1b[31mx", "\x1b[31mx"},
		"a sequence inside a string":          {"\x1b]0;a\x1b[6n\x1b[31mx", "\x1b[31mx"},
		"a control inside a sequence":         {"\x1b[3\n1mx", "\n1mx"},
		"cancelled":                           {"\x1b]52;c;\x18x\x1bP\x1ay", "xy"},
		"a character inside a sequence":       {"\x1b[3é6nx", "é6nx"},
		"an endless sequence":                 {"\x1b[" + strings.Repeat("1;", 100) + "mx", ";" + strings.Repeat("1;", 36) + "mx"},
		"an endless string does not silence":  {"\x1bP" + strings.Repeat("x", maxString) + "hello", "hello"},
		"unfinished sequences are kept back":  {"a\x1b[3", "a"},
		"unfinished characters are kept back": {"a\xe2\x82", "a"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := filtered(c.in); got != c.want {
				t.Errorf("%q\n got %q\nwant %q", c.in, got, c.want)
			}
		})
	}
}

func TestResetLeavesTheAlternateScreenOnlyIfItIsOn(t *testing.T) {
	var b bytes.Buffer
	f := newFilter(&b)
	_, _ = f.Write([]byte("\x1b[?1049h\x1b[?6h\x1b[?1000"))
	if r := f.reset(); !strings.HasPrefix(r, resetScreen+resetOrigin) {
		t.Errorf("reset is %q", r)
	}
	if r := f.reset(); r != resetModes {
		t.Errorf("second reset is %q", r)
	}
	b.Reset()
	if _, _ = f.Write([]byte("hx")); b.String() != "hx" {
		t.Errorf("the unfinished sequence is not forgotten: %q", b.String())
	}
}

// Nothing that makes a terminal answer or act may be in what was passed.
var harmful = regexp.MustCompile(`\x05|\x1b[\]PX^_kZc%lm]|\x1b\[[0-9:;<=>?]*[ -/]*[cnxtivyw{|}~]|\x1b\[[0-9:;<=>?]*[$*'",]|\x1b\[[<=>]|\x1b\[[?][0-9;]*[um]`)

func FuzzFilter(f *testing.F) {
	for _, s := range []string{"\x1b]52;c;eA==\x07", "\x1b[6n", "\x1b\x1b[\x1b[c", "\u009b6n", "\xc2\x1b[6n", "\x1b[?1049;6h", "\x1bP\xc2\x9c[6n", "\x1b(\x1b[c", "\x1b]\x1b\x1b]0", "\x1b[\xc2\x9bc"} {
		f.Add([]byte(s), uint8(3))
	}
	f.Fuzz(func(t *testing.T, in []byte, step uint8) {
		whole := filtered(string(in))
		if m := harmful.FindString(whole); m != "" {
			t.Errorf("%q lets %q through", in, m)
		}
		if !utf8.ValidString(whole) {
			t.Errorf("%q becomes %q, which is no UTF-8", in, whole)
		}
		if again := filtered(whole); again != whole {
			t.Errorf("%q becomes %q and then %q", in, whole, again)
		}
		if len(whole) > len(in)+len(in)/2+1 {
			t.Errorf("%d bytes became %d", len(in), len(whole))
		}
		var b bytes.Buffer
		parts := newFilter(&b)
		for rest := in; len(rest) > 0; {
			n := min(int(step)+1, len(rest))
			_, _ = parts.Write(rest[:n])
			rest = rest[n:]
		}
		if b.String() != whole {
			t.Errorf("in parts %q, at once %q", b.String(), whole)
		}
		if len(parts.seq) > maxSequence+1 || cap(parts.char) > 16 {
			t.Error("the state is not bounded")
		}
	})
}
