// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package fsm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc64"
	"io"
	"math"
	"runtime"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestCommandsSurviveTheirEncoding(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := Command{Time: rapid.Int64().Draw(t, "time"), Txns: rapid.SliceOfN(genTxn(), 0, 4).Draw(t, "txns")}
		back, err := DecodeCommand(c.Encode())
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(back.Encode(), c.Encode()) || len(back.Txns) != len(c.Txns) || back.Time != c.Time {
			t.Fatalf("%+v came back as %+v", c, back)
		}
		for i := range c.Txns {
			one, err := DecodeTxn(AppendTxn(nil, &c.Txns[i]))
			if err != nil || !bytes.Equal(AppendTxn(nil, &one), AppendTxn(nil, &c.Txns[i])) {
				t.Fatalf("%+v came back as %+v, %v", c.Txns[i], one, err)
			}
		}
	})
}

// Every prefix of an entry is refused, and so is every entry with more.
func TestNoPartOfACommandIsACommand(t *testing.T) {
	c := Command{Time: -5, Txns: []Txn{{
		Request: RequestID{Session: [16]byte{9}, Sequence: 300, Done: 200}, Actor: "me",
		Require: []Precondition{{CheckRevision, "k", 1 << 60}, {CheckTerm, "", 3}}, Ops: []Op{{Key: "a", Value: []byte("v")}, {Key: "b", Delete: true}},
	}}}
	b := c.Encode()
	for i := range b {
		if _, err := DecodeCommand(b[:i]); !errors.Is(err, ErrMalformed) {
			t.Errorf("the first %d bytes: %v", i, err)
		}
	}
	if _, err := DecodeCommand(append(b, 1)); !errors.Is(err, ErrMalformed) {
		t.Error("trailing bytes pass")
	}
}

func TestTxnValidate(t *testing.T) {
	key := strings.Repeat("k", MaxKeyBytes)
	ops := func(n, size int) []Op {
		out := make([]Op, n)
		for i := range out {
			out[i] = Op{Key: "k", Value: make([]byte, size)}
		}
		return out
	}
	for name, c := range map[string]struct {
		txn  Txn
		want error
	}{
		"empty":            {Txn{}, nil},
		"longest key":      {Txn{Ops: []Op{{Key: key}}, Require: []Precondition{{CheckExists, key, 0}}}, nil},
		"largest value":    {Txn{Ops: ops(1, MaxValueBytes)}, nil},
		"most changes":     {Txn{Ops: ops(MaxTxnOps, 1)}, nil},
		"long key":         {Txn{Ops: []Op{{Key: key + "k"}}}, ErrTooLarge},
		"no key":           {Txn{Ops: []Op{{}}}, ErrTooLarge},
		"long required":    {Txn{Require: []Precondition{{CheckExists, key + "k", 0}}}, ErrTooLarge},
		"no required key":  {Txn{Require: []Precondition{{CheckEmpty, "", 0}}}, ErrTooLarge},
		"term needs none":  {Txn{Require: []Precondition{{CheckTerm, "", 1}}}, nil},
		"large value":      {Txn{Ops: ops(1, MaxValueBytes+1)}, ErrTooLarge},
		"large in all":     {Txn{Ops: ops(4, MaxValueBytes)}, ErrTooLarge},
		"too many changes": {Txn{Ops: ops(MaxTxnOps+1, 0)}, ErrTooLarge},
		"too many checks":  {Txn{Require: make([]Precondition, MaxTxnOps+1)}, ErrTooLarge},
		"long actor":       {Txn{Actor: key + "k"}, ErrTooLarge},
		"check 0":          {Txn{Require: []Precondition{{0, "k", 0}}}, ErrMalformed},
		"check 5":          {Txn{Require: []Precondition{{5, "k", 0}}}, ErrMalformed},
	} {
		if err := c.txn.Validate(); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if c.want != nil {
			continue
		}
		if _, err := DecodeTxn(AppendTxn(nil, &c.txn)); err != nil {
			t.Errorf("%s is valid but not decoded: %v", name, err)
		}
	}
}

func TestPreconditionsSayWhatTheyAre(t *testing.T) {
	for _, c := range []struct {
		p    Precondition
		want string
	}{
		{Precondition{CheckRevision, "k", 0}, "k must not exist"},
		{Precondition{CheckRevision, "k", 7}, "k must be at revision 7"},
		{Precondition{CheckExists, "k", 0}, "k must exist"},
		{Precondition{CheckEmpty, "k/", 0}, "k/* must be empty"},
		{Precondition{CheckTerm, "", 3}, "term must be 3"},
		{Precondition{Check: 9}, "unknown check 9"},
	} {
		if got := c.p.String(); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}

// allocated runs f and returns how many bytes it allocated.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// A few hostile bytes that announce much must not make the decoder allocate it.
func TestAnnouncedLengthsAreNotBelieved(t *testing.T) {
	huge := binary.AppendUvarint(nil, math.MaxUint64)
	most := func(n int) []byte { return binary.AppendUvarint(nil, uint64(n)) }
	txn := append(make([]byte, 18), 0) // session, sequence, done, no actor
	entries := map[string][]byte{
		"transactions":            append([]byte{Format, 0}, huge...),
		"most transactions":       append([]byte{Format, 0}, most(MaxPackTxns)...),
		"preconditions":           append(append([]byte{Format, 0, 1}, txn...), huge...),
		"most preconditions":      append(append([]byte{Format, 0, 1}, txn...), most(MaxTxnOps)...),
		"length of a value":       append(append([]byte{Format, 0, 1}, txn...), append([]byte{0, 1, 0, 1, 'k'}, most(MaxValueBytes)...)...),
		"huge length of a value":  append(append([]byte{Format, 0, 1}, txn...), append([]byte{0, 1, 0, 1, 'k'}, huge...)...),
		"number without an end":   append([]byte{Format}, bytes.Repeat([]byte{0xff}, 32)...),
		"actor beyond the limits": append([]byte{Format, 0, 1}, append(make([]byte, 18), huge...)...),
	}
	for name, b := range entries {
		var err error
		n := allocated(func() { _, err = DecodeCommand(b) })
		if !errors.Is(err, ErrMalformed) || n > 64<<10 {
			t.Errorf("%s: %v, %d bytes allocated", name, err, n)
		}
	}
	for name, body := range map[string][]byte{
		"sessions": append([]byte{1, 1, 0}, most(1<<24)...),
		"results":  append(append([]byte{1, 1, 0, 1}, make([]byte, 18)...), most(MaxSessionWindow)...),
		"keys":     append([]byte{1, 1, 0, 0}, most(1<<30)...),
		"key":      append([]byte{1, 1, 0, 0, 1}, huge...),
		"value":    append([]byte{1, 1, 0, 0, 1, 1, 'k'}, most(MaxValueBytes)...),
	} {
		var err error
		n := allocated(func() { err = New().Restore(bytes.NewReader(sealed(body))) })
		if !errors.Is(err, ErrCorrupt) || n > 64<<10 {
			t.Errorf("snapshot with %s: %v, %d bytes allocated", name, err, n)
		}
	}
}

// sealed makes a snapshot of a body: header before, right checksum behind.
func sealed(body []byte) []byte {
	b := append([]byte(snapshotMagic+"\x01"), body...)
	return binary.BigEndian.AppendUint64(b, crc64.Checksum(b, crcTable))
}

func smallState(t testing.TB) *State {
	s := New()
	c := put("key/a", "value", RequestID{Session: [16]byte{7}})
	c.Time = 99
	c.Txns = append(c.Txns, put("key/b", "", RequestID{}).Txns[0], Txn{
		Request: RequestID{Session: [16]byte{3}, Sequence: 4}, Require: []Precondition{{CheckExists, "none", 0}},
	})
	if _, err := s.Apply(3, 2, c.Encode()); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestCorruptSnapshotsAreRefused(t *testing.T) {
	good := snapshotOf(t, smallState(t))
	s := New()
	apply(t, s, entry{9, 9, put("mine", "1", RequestID{Session: [16]byte{1}})})
	before := snapshotOf(t, s)
	try := func(what string, at int, b []byte, want error) {
		t.Helper()
		if err := s.Restore(bytes.NewReader(b)); !errors.Is(err, want) {
			t.Fatalf("%s at %d: %v, want %v", what, at, err, want)
		}
	}
	for i := range good {
		for _, mask := range []byte{1, 0x80, 0xff} {
			bad := bytes.Clone(good)
			bad[i] ^= mask
			want := ErrCorrupt
			if i == len(snapshotMagic) {
				want = ErrUnknownFormat
			}
			try("a changed byte", i, bad, want)
		}
		try("an end", i, good[:i], ErrCorrupt)
	}
	try("a byte more", len(good), append(bytes.Clone(good), 0), ErrCorrupt)
	keys := func(kv ...string) []byte {
		b := append([]byte{1, 1, 0, 0}, byte(len(kv)))
		for _, k := range kv {
			b = append(appendString(b, k), 0, 1, 1)
		}
		return sealed(b)
	}
	try("keys out of order", 0, keys("b", "a"), ErrCorrupt)
	try("a key twice", 0, keys("a", "a"), ErrCorrupt)
	try("trailing bytes", 0, sealed([]byte{1, 1, 0, 0, 0, 7}), ErrCorrupt)
	broken := errors.New("disk error")
	if err := s.Restore(io.MultiReader(bytes.NewReader(good[:9]), &failing{broken})); !errors.Is(err, broken) {
		t.Errorf("a reader that fails: %v", err)
	}
	if !bytes.Equal(before, snapshotOf(t, s)) {
		t.Error("a refused snapshot changed the state")
	}
	try("nothing", 0, good, nil)
	if !bytes.Equal(good, snapshotOf(t, s)) {
		t.Error("a good snapshot was not restored whole")
	}
}

type failing struct{ err error }

func (f *failing) Read([]byte) (int, error)  { return 0, f.err }
func (f *failing) Write([]byte) (int, error) { return 0, f.err }

func TestSnapshotReportsAFullDisk(t *testing.T) {
	full := errors.New("disk full")
	if _, err := smallState(t).Snapshot().WriteTo(&failing{full}); !errors.Is(err, full) {
		t.Errorf("small: %v", err)
	}
	s := New()
	for i := range 3 {
		apply(t, s, entry{uint64(i + 1), 1, put(string(rune('a'+i)), strings.Repeat("v", MaxValueBytes), RequestID{})})
	}
	if _, err := s.Snapshot().WriteTo(&failing{full}); !errors.Is(err, full) {
		t.Errorf("large: %v", err)
	}
}

// A snapshot is what was there when it was taken, and restored sessions still
// answer repeated requests.
func TestSnapshotIsOneMoment(t *testing.T) {
	s := smallState(t)
	p, want := s.Snapshot(), snapshotOf(t, s)
	id := RequestID{Session: [16]byte{7}, Sequence: 1}
	apply(t, s, entry{4, 2, put("key/a", "later", id)})
	var b bytes.Buffer
	if _, err := p.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b.Bytes(), want) {
		t.Error("what was applied later is in the snapshot")
	}
	r := New()
	if err := r.Restore(&b); err != nil {
		t.Fatal(err)
	}
	if e, _ := r.View().Get("key/a"); string(e.Value) != "value" || e.Revision != 3 || p.View().Revision() != 3 {
		t.Errorf("the snapshot has %+v", e)
	}
	if out := apply(t, r, entry{5, 2, put("key/a", "twice", RequestID{Session: [16]byte{7}})}); out[0].Revision != 3 {
		t.Errorf("a request from before the snapshot was carried out again: %+v", out)
	}
	out := apply(t, r, entry{6, 2, Command{Txns: []Txn{{Request: RequestID{Session: [16]byte{3}, Sequence: 4}}}}})
	if out[0].Status != Conflict {
		t.Errorf("a refusal from before the snapshot: %+v", out)
	}
}

func FuzzDecodeCommand(f *testing.F) {
	c := put("k", "v", RequestID{Session: [16]byte{1}, Sequence: 2, Done: 1})
	f.Add(c.Encode())
	f.Add([]byte{Format, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := DecodeCommand(b)
		if err != nil {
			return
		}
		// What one node decodes it applies, without panic, and encodes stably.
		if _, err := New().Apply(1, 1, b); err != nil {
			t.Fatal(err)
		}
		again, err := DecodeCommand(c.Encode())
		if err != nil || !bytes.Equal(again.Encode(), c.Encode()) {
			t.Fatalf("unstable: %+v %+v %v", c, again, err)
		}
	})
}

func FuzzDecodeTxn(f *testing.F) {
	c := put("k", "v", RequestID{Session: [16]byte{1}, Sequence: 2, Done: 1})
	f.Add(AppendTxn(nil, &c.Txns[0]))
	f.Fuzz(func(t *testing.T, b []byte) {
		x, err := DecodeTxn(b)
		if err != nil {
			return
		}
		if again, err := DecodeTxn(AppendTxn(nil, &x)); err != nil || again.Validate() == nil != (x.Validate() == nil) {
			t.Fatalf("unstable: %+v %+v %v", x, again, err)
		}
	})
}

func FuzzRestore(f *testing.F) {
	good := snapshotOf(f, smallState(f))
	f.Add(good[len(snapshotMagic)+1 : len(good)-8])
	f.Add([]byte{1, 1, 0, 0, 0})
	f.Fuzz(func(t *testing.T, body []byte) {
		s := New()
		// The checksum is made right, or no body would ever be looked at.
		if err := s.Restore(bytes.NewReader(sealed(body))); err != nil {
			if !errors.Is(err, ErrCorrupt) || s.View().Revision() != 0 || s.View().Len() != 0 {
				t.Fatalf("%v, state %+v", err, s.View())
			}
			return
		}
		b := snapshotOf(t, s)
		r := New()
		if err := r.Restore(bytes.NewReader(b)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b, snapshotOf(t, r)) || s.View().Bytes() != r.View().Bytes() {
			t.Fatal("unstable")
		}
	})
}
