// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package kvwire

import (
	"bytes"
	"reflect"
	"testing"
)

func TestFramesSurviveTheStream(t *testing.T) {
	requests := []Request{
		{Number: 1, Op: Get, Key: []byte("a")},
		{Number: 300, Op: GetStale, Key: []byte("b")},
		{Number: 1 << 40, Op: Put, Key: []byte("c"), Condition: 7, Value: []byte("v")},
		{Number: 4, Op: Delete, Key: []byte("d"), Condition: 1},
	}
	var b []byte
	for i := range requests {
		b = AppendRequest(b, &requests[i])
	}
	for i, want := range requests {
		var got Request
		var err error
		if got, b, err = NextRequest(b); err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("request %d is %+v, %v", i, got, err)
		}
	}
	answers := []Answer{
		{Number: 1, Status: Done, Revision: 5}, {Number: 2, Status: Value, Revision: 6, Value: []byte("v")},
		{Number: 3, Status: None, Revision: 7}, {Number: 4, Status: Conflict, Revision: 0},
		{Number: 5, Status: Error, Code: "no_quorum", Detail: "why"},
	}
	for i := range answers {
		b = AppendAnswer(b, &answers[i])
	}
	for i, want := range answers {
		var got Answer
		var err error
		if got, b, err = NextAnswer(b); err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("answer %d is %+v, %v", i, got, err)
		}
	}
	if len(b) != 0 {
		t.Fatalf("%d bytes are left", len(b))
	}
}

func FuzzFrames(f *testing.F) {
	f.Add(AppendRequest(nil, &Request{Number: 9, Op: Put, Key: []byte("k"), Condition: 2, Value: []byte("v")}))
	f.Add(AppendAnswer(nil, &Answer{Number: 9, Status: Error, Code: "c", Detail: "d"}))
	f.Add([]byte{1, 3, 0xff, 0xff, 0xff, 0xff, 0x0f})
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, rest, err := NextRequest(b); err == nil {
			again, _, err := NextRequest(AppendRequest(nil, &r))
			if err != nil || again.Number != r.Number || !bytes.Equal(again.Key, r.Key) || !bytes.Equal(again.Value, r.Value) || len(rest) >= len(b) {
				t.Fatalf("%+v came back as %+v, %v", r, again, err)
			}
		}
		if a, rest, err := NextAnswer(b); err == nil {
			again, _, err := NextAnswer(AppendAnswer(nil, &a))
			if err != nil || !reflect.DeepEqual(again, a) && len(a.Value) > 0 || len(rest) >= len(b) {
				t.Fatalf("%+v came back as %+v, %v", a, again, err)
			}
		}
	})
}
