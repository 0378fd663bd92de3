// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package guard

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
)

const goodStart = `{"id":7,"op":"start","vm":"web-1","epoch":3,"session":9,"protected":true,` +
	`"argv":["/bin/x","-a"],"env":["A=b"],"dir":"/tmp","log_path":"/tmp/l","extra":{"q":[1]}}`

func TestDecodeAccepts(t *testing.T) {
	tests := []struct {
		line string
		want request
	}{
		{`{"id":1,"op":"hello"}`, request{1, opHello, nil}},
		{` { "op" : "list" , "id" : 18446744073709551615 } `, request{1<<64 - 1, opList, nil}},
		{`{"id":2,"op":"extend","session":3,"deadline_ns":4}`, request{2, opExtend, extendBody{3, 4}}},
		{`{"id":2,"op":"kill","vm":"a"}`, request{2, opKill, vmBody{"a"}}},
		{`{"id":2,"op":"forget","vm":"a"}`, request{2, opForget, vmBody{"a"}}},
		{`{"id":2,"op":"protect","vm":"a","on":false}`, request{2, opProtect, protectBody{"a", false}}},
		{`{"id":2,"op":"watch"}`, request{2, opWatch, nil}},
		{`{"id":2,"op":"stop"}`, request{2, opStop, nil}},
		{goodStart, request{7, opStart, StartRequest{
			VM: "web-1", Epoch: 3, Session: 9, Protected: true, Argv: []string{"/bin/x", "-a"}, Env: []string{"A=b"},
			Dir: "/tmp", LogPath: "/tmp/l", Extra: json.RawMessage(`{"q":[1]}`),
		}}},
	}
	for _, tt := range tests {
		got, e := decodeRequest([]byte(tt.line))
		if e != nil || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: %+v, %v", tt.line, got, e)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	start := func(old, repl string) string {
		if !strings.Contains(goodStart, old) {
			t.Fatal("nothing to replace:", old)
		}
		return strings.Replace(goodStart, old, repl, 1)
	}
	tests := []struct {
		name, line string
		id         uint64
	}{
		{"empty line", ``, 0},
		{"not JSON", `hello`, 0},
		{"array", `[1]`, 0},
		{"cut off", `{"id":1,"op":"hello"`, 0},
		{"two objects", `{"id":1,"op":"hello"}{"id":2,"op":"hello"}`, 0},
		{"not UTF-8", "{\"id\":1,\"op\":\"hello\xff\"}", 0},
		{"no id", `{"op":"hello"}`, 0},
		{"id zero", `{"id":0,"op":"hello"}`, 0},
		{"negative id", `{"id":-1,"op":"hello"}`, 0},
		{"fractional id", `{"id":1.5,"op":"hello"}`, 0},
		{"id twice", `{"id":1,"id":2,"op":"hello"}`, 0},
		{"no op", `{"id":1}`, 1},
		{"unknown op", `{"id":1,"op":"reboot"}`, 1},
		{"unknown field", `{"id":1,"op":"hello","x":1}`, 1},
		{"field of another op", `{"id":1,"op":"kill","vm":"a","on":true}`, 1},
		{"field in capitals", `{"id":1,"op":"kill","VM":"a"}`, 1},
		{"missing field", `{"id":1,"op":"extend","session":1}`, 1},
		{"null field", `{"id":1,"op":"protect","vm":"a","on":null}`, 1},
		{"wrong type", `{"id":1,"op":"extend","session":"1","deadline_ns":2}`, 1},
		{"session zero", `{"id":1,"op":"extend","session":0,"deadline_ns":2}`, 1},
		{"deadline overflows", `{"id":1,"op":"extend","session":1,"deadline_ns":9223372036854775808}`, 1},
		{"empty vm", `{"id":1,"op":"kill","vm":""}`, 1},
		{"vm with a slash", `{"id":1,"op":"kill","vm":"../a"}`, 1},
		{"vm too long", `{"id":1,"op":"kill","vm":"` + strings.Repeat("a", 65) + `"}`, 1},
		{"argv relative", start(`"/bin/x"`, `"bin/x"`), 7},
		{"argv empty", start(`["/bin/x","-a"]`, `[]`), 7},
		{"argv with NUL", start(`"-a"`, `"-\u0000a"`), 7},
		{"env without name", start(`"A=b"`, `"=b"`), 7},
		{"env without value", start(`"A=b"`, `"A"`), 7},
		{"env sets the guard's mark", start(`"A=b"`, `"MUSTER_VM=b"`), 7},
		{"dir relative", start(`"/tmp",`, `"tmp",`), 7},
		{"log relative", start(`"/tmp/l"`, `"l"`), 7},
		{"log empty", start(`"/tmp/l"`, `""`), 7},
		{"log too long", start(`"/tmp/l"`, `"/`+strings.Repeat("l", MaxPathBytes)+`"`), 7},
		{"extra too large", start(`{"q":[1]}`, `"`+strings.Repeat("l", MaxExtraBytes)+`"`), 7},
		{"line too long", `{"id":1,"op":"` + strings.Repeat("l", MaxRequestBytes) + `"}`, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			req, e := decodeRequest([]byte(tt.line))
			if codeOf(e) != CodeBadRequest || req.id != tt.id {
				t.Fatalf("got %v with id %d, want bad_request with id %d", e, req.id, tt.id)
			}
		})
	}
}

func FuzzDecodeRequest(f *testing.F) {
	f.Add([]byte(goodStart))
	f.Add([]byte(`{"id":2,"op":"extend","session":3,"deadline_ns":4}`))
	f.Add([]byte(`{"id":2,"op":"protect","vm":"a","on":false}`))
	f.Add([]byte(`{"id":1,"op":"hello"}`))
	f.Add([]byte(`{"id":1,"op":"start","argv":null}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		req, e := decodeRequest(line)
		if e != nil {
			if e.Code != CodeBadRequest || !json.Valid(refusalLine(req.id, e)) {
				t.Fatalf("refusal %v", e)
			}
			return
		}
		// What was accepted survives the client's own encoding.
		again, err := requestLine(req.id, req.op, req.body)
		if err != nil {
			return // escaping made it longer than a line may be
		}
		req2, e := decodeRequest(bytes.TrimSuffix(again, []byte("\n")))
		if e != nil {
			t.Fatalf("%s: %v", again, e)
		}
		again2, err := requestLine(req2.id, req2.op, req2.body)
		if err != nil || !bytes.Equal(again, again2) {
			t.Fatalf("%s became %s, %v", again, again2, err)
		}
	})
}
