// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package guard

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"unicode/utf8"
)

type op string

const (
	opHello   op = "hello"
	opExtend  op = "extend"
	opStart   op = "start"
	opKill    op = "kill"
	opProtect op = "protect"
	opList    op = "list"
	opForget  op = "forget"
	opWatch   op = "watch"
	opControl op = "control"
	opStop    op = "stop"
)

type extendBody struct {
	Session    uint64 `json:"session"`
	DeadlineNS int64  `json:"deadline_ns"`
}

type vmBody struct {
	VM string `json:"vm"`
}

type protectBody struct {
	VM string `json:"vm"`
	On bool   `json:"on"`
}

// request is one decoded and validated request; body's type follows op.
type request struct {
	id   uint64
	op   op
	body any
}

func badRequest(format string, args ...any) *Error {
	return &Error{Code: CodeBadRequest, Msg: fmt.Sprintf(format, args...)}
}

// decodeRequest reads one line. On error the id is set if it could be read, so
// that the refusal finds its way.
//
// Strict means: one JSON object, valid UTF-8, every key known, spelled exactly
// and given once, every required key there. encoding/json alone folds case and
// lets the last duplicate win.
func decodeRequest(line []byte) (request, *Error) {
	var req request
	if len(line) > MaxRequestBytes {
		return req, badRequest("line of %d bytes is over %d", len(line), MaxRequestBytes)
	}
	if !utf8.Valid(line) {
		return req, badRequest("line is not UTF-8")
	}
	fields, err := splitObject(line)
	if err != nil {
		return req, badRequest("%v", err)
	}
	if err := json.Unmarshal(fields["id"], &req.id); err != nil || req.id == 0 {
		req.id = 0
		return req, badRequest("id must be an integer from 1")
	}
	if err := json.Unmarshal(fields["op"], &req.op); err != nil {
		return req, badRequest("op must be a string")
	}
	delete(fields, "id")
	delete(fields, "op")
	body, e := decodeBody(req.op, fields)
	if e != nil {
		return req, e
	}
	req.body = body
	return req, nil
}

// splitObject returns the members of a single JSON object.
func splitObject(line []byte) (map[string]json.RawMessage, error) {
	dec := json.NewDecoder(bytes.NewReader(line))
	tok, err := dec.Token()
	if err != nil {
		return nil, fmt.Errorf("not JSON: %w", err)
	}
	if tok != json.Delim('{') {
		return nil, fmt.Errorf("not a JSON object")
	}
	fields := make(map[string]json.RawMessage)
	for dec.More() {
		tok, err := dec.Token()
		if err != nil {
			return nil, fmt.Errorf("not JSON: %w", err)
		}
		key, ok := tok.(string)
		if !ok {
			return nil, fmt.Errorf("not a JSON object")
		}
		if _, dup := fields[key]; dup {
			return nil, fmt.Errorf("field %q is given twice", key)
		}
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return nil, fmt.Errorf("field %q: %w", key, err)
		}
		fields[key] = raw
	}
	if _, err := dec.Token(); err != nil {
		return nil, fmt.Errorf("not JSON: %w", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, fmt.Errorf("data after the object")
	}
	return fields, nil
}

// member is one field of an op: where it goes and whether it must be there.
type member struct {
	name     string
	into     any
	required bool
}

func decodeBody(o op, fields map[string]json.RawMessage) (any, *Error) {
	switch o {
	case opHello, opList, opWatch, opControl, opStop:
		return nil, fill(fields)
	case opExtend:
		var b extendBody
		if e := fill(fields, member{"session", &b.Session, true}, member{"deadline_ns", &b.DeadlineNS, true}); e != nil {
			return nil, e
		}
		if b.Session == 0 {
			return nil, badRequest("session must be at least 1")
		}
		return b, nil
	case opKill, opForget:
		var b vmBody
		if e := fill(fields, member{"vm", &b.VM, true}); e != nil {
			return nil, e
		}
		return b, checkVM(b.VM)
	case opProtect:
		var b protectBody
		if e := fill(fields, member{"vm", &b.VM, true}, member{"on", &b.On, true}); e != nil {
			return nil, e
		}
		return b, checkVM(b.VM)
	case opStart:
		var b StartRequest
		var user json.RawMessage
		e := fill(fields,
			member{"vm", &b.VM, true}, member{"epoch", &b.Epoch, true}, member{"session", &b.Session, true},
			member{"protected", &b.Protected, true}, member{"argv", &b.Argv, true}, member{"env", &b.Env, false},
			member{"dir", &b.Dir, false}, member{"log_path", &b.LogPath, true}, member{"extra", &b.Extra, false}, member{"user", &user, false})
		if e != nil {
			return nil, e
		}
		if user != nil {
			if b.User, e = decodeUser(user); e != nil {
				return nil, e
			}
		}
		return b, checkStart(b)
	}
	return nil, badRequest("unknown op %q", string(o))
}

// decodeUser is as strict as the request around it.
func decodeUser(raw json.RawMessage) (*User, *Error) {
	fields, err := splitObject(raw)
	if err != nil {
		return nil, badRequest("user: %v", err)
	}
	var u User
	return &u, fill(fields, member{"uid", &u.UID, true}, member{"gid", &u.GID, true},
		member{"groups", &u.Groups, false}, member{"memlock_bytes", &u.MemlockBytes, false})
}

// fill moves the given fields into the members and refuses what is left over.
func fill(fields map[string]json.RawMessage, members ...member) *Error {
	for _, m := range members {
		raw, ok := fields[m.name]
		if !ok {
			if m.required {
				return badRequest("field %q is missing", m.name)
			}
			continue
		}
		// null would silently leave the zero value; env and extra may be null.
		if m.required && bytes.Equal(raw, []byte("null")) {
			return badRequest("field %q is null", m.name)
		}
		if err := json.Unmarshal(raw, m.into); err != nil {
			return badRequest("field %q: %v", m.name, err)
		}
		delete(fields, m.name)
	}
	for name := range fields {
		return badRequest("unknown field %q", name)
	}
	return nil
}

func checkVM(vm string) *Error {
	if vm == "" || len(vm) > MaxVMLen {
		return badRequest("vm must have 1 to %d characters", MaxVMLen)
	}
	for _, c := range []byte(vm) {
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-') {
			return badRequest("vm may only have letters, digits and '-'")
		}
	}
	return nil
}

func checkStart(b StartRequest) *Error {
	if e := checkVM(b.VM); e != nil {
		return e
	}
	if len(b.Argv) == 0 || !filepath.IsAbs(b.Argv[0]) {
		return badRequest("argv[0] must be an absolute path")
	}
	for _, a := range b.Argv {
		if strings.IndexByte(a, 0) >= 0 {
			return badRequest("argv has a NUL byte")
		}
	}
	for _, kv := range b.Env {
		name, _, ok := strings.Cut(kv, "=")
		if !ok || name == "" || strings.IndexByte(kv, 0) >= 0 {
			return badRequest("env entry %q is not NAME=VALUE", kv)
		}
		if name == EnvGuardDir || name == EnvVM {
			return badRequest("env may not set %s", name)
		}
	}
	if e := checkPath("dir", b.Dir, true); e != nil {
		return e
	}
	if e := checkPath("log_path", b.LogPath, false); e != nil {
		return e
	}
	if e := checkUser(b.User); e != nil {
		return e
	}
	if len(b.Extra) > MaxExtraBytes {
		return badRequest("extra is over %d bytes", MaxExtraBytes)
	}
	return nil
}

// checkUser keeps root out: a request that names a user must never end as root.
func checkUser(u *User) *Error {
	if u == nil {
		return nil
	}
	if u.UID == 0 || u.GID == 0 {
		return badRequest("user may not have uid or gid 0")
	}
	if len(u.Groups) > MaxGroups {
		return badRequest("user has %d groups; at most %d are allowed", len(u.Groups), MaxGroups)
	}
	for _, id := range append([]uint32{u.UID, u.GID}, u.Groups...) {
		if id == 0 || id == noID {
			return badRequest("user has the id %d", id)
		}
	}
	return nil
}

// noID is (uid_t)-1, which setuid(2) and chown(2) read as "unchanged".
const noID = 1<<32 - 1

func checkPath(field, path string, mayBeEmpty bool) *Error {
	if path == "" && mayBeEmpty {
		return nil
	}
	if !filepath.IsAbs(path) || len(path) > MaxPathBytes || strings.IndexByte(path, 0) >= 0 {
		return badRequest("%s must be an absolute path of at most %d bytes", field, MaxPathBytes)
	}
	return nil
}
