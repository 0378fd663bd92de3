// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// Rewritten is a stored value that is about to be replaced.
type Rewritten struct {
	// Known is its content as this version writes it, without what it does not
	// know.
	Known []byte
	old   []byte
	typ   reflect.Type
}

// RewriteSpec prepares the replacement of a stored spec, RewriteStatus that of a
// stored status. ErrNewerSchema means that it must not be done.
func (o *Object[S, T]) RewriteSpec(old []byte) (*Rewritten, error) {
	return rewrite[storedSpec[S]](old)
}

// RewriteStatus is like RewriteSpec.
func (o *Object[S, T]) RewriteStatus(old []byte) (*Rewritten, error) {
	return rewrite[storedStatus[T]](old)
}

func (s storedSpec[S]) number() int   { return s.Schema }
func (s storedStatus[T]) number() int { return s.Schema }

func rewrite[V interface{ number() int }](old []byte) (*Rewritten, error) {
	var v V
	err := json.Unmarshal(old, &v)
	if v.number() > Schema { // the first field: known even if the rest cannot be read
		return nil, ErrNewerSchema
	}
	if err != nil {
		return nil, fmt.Errorf("decode stored value: %w", err)
	}
	known, err := json.Marshal(v)
	return &Rewritten{Known: known, old: old, typ: reflect.TypeFor[V]()}, err
}

// By returns the new value with the fields of the old one that this version does
// not know: a newer version wrote them, and they are not this one's to drop.
// Fields of what the new value leaves out as a whole go with it. Where it cannot
// be told which element of a list unknown fields belong to, it is ErrNewerSchema.
func (r *Rewritten) By(now []byte) ([]byte, error) {
	if bytes.Equal(r.Known, r.old) {
		return now, nil // as nearly always
	}
	return carry(r.typ, "", r.old, now)
}

var unmarshaler = reflect.TypeFor[json.Unmarshaler]()

// carry adds to now, which is the encoding of a t, what old has and t does not
// know. Without any it returns now itself.
func carry(t reflect.Type, path string, old, now json.RawMessage) (json.RawMessage, error) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if reflect.PointerTo(t).Implements(unmarshaler) {
		return now, nil
	}
	switch t.Kind() {
	case reflect.Struct, reflect.Map:
		return carryMembers(t, path, old, now)
	case reflect.Slice, reflect.Array:
		if t.Elem().Kind() != reflect.Uint8 {
			return carryElements(t.Elem(), path, old, now)
		}
	}
	return now, nil
}

// members splits an object; nil if it is none.
func members(raw json.RawMessage) (m map[string]json.RawMessage) {
	if json.Unmarshal(raw, &m) != nil {
		return nil
	}
	return m
}

func carryMembers(t reflect.Type, path string, old, now json.RawMessage) (json.RawMessage, error) {
	was, is := members(old), members(now)
	if was == nil || is == nil {
		return now, nil
	}
	changed := false
	for name, v := range was {
		elem, known := memberType(t, name)
		if !known {
			is[name], changed = v, true
			continue
		}
		if elem == nil {
			continue
		}
		present, ok := is[name]
		if !ok {
			if t.Kind() == reflect.Map || elem.Kind() != reflect.Struct || members(v) == nil {
				continue // left out: its writer took it away
			}
			present = json.RawMessage("{}") // zero in what is known of it
		}
		next, err := carry(elem, path+"."+name, v, present)
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(next, present) {
			is[name], changed = next, true
		}
	}
	if !changed {
		return now, nil
	}
	return json.Marshal(is)
}

// memberType is the type of a member of a struct or map, and whether this version
// knows it. Every key of a map is known, as its writer saw it. A name that differs
// in case is decoded into the field, and has no type.
func memberType(t reflect.Type, name string) (reflect.Type, bool) {
	if t.Kind() == reflect.Map {
		return t.Elem(), true
	}
	folded := false
	for _, f := range reflect.VisibleFields(t) {
		tag, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if tag == "" && !f.Anonymous {
			tag = f.Name
		}
		if !f.IsExported() || tag == "-" {
			continue
		}
		if tag == name {
			return f.Type, true
		}
		folded = folded || strings.EqualFold(tag, name)
	}
	return nil, folded
}

// carryElements does it for lists. An element is the same as before if all that
// is known of it is: if it was changed, or another took its place, nobody can
// tell here. So unknown fields stay where elements were only added, moved or
// taken away, and otherwise the change is refused.
func carryElements(t reflect.Type, path string, old, now json.RawMessage) (json.RawMessage, error) {
	var was, is []json.RawMessage
	if json.Unmarshal(old, &was) != nil || json.Unmarshal(now, &is) != nil {
		return now, nil
	}
	taken := make([]bool, len(is))
	changed, lost := false, false
	for _, v := range was {
		known, err := knownPart(t, v)
		if err != nil {
			return nil, err
		}
		whole, err := carry(t, path, v, known)
		if err != nil {
			return nil, err
		}
		unknown := !bytes.Equal(whole, known)
		at := slices.IndexFunc(is, func(x json.RawMessage) bool { return bytes.Equal(x, known) })
		for at >= 0 && taken[at] {
			next := slices.IndexFunc(is[at+1:], func(x json.RawMessage) bool { return bytes.Equal(x, known) })
			if at += 1 + next; next < 0 {
				at = -1
			}
		}
		switch {
		case at < 0:
			lost = lost || unknown
		default:
			taken[at] = true
			if unknown {
				is[at], changed = whole, true
			}
		}
	}
	if lost && slices.Contains(taken, false) {
		return nil, fmt.Errorf("%s has elements with fields that this version does not know, and one of them is changed: %w", strings.TrimPrefix(path, "."), ErrNewerSchema)
	}
	if !changed {
		return now, nil
	}
	return json.Marshal(is)
}

// knownPart is a value as this version writes it.
func knownPart(t reflect.Type, raw json.RawMessage) (json.RawMessage, error) {
	v := reflect.New(t)
	if err := json.Unmarshal(raw, v.Interface()); err != nil {
		return nil, fmt.Errorf("decode stored value: %w", err)
	}
	return json.Marshal(v.Interface())
}
