// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package greeting

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"unicode/utf8"
)

type hello struct {
	VM string `json:"vm"`
}

func TestWhatIsBehindTheGreetingIsReadFromTheSameConnection(t *testing.T) {
	a, b := net.Pipe()
	go func() {
		if err := Say(a, hello{"web1"}); err != nil {
			t.Error(err)
		}
		_, _ = io.WriteString(a, "memory")
		_ = CloseWrite(a)
	}()
	c := NewConn(b, 1)
	var got hello
	if err := Hear(c.R, &got); err != nil || got.VM != "web1" {
		t.Fatalf("%+v, %v", got, err)
	}
	if rest, err := io.ReadAll(c); err != nil || string(rest) != "memory" {
		t.Errorf("%q, %v", rest, err)
	}
}

func TestLongLinesAreRefused(t *testing.T) {
	for name, size := range map[string]int{"a small buffer": MaxLine, "a large one": 1 << 20} {
		r := bufio.NewReaderSize(strings.NewReader(strings.Repeat("x", MaxLine)+"\nnext\n"), size)
		if line, err := Line(r); !errors.Is(err, ErrLong) {
			t.Errorf("%s: %d bytes, %v", name, len(line), err)
		}
	}
	if err := Say(io.Discard, hello{strings.Repeat("x", MaxLine)}); !errors.Is(err, ErrLong) {
		t.Error(err)
	}
	if line, err := Line(bufio.NewReader(strings.NewReader("no end"))); !errors.Is(err, io.EOF) {
		t.Errorf("%q, %v", line, err)
	}
}

func TestTextIsOneLine(t *testing.T) {
	for _, text := range []string{"two\nlines\r\nand\ttabs", strings.Repeat("ä", MaxLine)} {
		got := Text(errors.New(text))
		if strings.ContainsAny(got, "\r\n\t") || len(got) > maxText || !utf8.ValidString(got) || got == "" {
			t.Errorf("%q", got)
		}
	}
}

func FuzzHear(f *testing.F) {
	f.Add([]byte(`{"vm":"a"}` + "\nrest"))
	f.Add([]byte(strings.Repeat("x", 2*MaxLine)))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bufio.NewReaderSize(bytes.NewReader(b), MaxLine)
		var got hello
		if err := Hear(r, &got); err != nil {
			return
		}
		rest, err := io.ReadAll(r)
		if i := bytes.IndexByte(b, '\n'); err != nil || !bytes.Equal(rest, b[i+1:]) {
			t.Errorf("%q behind %q", rest, b)
		}
	})
}
