// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/muster-vm/muster/internal/client"
)

func TestAFollowerPrintsNoEventTwiceAfterARelist(t *testing.T) {
	var tail eventTail
	var got []string
	for _, word := range strings.Fields("put:1 put:2 synced put:4 put:3 relist put:1 put:2 put:3 put:4 put:5 synced put:6 delete:1") {
		typ, id, _ := strings.Cut(word, ":")
		e := client.Event{Type: typ, Object: json.RawMessage(`{"meta":{"id":"` + id + `"}}`)}
		if tail.fresh(e) {
			got = append(got, id)
		}
	}
	if s := strings.Join(got, " "); s != "1 2 4 3 5 6" {
		t.Errorf("printed %s", s)
	}
}
