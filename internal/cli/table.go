// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"io"
	"strings"
	"unicode/utf8"
)

// table is aligned text: a head, rows, two spaces between columns, nothing
// wrapped or cut.
type table struct {
	head []string
	rows [][]string
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

const gap = "  "

// write prints the table. colour decides whether words that tell good from
// bad are painted.
func (t *table) write(w io.Writer, colour bool) error {
	widths := make([]int, len(t.head))
	for i, h := range t.head {
		widths[i] = len(h)
	}
	for r := range t.rows {
		for i := range t.rows[r] {
			t.rows[r][i] = clean(t.rows[r][i])
			widths[i] = max(widths[i], utf8.RuneCountInString(t.rows[r][i]))
		}
	}
	var b strings.Builder
	line := func(cells []string, paint bool) {
		for i, c := range cells {
			shown := c
			if paint {
				shown = painted(t.head[i], c)
			}
			b.WriteString(shown)
			if i < len(cells)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c)))
				b.WriteString(gap)
			}
		}
		b.WriteByte('\n')
	}
	if t.head[0] != "" {
		line(t.head, false)
	}
	for _, r := range t.rows {
		line(r, colour)
	}
	_, err := io.WriteString(w, trimLines(b.String()))
	return err
}

// trimLines removes the blanks that an empty last cell leaves.
func trimLines(s string) string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return strings.Join(lines, "\n")
}

const (
	green  = "\x1b[32m"
	yellow = "\x1b[33m"
	red    = "\x1b[31m"
	plain  = "\x1b[0m"
)

// colours of the words in the columns STATUS, EVENT and OK.
var colours = map[string]string{
	"running": green, "ready": green, "succeeded": green, "yes": green,
	"starting": yellow, "stopping": yellow, "paused": yellow, "creating": yellow, "pending": yellow,
	"importing": yellow, "joining": yellow, "leaving": yellow, "deleting": yellow, "cancelled": yellow,
	"firing": red, "failing": red, "resolved": green, "ok": green, "active": green, "disabled": yellow,
	"failed": red, "lost": red, "unknown": red, "no": red, "delete": red,
}

func painted(column, word string) string {
	switch column {
	case "STATUS", "EVENT", "OK", "READY":
		key, _, _ := strings.Cut(word, ",")
		if c := colours[key]; c != "" {
			return c + word + plain
		}
	}
	return word
}

// sections is the human readable form of one object: blocks of "Key: value"
// with an optional table each.
type sections struct {
	b strings.Builder
	// paint is set when the output has colours.
	paint bool
	rows  [][2]string
}

// field adds a line; empty values are left out.
func (s *sections) field(name, value string) {
	if value != "" {
		s.rows = append(s.rows, [2]string{name + ":", clean(value)})
	}
}

// flush writes the fields so far, aligned.
func (s *sections) flush() {
	width := 0
	for _, r := range s.rows {
		width = max(width, len(r[0]))
	}
	for _, r := range s.rows {
		value := r[1]
		if s.paint && r[0] == "Status:" {
			word, rest, _ := strings.Cut(value, " ")
			value = strings.TrimRight(painted("STATUS", word)+" "+rest, " ")
		}
		s.b.WriteString(r[0] + strings.Repeat(" ", width-len(r[0])) + gap + value + "\n")
	}
	s.rows = nil
}

// title begins a new section.
func (s *sections) title(name string) {
	s.flush()
	s.b.WriteString("\n" + name + "\n")
}

// table adds a table, indented.
func (s *sections) table(t *table) {
	s.flush()
	var b strings.Builder
	_ = t.write(&b, s.paint) // a strings.Builder takes everything
	for line := range strings.Lines(b.String()) {
		s.b.WriteString("  " + line)
	}
}

func (s *sections) String() string { s.flush(); return s.b.String() }
