// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"fmt"
	"strings"
	"time"
)

// progress shows how work goes on: one line redrawn in place on a terminal,
// a line per change otherwise, nothing with --quiet.
type progress struct {
	a     *app
	what  string
	began time.Time
	spin  int
	last  string // the last plain line, so that none is repeated
	step  int    // the last tenth that a plain line told
	drawn bool
}

func (a *app) newProgress(what string) *progress {
	return &progress{a: a, what: what, began: a.Now(), step: -1}
}

const (
	barWidth = 24
	spinners = `|/-\`
	// eraseLine returns to the first column and clears the line.
	eraseLine = "\r\x1b[K"
)

// update shows a percentage (-1 when there is none) and what happens now.
func (p *progress) update(percent int, message string) {
	if p.a.flags.quiet || p.a.still {
		return
	}
	message = clean(message)
	if !p.a.ErrTTY {
		p.plain(percent, message)
		return
	}
	p.spin++
	mark := string(spinners[p.spin%len(spinners)])
	if percent > 0 {
		full := barWidth * min(percent, 100) / 100
		mark = fmt.Sprintf("[%s%s] %3d%%", strings.Repeat("#", full), strings.Repeat(".", barWidth-full), min(percent, 100))
	}
	fmt.Fprintf(p.a.Err, "%s%s %s %s %s", eraseLine, clean(p.what), mark, took(p.a.Now().Sub(p.began)), message)
	p.drawn = true
}

// plain writes a line when the message changed or another quarter is done.
func (p *progress) plain(percent int, message string) {
	const quarter = 25
	step := percent / quarter
	if message == p.last && (percent <= 0 || step <= p.step) || message == "" && percent <= 0 {
		return
	}
	p.last, p.step = message, step
	text := message
	if percent > 0 {
		text = strings.TrimSpace(fmt.Sprintf("%d%% %s", percent, message))
	}
	fmt.Fprintf(p.a.Err, "muster: %s: %s\n", clean(p.what), text)
}

// clear removes the line from a terminal.
func (p *progress) clear() {
	if p.drawn {
		fmt.Fprint(p.a.Err, eraseLine)
		p.drawn = false
	}
}
