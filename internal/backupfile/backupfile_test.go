// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package backupfile

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/pki"
	"github.com/muster-vm/muster/internal/version"
)

var update = flag.Bool("update", false, "write the golden file anew")

var (
	testKey   = bytes.Repeat([]byte{7}, pki.ClusterKeyBytes)
	otherKey  = bytes.Repeat([]byte{8}, pki.ClusterKeyBytes)
	goldenAge = time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC)
)

func someHeader() *Header {
	return &Header{
		ClusterID: "0193c0de-0000-7000-8000-000000000001", Cluster: "prod", Life: 2, Node: "n1", Version: "0.1", Time: goldenAge,
		Revision: 4711, Term: 3, Stale: true, StaleSeconds: 1.5, Schema: 1, Nodes: []string{"n1", "n2"}, Keys: 5, Bytes: 1234,
		Objects: map[api.Kind]int{api.KindVM: 2, api.KindNode: 2},
	}
}

// content is n bytes that differ from place to place.
func content(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 31 >> 3)
	}
	return b
}

func made(tb testing.TB, h *Header, plain []byte) []byte {
	tb.Helper()
	var out bytes.Buffer
	w, err := NewWriter(&out, h, testKey)
	if err != nil {
		tb.Fatal(err)
	}
	// In odd pieces, as a caller would.
	for len(plain) > 0 {
		n := min(len(plain), 10_007)
		if _, err := w.Write(plain[:n]); err != nil {
			tb.Fatal(err)
		}
		plain = plain[n:]
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return out.Bytes()
}

func opened(b, key []byte) ([]byte, *Header, error) {
	r, err := NewReader(bytes.NewReader(b), func(*Header) ([]byte, error) { return key, nil })
	if err != nil {
		return nil, nil, err
	}
	plain, err := io.ReadAll(r)
	return plain, r.Header, err
}

func TestBackupsComeBack(t *testing.T) {
	for _, n := range []int{0, 1, MaxChunk - 1, MaxChunk, MaxChunk + 1, 3 * MaxChunk, 3*MaxChunk + 5} {
		h := someHeader()
		b := made(t, h, content(n))
		got, size, err := Verify(iotest.OneByteReader(bytes.NewReader(b)))
		if err != nil || size != int64(len(b)) || !reflect.DeepEqual(got, h) {
			t.Errorf("%d bytes: verified %+v, size %d of %d, %v", n, got, size, len(b), err)
		}
		plain, head, err := opened(b, testKey)
		if err != nil || !bytes.Equal(plain, content(n)) || !reflect.DeepEqual(head, h) {
			t.Errorf("%d bytes: %d came back, %v", n, len(plain), err)
		}
		if n > 16 && bytes.Contains(b, content(n)[:16]) {
			t.Errorf("%d bytes: the content is readable", n)
		}
		again := made(t, someHeader(), content(n))
		if bytes.Equal(b, again) {
			t.Error("two backups of one state are equal: the key of a file repeats")
		}
	}
}

// The form is a promise: a later version reads it.
func TestGoldenBackup(t *testing.T) {
	h := someHeader()
	h.Salt, h.KeyID = bytes.Repeat([]byte{9}, saltBytes), KeyID(testKey)
	h.Slot = &Slot{KDF: slotKDF, N: 1 << 14, R: 8, P: 1, Salt: bytes.Repeat([]byte{3}, saltBytes)}
	derived, err := h.Slot.derive("correct horse battery")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join("testdata", "golden.backup")
	if *update {
		if h.Slot.Key, err = pki.Seal(derived, slotLabel, testKey); err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		w, err := newWriter(&out, h, testKey)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content(MaxChunk + 100)); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(w.Close(), os.WriteFile(path, out.Bytes(), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got, _, err := Verify(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	key, err := got.Slot.Open("correct horse battery")
	if err != nil || !bytes.Equal(key, testKey) {
		t.Fatalf("the slot gives %x, %v", key, err)
	}
	plain, _, err := opened(b, key)
	if err != nil || !bytes.Equal(plain, content(MaxChunk+100)) {
		t.Errorf("%d bytes came back, %v", len(plain), err)
	}
	h.Slot.Key = got.Slot.Key // its nonce is random
	if !reflect.DeepEqual(got, h) {
		t.Errorf("header %+v, want %+v", got, h)
	}
	var out bytes.Buffer
	w, err := newWriter(&out, h, testKey)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(content(MaxChunk + 100)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out.Bytes(), b) {
		t.Error("this version writes another form")
	}
}

func TestEveryDamageIsFound(t *testing.T) {
	b := made(t, someHeader(), content(MaxChunk+300))
	for i := range b {
		if i > 500 && i < len(b)-100 && i%1999 != 0 || i%3 != 0 && i < 500 {
			continue // it is all alike
		}
		for name, bad := range map[string][]byte{"cut": b[:i], "flipped": flip(b, i)} {
			if h, _, err := Verify(bytes.NewReader(bad)); err == nil || h != nil {
				t.Fatalf("%s at byte %d: passes", name, i)
			} else if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrNoBackup) && !errors.Is(err, ErrNewer) {
				t.Fatalf("%s at byte %d: %v", name, i, err)
			}
			if _, _, err := opened(bad, testKey); err == nil {
				t.Fatalf("%s at byte %d: opens", name, i)
			}
		}
	}
	for _, more := range [][]byte{{0}, b} {
		if _, _, err := Verify(bytes.NewReader(append(bytes.Clone(b), more...))); !errors.Is(err, ErrDamaged) {
			t.Errorf("%d bytes appended: %v", len(more), err)
		}
	}
}

func flip(b []byte, i int) []byte {
	out := bytes.Clone(b)
	out[i] ^= 1
	return out
}

// parts takes a backup apart into its header and its chunks with their lengths.
func parts(t *testing.T, b []byte) (head []byte, chunks [][]byte) {
	t.Helper()
	n := len(magic) + 1 + lenBytes + int(binary.BigEndian.Uint32(b[len(magic)+1:]))
	head, b = b[:n], b[n:]
	for {
		size := int(binary.BigEndian.Uint32(b))
		if size == 0 {
			return head, chunks
		}
		chunks, b = append(chunks, b[:lenBytes+size]), b[lenBytes+size:]
	}
}

func joined(head []byte, chunks ...[]byte) []byte {
	b := bytes.Clone(head)
	for _, c := range chunks {
		b = append(b, c...)
	}
	b = append(b, 0, 0, 0, 0)
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

// Somebody who can write to where backups are kept makes one with a right
// checksum.
func TestForgeriesDoNotOpen(t *testing.T) {
	b := made(t, someHeader(), content(3*MaxChunk))
	head, c := parts(t, b)
	if !bytes.Equal(joined(head, c...), b) || len(c) != 3 {
		t.Fatalf("the test does not know the form: %d chunks", len(c))
	}
	other, d := parts(t, made(t, someHeader(), content(3*MaxChunk)))
	lied := bytes.Replace(head, []byte(`"revision":4711`), []byte(`"revision":4712`), 1)
	empty := make([]byte, lenBytes+sealOverhead)
	binary.BigEndian.PutUint32(empty, sealOverhead)
	for name, bad := range map[string][]byte{
		"exchanged":         joined(head, c[1], c[0], c[2]),
		"repeated":          joined(head, c[0], c[0], c[1], c[2]),
		"first dropped":     joined(head, c[1], c[2]),
		"last dropped":      joined(head, c[0], c[1]),
		"last first":        joined(head, c[2]),
		"after the last":    joined(head, c[0], c[1], c[2], c[2]),
		"of another backup": joined(head, c[0], d[1], c[2]),
		"another's header":  joined(other, c...),
		"header changed":    joined(lied, c...),
		"made up":           joined(head, empty),
	} {
		if _, _, err := Verify(bytes.NewReader(bad)); err != nil {
			t.Errorf("%s: the checksum is wrong: %v", name, err)
		}
		plain, _, err := opened(bad, testKey)
		if !errors.Is(err, ErrForged) || api.CodeOf(err) != api.CodeChecksum {
			t.Errorf("%s: %d bytes, %v", name, len(plain), err)
		}
	}
}

func TestKeysAndPassphrases(t *testing.T) {
	h := someHeader()
	var err error
	const words = "correct horse battery"
	if h.Slot, err = newSlot(testKey, words, minScryptN); err != nil {
		t.Fatal(err)
	}
	b := made(t, h, content(10))
	got, err := ReadHeader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	if key, err := got.Slot.Open(words); err != nil || !bytes.Equal(key, testKey) {
		t.Errorf("the right pass phrase: %x, %v", key, err)
	}
	var none *Slot
	for name, c := range map[string]struct {
		err   error
		words string
	}{
		"wrong pass phrase":  {second(got.Slot.Open(words + "x")), "the pass phrase is wrong"},
		"no slot":            {second(none.Open(words)), "made without one"},
		"another key":        {third(opened(b, otherKey)), "cluster.key"},
		"half a key":         {third(opened(b, testKey[:16])), "cluster key has 32 bytes"},
		"short pass phrase":  {second(NewSlot(testKey, "short")), "give 12 to 1024"},
		"endless passphrase": {second(NewSlot(testKey, strings.Repeat("x", MaxPassphrase+1))), "give 12 to 1024"},
	} {
		if c.err == nil || !strings.Contains(c.err.Error(), c.words) || api.CodeOf(c.err) != api.CodeInvalid {
			t.Errorf("%s: %v", name, c.err)
		}
	}
	if bytes.Contains(b, testKey) || bytes.Contains(b, []byte(words)) {
		t.Error("a secret is readable")
	}
	if KeyID(testKey) == KeyID(otherKey) || len(KeyID(testKey)) != 16 {
		t.Errorf("key IDs %s and %s", KeyID(testKey), KeyID(otherKey))
	}
}

func second[T any](_ T, err error) error        { return err }
func third[T, U any](_ T, _ U, err error) error { return err }

// withHeader is a file with a right checksum and any header.
func withHeader(t *testing.T, change func(map[string]any)) []byte {
	t.Helper()
	h := someHeader()
	h.Slot = &Slot{KDF: slotKDF, N: scryptN, R: scryptR, P: scryptP, Salt: make([]byte, 32), Key: make([]byte, 60)}
	head, chunks := parts(t, made(t, h, content(5)))
	m := map[string]any{}
	if err := json.Unmarshal(head[len(magic)+1+lenBytes:], &m); err != nil {
		t.Fatal(err)
	}
	change(m)
	body, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	b := append([]byte(magic), Format)
	b = binary.BigEndian.AppendUint32(b, uint32(len(body)))
	return joined(append(b, body...), chunks...)
}

func TestHeadersAreChecked(t *testing.T) {
	slot := func(key string, v any) func(map[string]any) {
		return func(m map[string]any) { m["slot"].(map[string]any)[key] = v }
	}
	set := func(key string, v any) func(map[string]any) { return func(m map[string]any) { m[key] = v } }
	for name, c := range map[string]struct {
		change func(map[string]any)
		want   error
		words  string
	}{
		"newer level":      {set("featureLevel", version.FeatureLevel+1), ErrNewer, "use version 0.1 or a later one"},
		"newer schema":     {set("schema", api.Schema+1), ErrNewer, "use version 0.1 or a later one"},
		"no cluster":       {set("clusterID", ""), ErrDamaged, "lacks"},
		"no key ID":        {set("keyID", ""), ErrDamaged, "lacks"},
		"short salt":       {set("salt", []byte{1}), ErrDamaged, "lacks"},
		"negative keys":    {set("keys", -1), ErrDamaged, "negative"},
		"wrong type":       {set("revision", "x"), ErrDamaged, "cannot be read"},
		"unknown kdf":      {slot("kdf", "argon9"), ErrNewer, "argon9"},
		"cheap":            {slot("n", 2), ErrDamaged, "out of bounds"},
		"no power of two":  {slot("n", 1<<16+1), ErrDamaged, "out of bounds"},
		"all memory":       {slot("n", 1<<40), ErrDamaged, "out of bounds"},
		"wide":             {slot("r", 1<<20), ErrDamaged, "out of bounds"},
		"r of 0":           {slot("r", 0), ErrDamaged, "out of bounds"},
		"endless":          {slot("p", 1000), ErrDamaged, "out of bounds"},
		"short slot salt":  {slot("salt", []byte{1}), ErrDamaged, "malformed"},
		"large sealed key": {slot("key", make([]byte, 5000)), ErrDamaged, "malformed"},
	} {
		b := withHeader(t, c.change)
		for where, err := range map[string]error{"verify": third(Verify(bytes.NewReader(b))), "open": third(opened(b, testKey))} {
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.words) {
				t.Errorf("%s, %s: %v", name, where, err)
			}
		}
	}
	later := made(t, someHeader(), content(5))
	later[len(magic)] = Format + 1
	for name, c := range map[string]struct {
		b    []byte
		want error
	}{
		"empty": {nil, ErrNoBackup}, "text": {[]byte("hello, this is no backup at all"), ErrNoBackup}, "short": {[]byte("GIF8"), ErrNoBackup},
		"newer format": {later, ErrNewer}, "only magic": {[]byte(magic), ErrDamaged},
		"huge header": {append([]byte(magic+"\x01"), 0xff, 0xff, 0xff, 0xff), ErrDamaged},
		"no content":  {joined(must(someHeaderBytes())), ErrDamaged},
	} {
		if _, _, err := Verify(bytes.NewReader(c.b)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	// Unknown fields are of a newer version that keeps to this format.
	if _, _, err := Verify(bytes.NewReader(withHeader(t, set("colour", "blue")))); err != nil {
		t.Errorf("an unknown field: %v", err)
	}
}

func someHeaderBytes() ([]byte, error) {
	h := someHeader()
	h.Salt, h.KeyID = make([]byte, saltBytes), "k"
	return h.encode()
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

func TestReadAndWriteErrorsAreNoDamage(t *testing.T) {
	b := made(t, someHeader(), content(MaxChunk))
	for _, at := range []int{5, 100, 5000, len(b) - 3, len(b)} {
		broken := io.MultiReader(bytes.NewReader(b[:at]), iotest.ErrReader(os.ErrPermission))
		if _, _, err := Verify(broken); !errors.Is(err, os.ErrPermission) || errors.Is(err, ErrDamaged) {
			t.Errorf("reading fails after %d bytes: %v", at, err)
		}
	}
	for _, room := range []int{0, 3, 1000, MaxChunk, len(b) - 1} {
		w, err := NewWriter(&smallDisk{room}, someHeader(), testKey)
		if err == nil {
			_, err = w.Write(content(MaxChunk))
		}
		if err == nil {
			err = w.Close()
		}
		if !errors.Is(err, io.ErrShortWrite) {
			t.Errorf("room for %d bytes: %v", room, err)
		}
	}
}

type smallDisk struct{ room int }

func (d *smallDisk) Write(p []byte) (int, error) {
	if d.room -= len(p); d.room < 0 {
		return 0, io.ErrShortWrite
	}
	return len(p), nil
}

// FuzzBackup changes whole files.
func FuzzBackup(f *testing.F) {
	f.Add(made(f, someHeader(), content(100)))
	f.Add(made(f, someHeader(), nil))
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, size, err := Verify(bytes.NewReader(b))
		if err == nil && (size != int64(len(b)) || h == nil) {
			t.Fatalf("verified %d of %d bytes", size, len(b))
		}
		plain, _, oerr := opened(b, testKey)
		if oerr == nil && err != nil {
			t.Fatalf("opens to %d bytes, but is %v", len(plain), err)
		}
	})
}

// FuzzHeader: a header that passes is written and read again as it is.
func FuzzHeader(f *testing.F) {
	good, err := someHeaderBytes()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good[len(magic)+1+lenBytes:])
	f.Add([]byte(`{"clusterID":"c","cluster":"c","keyID":"k","salt":"","slot":{"n":1073741824}}`))
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, body []byte) {
		b := binary.BigEndian.AppendUint32(append([]byte(magic), Format), uint32(len(body))) //nolint:gosec // of the fuzzer
		h, head, err := readHeader(bytes.NewReader(append(b, body...)))
		if err != nil {
			return
		}
		if len(head) != len(b)+len(body) {
			t.Fatalf("read %d bytes of %d", len(head), len(b)+len(body))
		}
		again, err := h.encode()
		if err != nil {
			t.Fatal(err)
		}
		back, _, err := readHeader(bytes.NewReader(again))
		if err != nil {
			t.Fatal(err)
		}
		if b, err := back.encode(); err != nil || !bytes.Equal(b, again) {
			t.Fatalf("%s became %s, %v", again, b, err)
		}
	})
}

// FuzzChunks gives chunks in frames whose checksum is right: none opens that was
// not sealed with the key, in its place.
func FuzzChunks(f *testing.F) {
	head, chunks := split(f, made(f, someHeader(), content(100)))
	f.Add(chunks, true)
	f.Add(append(bytes.Clone(chunks), chunks...), true)
	f.Add([]byte{0xff, 0xff, 0xff, 0xff}, true)
	f.Add([]byte{}, false)
	f.Fuzz(func(t *testing.T, middle []byte, ended bool) {
		b := append(bytes.Clone(head), middle...)
		if ended {
			b = append(b, make([]byte, lenBytes)...)
			sum := sha256.Sum256(b)
			b = append(b, sum[:]...)
		}
		plain, _, err := opened(b, testKey)
		if err == nil && (!bytes.Equal(middle, chunks) || !bytes.Equal(plain, content(100))) {
			t.Fatalf("chunks %x open to %d bytes", middle, len(plain))
		}
	})
}

// split returns what stands before the chunks of a file, and the chunks.
func split(tb testing.TB, b []byte) (head, chunks []byte) {
	tb.Helper()
	_, head, err := readHeader(bytes.NewReader(b))
	if err != nil {
		tb.Fatal(err)
	}
	return head, b[len(head) : len(b)-lenBytes-sha256.Size]
}
