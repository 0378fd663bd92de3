// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package qmp

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

func TestSecretsAreNotLogged(t *testing.T) {
	var l Log
	for cmd, line := range map[string]string{
		"set_password":            `{"execute":"set_password","arguments":{"protocol":"vnc","password":"hunter2"},"id":1}`,
		"expire_password":         `{"execute":"expire_password","arguments":{"protocol":"vnc","time":"hunter2"},"id":2}`,
		"guest-exec":              `{"execute":"guest-exec","arguments":{"path":"/bin/hunter2","input-data":"aHVudGVyMg=="}}`,
		"guest-set-user-password": `{"execute":"guest-set-user-password","arguments":{"username":"root","password":"hunter2"}}`,
		"object-add":              `{"execute":"object-add","arguments":{"qom-type":"secret","id":"s0","data":"hunter2 \" hunter2"},"id":3}`,
		"blockdev-add":            `{"execute":"blockdev-add","arguments":{"driver":"rbd","key-secret":"hunter2","Password" : "hunter2"},"id":4}`,
		"migrate":                 `{"execute":"migrate", "arguments": {"tls-authz-token": "hunter2"}}`,
	} {
		l.add(LogCommand, cmd, []byte(line))
	}
	l.add(LogReply, "guest-exec", []byte(`{"out-data":"hunter2"}`))
	all, _ := json.Marshal(l.Last(MaxLogEntries))
	if strings.Contains(string(all), "hunter2") || strings.Contains(string(all), "aHVudGVyMg") {
		t.Errorf("%s", all)
	}
	if !strings.Contains(string(all), "qom-type") {
		t.Errorf("more is hidden than secrets: %s", all)
	}
}

func TestTheLogIsBounded(t *testing.T) {
	var l Log
	if got := l.Last(5); len(got) != 0 {
		t.Error(got)
	}
	for i := range MaxLogEntries + 10 {
		l.add(LogEvent, fmt.Sprint(i), []byte(`{"event":"X"}`))
	}
	last := l.Last(MaxLogEntries * 2)
	if len(last) != MaxLogEntries || last[0].Name != "10" || last[MaxLogEntries-1].Name != fmt.Sprint(MaxLogEntries+9) {
		t.Errorf("%d entries from %s to %s", len(last), last[0].Name, last[len(last)-1].Name)
	}
	if got := l.Last(2); len(got) != 2 || got[1].Name != fmt.Sprint(MaxLogEntries+9) {
		t.Error(got)
	}
	long := `"` + strings.Repeat("é", MaxLogText) + `"`
	l.add(LogReply, "long", []byte(long))
	if e := l.Last(1)[0]; len(e.Text) > MaxLogText || e.Cut != len(long)-MaxLogText || !json.Valid([]byte(`"`+strings.Trim(e.Text, `"`)+`"`)) {
		t.Errorf("%d bytes kept, %d cut", len(e.Text), e.Cut)
	}
	l.add(LogReply, "huge", []byte(`"`+strings.Repeat("x", maxRedact)+`"`))
	if e := l.Last(1)[0]; e.Text != "" || e.Cut == 0 {
		t.Errorf("%d bytes kept, %d cut", len(e.Text), e.Cut)
	}
	l.add(LogReply, "odd", []byte(`{"password":"hunter2`))
	if e := l.Last(1)[0]; strings.Contains(e.Text, "hunter2") {
		t.Error(e.Text)
	}
	(*Log)(nil).add(LogEvent, "x", nil) // a connection without a log
}

func FuzzRedact(f *testing.F) {
	f.Add(`{"password":"x"}`)
	f.Add(`{"a":{"key-secret" : 12}, "data":[1]}`)
	f.Fuzz(func(t *testing.T, s string) {
		if out := Redact([]byte(s)); !json.Valid(out) {
			t.Fatalf("%q became %q", s, out)
		}
	})
}
