// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package greeting

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"unicode/utf8"
)

// MaxLine is the longest line in bytes, its end included; maxText what an error may
// take of it, beside a word before it.
const (
	MaxLine = 4096
	maxText = MaxLine / 2
)

// ErrLong is for a line that is too long.
var ErrLong = fmt.Errorf("a line has more than %d bytes", MaxLine)

// Conn is a connection whose lines are read first, then what is behind them.
type Conn struct {
	net.Conn
	R *bufio.Reader
}

// NewConn returns a connection that reads size bytes at a time, at least a line.
func NewConn(c net.Conn, size int) *Conn {
	return &Conn{c, bufio.NewReaderSize(c, max(size, MaxLine))}
}

// Read implements net.Conn.
func (c *Conn) Read(b []byte) (int, error) { return c.R.Read(b) }

// CloseWrite tells the other end that nothing follows.
func (c *Conn) CloseWrite() error { return CloseWrite(c.Conn) }

// CloseWrite tells the other end of a connection that nothing follows; where that
// cannot be said, it ends the connection.
func CloseWrite(c net.Conn) error {
	if w, ok := c.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return c.Close()
}

// Line reads a line, without its end.
func Line(r *bufio.Reader) (string, error) {
	b, err := r.ReadSlice('\n')
	switch {
	case errors.Is(err, bufio.ErrBufferFull), err == nil && len(b) > MaxLine:
		return "", ErrLong
	case err != nil:
		return "", err
	}
	return strings.TrimSuffix(string(b), "\n"), nil
}

// Say writes what a stream is for.
func Say(w io.Writer, hello any) error {
	line, err := json.Marshal(hello)
	if err != nil {
		return err
	}
	if len(line) >= MaxLine {
		return ErrLong
	}
	_, err = w.Write(append(line, '\n'))
	return err
}

// Hear reads what a stream is for.
func Hear(r *bufio.Reader, hello any) error {
	line, err := Line(r)
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(line), hello)
}

// Text is an error as part of a line.
func Text(err error) string {
	text := strings.Join(strings.Fields(err.Error()), " ")
	if len(text) <= maxText {
		return text
	}
	end := maxText
	for end > 0 && !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end]
}
