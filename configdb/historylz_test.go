// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/muster-vm/muster/configdb/fsm"
)

// What is stored was written with this dictionary. A changed one would turn it
// into something else: give a new dictionary a new number (historySqueezed).
func TestTheDictionaryIsForEver(t *testing.T) {
	const want = "dce2c6e9cde402bc2927d6dde80198683c6e73fd46a4bc8683b18212cb3131b8"
	if sum := sha256.Sum256([]byte(lzDictionary)); hex.EncodeToString(sum[:]) != want {
		t.Errorf("the dictionary has the SHA-256 %x", sum)
	}
	// What a release wrote is read as it was.
	const text = `{"schema":1,"meta":{"id":"0193c0de","kind":"vm","name":"web1"},"spec":{"cpus":7}}`
	stored, _ := hex.DecodeString("0f83010a313363304f030f8701004e776562313e0130377d7d")
	got, err := unsqueeze(stored, 1000)
	if err != nil || string(got) != text {
		t.Errorf("%q, %v; squeezed now: %x", got, err, squeeze(nil, []byte(text)))
	}
}

func TestSqueezing(t *testing.T) {
	random := make([]byte, 100_000)
	for i := range random {
		random[i] = byte(rand.Int())
	}
	far := append(append([]byte("the same words, far away"), random...), "the same words, far away"...)
	for name, c := range map[string]struct {
		text string
		most int // bytes squeezed
	}{
		"nothing":                  {"", 1},
		"one byte":                 {"x", 2},
		"shorter than a match":     {"abc", 4},
		"a run":                    {strings.Repeat("a", 10_000), 60},
		"a run of 15 literals":     {string(random[:15]), 17},
		"a run of 270 literals":    {string(random[:270]), 273},
		"noise":                    {string(random), 101_000},
		"beyond the window":        {string(far), 101_000},
		"the dictionary itself":    {lzDictionary, 60},
		"the largest value":        {strings.Repeat(lzDictionary, fsm.MaxValueBytes/len(lzDictionary)), 10_000},
		"a VM that is like others": {`{"schema":1,"meta":{"id":"0193c0de-0000-7000-8000-000000000001","kind":"vm","name":"vm77","project":"default","generation":1,"createdAt":"2026-11-27T09:11:18.123456789Z"},"spec":{"cpus":2,"memory":1073741824,"disks":[{"volume":"vm77-disk0"}],"ha":"none","power":"stopped"}}`, 135},
	} {
		t.Run(name, func(t *testing.T) {
			b := squeeze([]byte("before"), []byte(c.text))
			b, ok := bytes.CutPrefix(b, []byte("before"))
			if !ok || len(b) > c.most {
				t.Errorf("%d bytes squeezed to %d, want at most %d", len(c.text), len(b), c.most)
			}
			got, err := unsqueeze(b, len(c.text))
			if err != nil || string(got) != c.text {
				t.Errorf("came back as %d bytes of %d: %v", len(got), len(c.text), err)
			}
			if len(c.text) > 0 {
				if _, err := unsqueeze(b, len(c.text)-1); err == nil {
					t.Error("unsqueezed beyond its limit")
				}
			}
		})
	}
}

func FuzzUnsqueeze(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{0x10, 'x'})
	f.Add([]byte{0xff, 0xff, 0xff})
	f.Add([]byte{0x0f, 1, 0, 0xff, 0xff, 0xff, 0})
	f.Add(squeeze(nil, []byte(lzDictionary+"x"+lzDictionary)))
	f.Fuzz(func(t *testing.T, b []byte) {
		const most = 1 << 16
		if got, err := unsqueeze(b, most); err == nil && len(got) > most {
			t.Errorf("%d bytes, at most %d", len(got), most)
		}
	})
}

func FuzzSqueeze(f *testing.F) {
	f.Add([]byte("x"))
	f.Add([]byte(lzDictionary[100:200] + "abcabcabcabc"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := unsqueeze(squeeze(nil, b), len(b))
		if err != nil || !bytes.Equal(got, b) {
			t.Errorf("%q came back as %q: %v", b, got, err)
		}
	})
}

func BenchmarkSqueeze(b *testing.B) {
	text := []byte(`{"schema":1,"meta":{"id":"0193c0de-0000-7000-8000-000000000001","kind":"vm","name":"vm77","project":"default","generation":1,"createdAt":"2026-11-27T09:11:18.123456789Z"},"spec":{"cpus":2,"memory":1073741824,"disks":[{"volume":"vm77-disk0"}],"nics":[{"network":"lan","mac":"52:54:00:9a:bc:de","address":"10.0.3.77"}],"ha":"restart","power":"stopped"}}`)
	var out []byte
	b.ReportAllocs()
	for b.Loop() {
		out = squeeze(out[:0], text)
	}
	b.ReportMetric(float64(len(text)), "in")
	b.ReportMetric(float64(len(out)), "out")
}
