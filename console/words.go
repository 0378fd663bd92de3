// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"errors"
	"fmt"
	"strings"
)

// errUnclosed is the error of a line that ends inside quotes.
var errUnclosed = errors.New("the line ends inside quotes")

// refused are characters by which a shell would start other programs or open
// files. Here they would silently become arguments, so they must be quoted.
const refused = "|&;<>`()"

// split divides a line into words as a shell would: blanks divide, single and
// double quotes and the backslash protect. Nothing is expanded: $ * ~ stand for
// themselves.
func split(line string) ([]string, error) {
	words, open, err := splitOpen(line)
	if err == nil && open != 0 {
		err = errUnclosed
	}
	return words, err
}

// splitOpen also returns the quote that is open at the end, or 0.
func splitOpen(line string) (words []string, open rune, err error) {
	var word strings.Builder
	inWord, escaped := false, false
	for _, r := range line {
		switch {
		case escaped:
			if open == '"' && !strings.ContainsRune("\\\"$`", r) {
				word.WriteByte('\\')
			}
			word.WriteRune(r)
			escaped = false
		case r == '\\' && open != '\'':
			escaped, inWord = true, true
		case open != 0:
			if r == open {
				open = 0
			} else {
				word.WriteRune(r)
			}
		case r == '\'' || r == '"':
			open, inWord = r, true
		case r == ' ' || r == '\t' || r == '\n' || r == '\r':
			if inWord {
				words = append(words, word.String())
				word.Reset()
			}
			inWord = false
		case strings.ContainsRune(refused, r):
			return nil, 0, fmt.Errorf("%q is not possible here: there are no pipes, files or other programs; put it in quotes if it is meant as it is", r)
		default:
			word.WriteRune(r)
			inWord = true
		}
	}
	if escaped {
		return nil, 0, errors.New("the line ends with a backslash")
	}
	if inWord {
		words = append(words, word.String())
	}
	return words, open, nil
}

// unfinished returns the words of a line that is being typed; the last is the
// one to complete, empty after a blank. ok is false inside quotes.
func unfinished(line string) (words []string, ok bool) {
	words, open, err := splitOpen(line)
	if err != nil || open != 0 {
		return nil, false
	}
	if line == "" || strings.HasSuffix(line, " ") || strings.HasSuffix(line, "\t") {
		words = append(words, "")
	}
	return words, true
}
