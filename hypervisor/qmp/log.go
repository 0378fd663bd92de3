// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package qmp

import (
	"bytes"
	"encoding/json"
	"regexp"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
)

// Limits of a log: its last entries are kept, each of them cut.
const (
	MaxLogEntries = api.MaxQEMULog
	MaxLogText    = 2 << 10
	// maxRedact is what is looked through for secrets; of what is longer only the
	// size is kept.
	maxRedact = 64 << 10
)

// The kinds of entries.
const (
	LogCommand = "command"
	LogReply   = "reply"
	LogError   = "error"
	LogEvent   = "event"
)

// LogEntry is one line of the conversation with a QEMU.
type LogEntry = api.QEMULogEntry

// Log keeps the last entries of the conversation with one QEMU, over any number
// of connections. Its zero value is ready; any goroutine may use it.
type Log struct {
	mu   sync.Mutex
	ring [MaxLogEntries]LogEntry
	n    uint64 // of all entries so far
}

// Last returns at most the last n entries, the oldest first.
func (l *Log) Last(n int) []LogEntry {
	l.mu.Lock()
	defer l.mu.Unlock()
	have := min(l.n, MaxLogEntries, uint64(max(n, 0)))
	out := make([]LogEntry, 0, have)
	for i := l.n - have; i < l.n; i++ {
		out = append(out, l.ring[i%MaxLogEntries])
	}
	return out
}

// add does nothing on a nil log.
func (l *Log) add(kind, name string, raw []byte) {
	if l == nil {
		return
	}
	e := LogEntry{Time: time.Now().UTC(), Kind: kind, Name: name}
	text := bytes.TrimSpace(raw)
	if hidesAll(name) && kind != LogEvent {
		text = []byte(`"hidden"`)
	}
	if len(text) > maxRedact {
		e.Cut, text = len(text), nil
	} else {
		text = Redact(text)
	}
	if len(text) > MaxLogText {
		e.Cut = len(text) - MaxLogText
		text = bytes.ToValidUTF8(text[:MaxLogText], nil)
	}
	e.Text = string(text)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ring[l.n%MaxLogEntries] = e
	l.n++
}

// hidesAll are the commands whose arguments are nothing but a secret or a
// person's input.
func hidesAll(command string) bool {
	switch command {
	case "set_password", "expire_password", "change-vnc-password", "guest-exec", "guest-set-user-password", "send-key", "human-monitor-command":
		return true
	}
	return false
}

// secret are the members of an object whose values are not shown: what is called
// a password or a key, and what secrets and guest-exec carry.
var secret = regexp.MustCompile(`(?i)("(?:[a-z0-9_-]*(?:password|passphrase|secret|token)[a-z0-9_-]*|data|input-data|buf-b64|out-data|err-data|key)"\s*:\s*)("(?:[^"\\]|\\.)*"|[0-9.eE+-]+|true|false)`)

// Redact hides the secrets in JSON; what is no JSON is not shown at all.
func Redact(raw []byte) []byte {
	if !json.Valid(raw) {
		return []byte(`""`)
	}
	return secret.ReplaceAll(raw, []byte(`$1"hidden"`))
}
