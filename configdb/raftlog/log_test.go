// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftlog

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/muster-vm/muster/internal/smalldisk"
)

const testSegment = 4096

func open(t testing.TB, dir string) *Log {
	t.Helper()
	l, err := Open(dir, testSegment)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func entry(index, term uint64, data string) *raft.Log {
	return &raft.Log{Index: index, Term: term, Type: raft.LogCommand, Data: []byte(data), Extensions: []byte("x"), AppendedAt: time.Unix(1, int64(index))}
}

func store(t testing.TB, l *Log, entries ...*raft.Log) {
	t.Helper()
	if err := l.StoreLogs(entries); err != nil {
		t.Fatal(err)
	}
}

// fill stores entries one by one, so that each is acknowledged alone.
func fill(t testing.TB, l *Log, first, last uint64) {
	t.Helper()
	for i := first; i <= last; i++ {
		store(t, l, entry(i, 1, strings.Repeat("d", 100)+fmt.Sprint(i)))
	}
}

func bounds(t testing.TB, l *Log) (first, last uint64) {
	t.Helper()
	first, err1 := l.FirstIndex()
	last, err2 := l.LastIndex()
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	return first, last
}

func segments(t testing.TB, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*"+suffix))
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	return names
}

func TestEntriesSurviveAReopen(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	if first, last := bounds(t, l); first != 0 || last != 0 {
		t.Fatalf("a new log has entries %d to %d", first, last)
	}
	fill(t, l, 1, 100)
	if n := len(segments(t, dir)); n < 3 {
		t.Fatalf("100 entries are in %d segments, want several", n)
	}
	for range 2 {
		for i := uint64(1); i <= 100; i++ {
			var e raft.Log
			if err := l.GetLog(i, &e); err != nil {
				t.Fatal(err)
			}
			if want := entry(i, 1, strings.Repeat("d", 100)+fmt.Sprint(i)); !bytes.Equal(e.Data, want.Data) || e.Index != i || e.Term != 1 ||
				!e.AppendedAt.Equal(want.AppendedAt) || !bytes.Equal(e.Extensions, want.Extensions) || e.Type != want.Type {
				t.Fatalf("entry %d came back as %+v", i, e)
			}
		}
		if err := l.GetLog(101, &raft.Log{}); !errors.Is(err, raft.ErrLogNotFound) {
			t.Fatalf("entry 101: %v", err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l = open(t, dir)
	}
}

func TestAGapBeginsANewLog(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	fill(t, l, 1, 60)
	fill(t, l, 500, 505)
	if first, last := bounds(t, l); first != 500 || last != 505 {
		t.Fatalf("the log has entries %d to %d, want 500 to 505", first, last)
	}
	_ = l.Close()
	if first, last := bounds(t, open(t, dir)); first != 500 || last != 505 {
		t.Fatalf("after a reopen the log has entries %d to %d, want 500 to 505", first, last)
	}
}

func TestAnOverlapIsRefused(t *testing.T) {
	l := open(t, t.TempDir())
	fill(t, l, 1, 5)
	if err := l.StoreLog(entry(5, 2, "again")); err == nil {
		t.Fatal("entry 5 was stored twice")
	}
	if err := l.StoreLogs([]*raft.Log{entry(6, 1, ""), entry(8, 1, "")}); err == nil {
		t.Fatal("a batch with a gap was stored")
	}
}

// model is what the log must hold.
type model struct {
	first uint64
	data  []string
}

func (m *model) last() uint64 { return m.first + uint64(len(m.data)) - 1 }

func TestRandomUseWithReopens(t *testing.T) {
	disk := smalldisk.Mount(t, 64<<20) // a real one would wait minutes for its syncs
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(disk, "")
		if err != nil {
			rt.Fatal(err)
		}
		l, err := Open(dir, testSegment)
		if err != nil {
			rt.Fatal(err)
		}
		defer func() {
			_ = l.Close()
			_ = os.RemoveAll(dir)
		}()
		m := model{first: 1}
		check := func(err error) {
			if err != nil {
				rt.Fatal(err)
			}
		}
		rt.Repeat(map[string]func(*rapid.T){
			"append": func(rt *rapid.T) {
				var batch []*raft.Log
				for range rapid.IntRange(1, 20).Draw(rt, "entries") {
					d := rapid.StringN(0, 300, 900).Draw(rt, "data")
					batch = append(batch, entry(m.last()+1, 1, d))
					m.data = append(m.data, d)
				}
				check(l.StoreLogs(batch))
			},
			"cut": func(rt *rapid.T) {
				if len(m.data) == 0 {
					return
				}
				from := rapid.Uint64Range(m.first, m.last()).Draw(rt, "from")
				check(l.DeleteRange(from, m.last()))
				m.data = m.data[:from-m.first]
			},
			"compact": func(rt *rapid.T) {
				if len(m.data) == 0 {
					return
				}
				to := rapid.Uint64Range(m.first, m.last()).Draw(rt, "to")
				first, _ := l.FirstIndex()
				check(l.DeleteRange(first, to))
				m.data, m.first = m.data[to+1-m.first:], to+1
			},
			"reopen": func(rt *rapid.T) {
				check(l.Close())
				l, err = Open(dir, testSegment)
				check(err)
			},
			"": func(rt *rapid.T) {
				last, _ := l.LastIndex()
				if last != m.last() && (last != 0 || len(m.data) > 0) {
					rt.Fatalf("the last entry is %d, want %d", last, m.last())
				}
				for i, want := range m.data {
					var e raft.Log
					check(l.GetLog(m.first+uint64(i), &e))
					if string(e.Data) != want || e.Index != m.first+uint64(i) {
						rt.Fatalf("entry %d is %q, want %q", m.first+uint64(i), e.Data, want)
					}
				}
			},
		})
	})
}

// damage changes a byte of a file.
func damage(t testing.TB, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x40
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestDamageOfAnAcknowledgedEntryIsNamed(t *testing.T) {
	for _, tc := range []struct {
		name    string
		segment func(names []string) string
	}{
		{"in the newest segment", func(n []string) string { return n[len(n)-1] }},
		{"in an older segment", func(n []string) string { return n[1] }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			l := open(t, dir)
			fill(t, l, 1, 100)
			_ = l.Close()
			path := tc.segment(segments(t, dir))
			damage(t, path, headerSize+60)
			_, err := Open(dir, testSegment)
			var c *CorruptError
			if !errors.As(err, &c) || c.Path != path || c.Offset != headerSize || c.Index == 0 {
				t.Fatalf("open: %v; want the damage in %s", err, path)
			}
		})
	}
}

func TestDamageWhileOpenIsNamed(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	fill(t, l, 1, 100)
	_ = l.Close()
	l = open(t, dir) // nothing is cached
	damage(t, segments(t, dir)[0], headerSize+60)
	if err := l.GetLog(1, &raft.Log{}); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "entry 1") {
		t.Fatalf("read: %v, want the damaged entry's name", err)
	}
}

func TestAMissingSegmentIsNamed(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	fill(t, l, 1, 100)
	_ = l.Close()
	if err := os.Remove(segments(t, dir)[1]); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, testSegment); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("open: %v", err)
	}
}

// At each byte of the last batch, what follows is lost by a power cut.
func TestATornWriteIsCutOff(t *testing.T) {
	dir := smalldisk.Mount(t, 64<<20)
	l := open(t, dir)
	fill(t, l, 1, 5)
	from := l.segments[0].end
	store(t, l, entry(6, 1, strings.Repeat("e", 100)), entry(7, 1, strings.Repeat("f", 50)), entry(8, 1, "g"))
	_, to := from, l.segments[0].end
	path := l.segments[0].path
	_ = l.Close()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for at := from; at < to; at += 3 {
		for _, hole := range []bool{false, true} { // the rest is lost, or only one sector of it
			b := bytes.Clone(whole)
			end := int64(len(b))
			if hole {
				end = min(at+8, to)
			}
			clear(b[at:end])
			if bytes.Equal(b[:to], whole[:to]) {
				continue // nothing but padding was lost
			}
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			l := open(t, dir)
			_, last := bounds(t, l)
			if last < 5 || last > 7 {
				t.Fatalf("cut at %d: the log ends with %d, want 5 to 7", at, last)
			}
			// What is appended now must not be joined by what was torn.
			store(t, l, entry(last+1, 2, strings.Repeat("h", 100)))
			_ = l.Close()
			l = open(t, dir)
			if _, got := bounds(t, l); got != last+1 {
				t.Fatalf("cut at %d: after another append the log ends with %d, want %d", at, got, last+1)
			}
			_ = l.Close()
		}
	}
}

// A crash in the middle of cutting off the end: the new segment is there, the
// old ones are too.
func TestAnInterruptedCutIsFinished(t *testing.T) {
	dir, kept := t.TempDir(), t.TempDir()
	l := open(t, dir)
	fill(t, l, 1, 100)
	for _, p := range segments(t, dir) {
		copyFile(t, p, filepath.Join(kept, filepath.Base(p)))
	}
	if err := l.DeleteRange(11, 100); err != nil {
		t.Fatal(err)
	}
	store(t, l, entry(11, 2, "new"))
	_ = l.Close()
	for _, p := range segments(t, kept) {
		copyFile(t, p, filepath.Join(dir, filepath.Base(p)))
	}
	l = open(t, dir)
	var e raft.Log
	if _, last := bounds(t, l); last != 11 {
		t.Fatalf("the log ends with %d, want 11", last)
	}
	if err := l.GetLog(11, &e); err != nil || string(e.Data) != "new" {
		t.Fatalf("entry 11 is %q, %v", e.Data, err)
	}
	fill(t, l, 12, 60)
	// Cut below the earlier cut: what it hid must not come back.
	if err := l.DeleteRange(5, 60); err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	if _, last := bounds(t, open(t, dir)); last != 4 {
		t.Fatalf("the log ends with %d, want 4", last)
	}
}

// A cluster whose leader changes often cuts the log often. Each cut begins a
// segment; what the earlier ones have no use for must not stay taken.
func TestCutsGiveTheirSpaceBack(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	next := uint64(1)
	for term := uint64(1); term <= 40; term++ {
		fill(t, l, next, next+2) // the last of these are not the next leader's
		next += 2
		if err := l.DeleteRange(next, next); err != nil {
			t.Fatal(err)
		}
	}
	size := func() (n int64) {
		for _, p := range segments(t, dir) {
			st, err := os.Stat(p)
			if err != nil {
				t.Fatal(err)
			}
			n += st.Size()
		}
		return n
	}
	const most = 80*300 + 2*testSegment // the entries, and a segment to write to
	if n := size(); n > most {
		t.Fatalf("%d segments have %d bytes for %d entries", len(segments(t, dir)), n, next-1)
	}
	_ = l.Close()
	l = open(t, dir)
	if _, last := bounds(t, l); last != next-1 {
		t.Fatalf("the log ends with %d, want %d", last, next-1)
	}
	for i := uint64(1); i < next; i++ {
		var e raft.Log
		if err := l.GetLog(i, &e); err != nil {
			t.Fatal(err)
		}
	}
	fill(t, l, next, next+100)
	if err := l.DeleteRange(1, next+50); err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	if first, last := bounds(t, open(t, dir)); first > next+51 || last != next+100 {
		t.Fatalf("the log has %d to %d", first, last)
	}
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestAFullDiskChangesNothing(t *testing.T) {
	dir := smalldisk.Mount(t, 16*testSegment)
	l := open(t, dir)
	giveBack := smalldisk.Fill(t, dir)
	data := strings.Repeat("d", 300)
	var err error
	n := uint64(0)
	for err == nil && n < 1000 {
		if err = l.StoreLog(entry(n+1, 1, data)); err == nil {
			n++
		}
	}
	if !errors.Is(err, ErrNoSpace) {
		t.Fatalf("after %d entries: %v, want ErrNoSpace", n, err)
	}
	if _, last := bounds(t, l); last != n {
		t.Fatalf("the log ends with %d, want %d", last, n)
	}
	if err := l.StoreLog(entry(n+1, 1, data)); !errors.Is(err, ErrNoSpace) {
		t.Fatalf("still full: %v", err)
	}
	giveBack()
	if err := l.StoreLog(entry(n+1, 1, data)); err != nil {
		t.Fatalf("after space came back: %v", err)
	}
	_ = l.Close()
	if _, last := bounds(t, open(t, dir)); last != n+1 {
		t.Fatalf("after a reopen the log ends with %d, want %d", last, n+1)
	}
}

// The first part of a batch fits, the rest does not: the caller was told that
// nothing was stored, so something else may come in its place.
func TestABatchThatFitsInPartIsReplaced(t *testing.T) {
	dir := smalldisk.Mount(t, 16*testSegment)
	l := open(t, dir)
	fill(t, l, 1, 3)
	giveBack := smalldisk.Fill(t, dir)
	var batch []*raft.Log
	for i := uint64(4); i < 60; i++ {
		batch = append(batch, entry(i, 1, strings.Repeat("a", 200)))
	}
	if err := l.StoreLogs(batch); !errors.Is(err, ErrNoSpace) {
		t.Fatalf("store: %v, want ErrNoSpace", err)
	}
	giveBack()
	store(t, l, entry(4, 2, "new"))
	for range 2 {
		var e raft.Log
		if err := l.GetLog(4, &e); err != nil || e.Term != 2 {
			t.Fatalf("entry 4 is of term %d, %v; want 2", e.Term, err)
		}
		if _, last := bounds(t, l); last != 4 {
			t.Fatalf("the log ends with %d, want 4", last)
		}
		_ = l.Close()
		l = open(t, dir)
	}
}

func TestAFailedSyncIsFinal(t *testing.T) {
	l := open(t, t.TempDir())
	fill(t, l, 1, 3)
	l.sync = func(int) error { return unix.EIO }
	if err := l.StoreLog(entry(4, 1, "")); !errors.Is(err, ErrFailed) {
		t.Fatalf("store: %v, want ErrFailed", err)
	}
	l.sync = unix.Fdatasync
	if err := l.StoreLog(entry(4, 1, "")); !errors.Is(err, ErrFailed) {
		t.Fatalf("store after a failed sync: %v, want ErrFailed", err)
	}
	if _, last := bounds(t, l); last != 3 {
		t.Fatalf("the log ends with %d, want 3", last)
	}
}

func TestTheCacheIsBounded(t *testing.T) {
	var c cache
	for i := uint64(1); i <= 3*cacheEntries; i++ {
		c.add(entry(i, 1, strings.Repeat("d", 1<<14)))
		if len(c.entries) > cacheEntries || c.bytes > cacheBytes && len(c.entries) > 1 {
			t.Fatalf("the cache has %d entries, %d bytes", len(c.entries), c.bytes)
		}
	}
	if e := c.get(3 * cacheEntries); e == nil || e.Index != 3*cacheEntries {
		t.Fatal("the newest entry is not cached")
	}
	c.drop(3*cacheEntries-1, 3*cacheEntries+1)
	if c.get(3*cacheEntries) != nil || c.get(3*cacheEntries-2) == nil {
		t.Fatal("drop of the end went wrong")
	}
}

func FuzzParse(f *testing.F) {
	f.Add(appendRecord(nil, 7, 0, entry(1, 1, "data")), uint64(7))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0}, uint64(0))
	f.Fuzz(func(t *testing.T, b []byte, seed uint64) {
		r, ok := parse(b, seed)
		if !ok {
			return
		}
		var e raft.Log
		r.decode(&e)
		again := appendRecord(nil, seed, r.durable, &e)
		if !bytes.Equal(again[:recordHead+len(r.payload)], b[:recordHead+len(r.payload)]) {
			t.Fatalf("record %x is encoded again as %x", b[:r.size], again)
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	for _, batch := range []int{1, 64} {
		b.Run(fmt.Sprint(batch), func(b *testing.B) {
			l, err := Open(b.TempDir(), 0)
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			data, next := strings.Repeat("d", 256), uint64(1)
			for b.Loop() {
				var logs []*raft.Log
				for range batch {
					logs = append(logs, entry(next, 1, data))
					next++
				}
				if err := l.StoreLogs(logs); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
