// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-vm/muster/api"
)

// open returns a console and QEMU's end of its socket.
func open(t *testing.T, logged string) (*Console, net.Conn) {
	t.Helper()
	dir := t.TempDir()
	if logged != "" {
		if err := os.WriteFile(filepath.Join(dir, "log"), []byte(logged), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := Open(t.Context(), filepath.Join(dir, "s"), 0, filepath.Join(dir, "log"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	qemu, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); qemu.Close() })
	return c, qemu
}

func say(t *testing.T, w net.Conn, s string) {
	t.Helper()
	if _, err := w.Write([]byte(s)); err != nil {
		t.Fatal(err)
	}
}

// collect reads until the text ends with want.
func collect(t *testing.T, ch <-chan []byte, want string) string {
	t.Helper()
	var got strings.Builder
	timeout := time.After(10 * time.Second)
	for !strings.HasSuffix(got.String(), want) {
		select {
		case b, ok := <-ch:
			if !ok {
				t.Fatalf("ended after %q, want %q", got.String(), want)
			}
			got.Write(b)
		case <-timeout:
			t.Fatalf("got %q, want %q", got.String(), want)
		}
	}
	return got.String()
}

func TestReadersSeeHistoryAndWhatFollows(t *testing.T) {
	c, qemu := open(t, "")
	a, cancelA, err := c.Subscribe(0)
	if err != nil {
		t.Fatal(err)
	}
	defer cancelA()
	say(t, qemu, "hello ")
	collect(t, a, "hello ")
	b, cancelB, err := c.Subscribe(4)
	if err != nil {
		t.Fatal(err)
	}
	say(t, qemu, "world")
	if got := collect(t, b, "world"); got != "llo world" {
		t.Errorf("history reader got %q", got)
	}
	collect(t, a, "world")
	cancelB()
	cancelB()
	if string(c.History(1<<30)) != "hello world" {
		t.Errorf("history %q", c.History(1<<30))
	}
}

func TestWhatIsTypedReachesQEMU(t *testing.T) {
	c, qemu := open(t, "")
	if err := c.Write(t.Context(), []byte("root\r")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 16)
	if n, err := qemu.Read(buf); err != nil || string(buf[:n]) != "root\r" {
		t.Fatal(string(buf[:n]), err)
	}
	if err := c.Write(t.Context(), make([]byte, MaxWriteBytes+1)); api.CodeOf(err) != api.CodeTooLarge {
		t.Fatal(err)
	}
	// A QEMU that takes nothing: the write ends with its context.
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	var err error
	for err == nil {
		err = c.Write(ctx, make([]byte, MaxWriteBytes))
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
}

func TestSlowReaderIsCutOffAlone(t *testing.T) {
	c, qemu := open(t, "")
	slow, _, err := c.Subscribe(0)
	if err != nil {
		t.Fatal(err)
	}
	quick, cancel, err := c.Subscribe(0)
	if err != nil {
		t.Fatal(err)
	}
	defer cancel()
	for range QueuedChunks + 2 {
		say(t, qemu, "0123456789abcdef")
		collect(t, quick, "f")
	}
	var last []byte
	for b := range slow {
		last = b
	}
	if !bytes.Equal(last, CutOff) {
		t.Fatalf("last chunk %q", last)
	}
}

func TestEndOfQEMUClosesTheChannels(t *testing.T) {
	c, qemu := open(t, "")
	ch, _, err := c.Subscribe(0)
	if err != nil {
		t.Fatal(err)
	}
	say(t, qemu, "bye")
	qemu.Close()
	if collect(t, ch, "bye"); len(ch) != 0 {
		t.Fatal("more than was said")
	}
	<-c.Done()
	if _, ok := <-ch; ok {
		t.Fatal("the channel is open")
	}
	if _, _, err := c.Subscribe(0); !errors.Is(err, ErrEnded) || api.CodeOf(err) != api.CodeRefused {
		t.Fatal(err)
	}
	if err := c.Write(t.Context(), []byte("x")); !errors.Is(err, ErrEnded) {
		t.Fatal(err)
	}
	if string(c.History(10)) != "bye" {
		t.Fatal("the history went with QEMU")
	}
}

func TestHistoryComesFromTheFileAfterARestart(t *testing.T) {
	c, qemu := open(t, "boot\nlogin: ")
	say(t, qemu, "login: root") // the first part is what the file holds already
	ch, cancel, err := c.Subscribe(HistoryBytes)
	if err != nil {
		t.Fatal(err)
	}
	defer cancel()
	if got := collect(t, ch, "root"); got != "boot\nlogin: root" {
		t.Fatalf("%q", got)
	}
}

// What QEMU printed a moment before the connection may come from the socket late.
func TestNothingIsDoubledAfterARestart(t *testing.T) {
	const logged = "counter=1253"
	for name, c := range map[string]struct{ chunk, more, want string }{
		"it is in the file":     {"3\r\n", "\r\n", "counter=1253\r\n"},
		"it came after":         {"3\r\n", "3\r\n", "counter=12533\r\n"},
		"another one came":      {"4\r\n", "4\r\n", "counter=12534\r\n"},
		"more than was there":   {"er=1253\r\n", "\r\n", "counter=1253\r\n"},
		"the file was not told": {"1253\r\n", "", "counter=1253\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			o, qemu := open(t, logged)
			time.Sleep(2 * settle)
			f, err := os.OpenFile(o.logPath, os.O_WRONLY|os.O_APPEND, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteString(c.more); err != nil {
				t.Fatal(err)
			}
			f.Close()
			say(t, qemu, c.chunk)
			ch, cancel, err := o.Subscribe(HistoryBytes)
			if err != nil {
				t.Fatal(err)
			}
			defer cancel()
			if got := collect(t, ch, "\r\n"); got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

func TestTooManyReadersAreRefused(t *testing.T) {
	c, _ := open(t, "")
	for range MaxReaders {
		if _, _, err := c.Subscribe(0); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := c.Subscribe(0); api.CodeOf(err) != api.CodeRefused {
		t.Fatal(err)
	}
}

func TestLargeFileIsTrimmedToTheHistory(t *testing.T) {
	p := filepath.Join(t.TempDir(), "log")
	if err := Trim(p); err != nil {
		t.Fatal("a missing file:", err)
	}
	data := bytes.Repeat([]byte("0123456789abcde\n"), MaxLogBytes/16+1)
	if err := os.WriteFile(p, data, 0o600); err != nil {
		t.Fatal(err)
	}
	qemu, err := os.OpenFile(p, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer qemu.Close()
	if err := Trim(p); err != nil {
		t.Fatal(err)
	}
	if _, err := qemu.WriteString("more"); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(p)
	if err != nil || !bytes.Equal(got, append(data[len(data)-HistoryBytes:], "more"...)) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
}

func TestRingKeepsTheLastBytes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var r ring
		var all []byte
		for i := range rapid.IntRange(0, 6).Draw(t, "writes") {
			p := bytes.Repeat([]byte{byte('a' + i), 'x', 'y'}, rapid.IntRange(0, HistoryBytes/2).Draw(t, "n"))
			r.write(p)
			all = append(all, p...)
		}
		n := rapid.IntRange(0, HistoryBytes+10).Draw(t, "last")
		want := all[len(all)-min(n, len(all), HistoryBytes):]
		if got := r.last(n); !bytes.Equal(got, want) {
			t.Fatalf("%d bytes, want %d", len(got), len(want))
		}
	})
}
