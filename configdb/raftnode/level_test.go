// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package raftnode

import (
	"bytes"
	"io"
	"testing"

	"github.com/muster-vm/muster/configdb/fsm"
)

// A snapshot that this version will never understand ends the node; one that is
// damaged does not, as the leader sends another.
func TestASnapshotOfAnUnknownFormatEndsTheNode(t *testing.T) {
	var good bytes.Buffer
	if _, err := fsm.New().Snapshot().WriteTo(&good); err != nil {
		t.Fatal(err)
	}
	at := len("MUSTERS")
	for what, c := range map[string]struct {
		change func(b []byte)
		fatal  bool
	}{
		"good":           {func([]byte) {}, false},
		"unknown format": {func(b []byte) { b[at] = 99 }, true},
		"damaged":        {func(b []byte) { b[at+1] ^= 1 }, false},
	} {
		b := bytes.Clone(good.Bytes())
		c.change(b)
		fatal := false
		a := &adapter{state: fsm.New(), onFatal: func(error) { fatal = true }}
		if err := a.Restore(io.NopCloser(bytes.NewReader(b))); (err != nil) != (what != "good") || fatal != c.fatal {
			t.Errorf("%s: %v, fatal %v", what, err, fatal)
		}
	}
}
