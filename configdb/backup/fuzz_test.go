// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package backup

import (
	"bytes"
	"encoding/binary"
	"hash/crc64"
	"testing"
	"time"

	"github.com/muster-vm/muster/internal/backupfile"
)

// Whatever somebody who has the key seals as a state, with checksums that are
// right, it is refused or it is what its header says.
func FuzzRead(f *testing.F) {
	state := someState(f)
	var b bytes.Buffer
	if _, err := state.Snapshot().WriteTo(&b); err != nil {
		f.Fatal(err)
	}
	whole, v := b.Bytes(), state.View()
	c, err := Cluster(v)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole[:len(whole)-8], true)
	f.Add(whole[:len(whole)-9], true)
	f.Add([]byte("MUSTERS\x01\x01\x01\x00\x00\x00"), true)
	f.Add([]byte{}, false)
	f.Fuzz(func(t *testing.T, content []byte, summed bool) {
		if summed {
			content = binary.BigEndian.AppendUint64(bytes.Clone(content), crc64.Checksum(content, crc64.MakeTable(crc64.ECMA)))
		}
		h := &backupfile.Header{
			ClusterID: c.Meta.ID, Cluster: "prod", Life: c.Spec.Life, Node: "n1", Version: "0.1", Time: time.Unix(1, 0).UTC(),
			Revision: v.Revision(), Term: v.Term(), Schema: 1, Keys: v.Len(),
		}
		var file bytes.Buffer
		w, err := backupfile.NewWriter(&file, h, key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		got, _, err := Read(&file, withKey)
		if err != nil {
			return
		}
		if got.View().Revision() != h.Revision || got.View().Len() != h.Keys {
			t.Fatalf("revision %d with %d keys passes for %d with %d", got.View().Revision(), got.View().Len(), h.Revision, h.Keys)
		}
	})
}
