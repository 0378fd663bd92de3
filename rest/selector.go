// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
)

// term is one "key=value" of a selector.
type term struct{ key, value string }

// selection is what a list asks for.
type selection struct {
	project string
	all     bool
	labels  []term
	fields  []term
	limit   int
	after   string // ID of the last item of the page before
}

func (q *request) selection(object reflect.Type) (selection, error) {
	var s selection
	var err error
	if s.project, s.all, err = q.project(); err != nil {
		return s, err
	}
	if s.limit, err = q.intParam("limit", listItems, 1, maxListItems); err != nil {
		return s, err
	}
	if s.labels, err = terms("labels", q.param("labels")); err != nil {
		return s, err
	}
	if s.fields, err = terms("fields", q.param("fields")); err != nil {
		return s, err
	}
	for _, f := range s.fields {
		if !hasField(object, strings.Split(f.key, ".")) {
			return s, api.Invalid("fields", "%q is not a field of this kind; write, for example, status.phase=running", clip(f.key))
		}
	}
	if c := q.param("continue"); c != "" {
		b, err := base64.RawURLEncoding.DecodeString(c)
		if err != nil || !isPlace(string(b)) {
			return s, api.Invalid("continue", "is not a value that an earlier page gave")
		}
		s.after = string(b)
	}
	return s, nil
}

// isPlace reports whether a text is the ID of an object, or those of two with a dot
// between them. Anything else would sort behind all objects, and its page be empty.
func isPlace(s string) bool {
	first, second, two := strings.Cut(s, ".")
	return api.IsID(first) && (!two || api.IsID(second))
}

func continueToken(after string) string { return base64.RawURLEncoding.EncodeToString([]byte(after)) }

func terms(param, text string) ([]term, error) {
	if text == "" {
		return nil, nil
	}
	parts := strings.Split(text, ",")
	if len(parts) > maxSelectors {
		return nil, api.Invalid(param, "has %d terms; at most %d are allowed", len(parts), maxSelectors)
	}
	var out []term
	for _, p := range parts {
		k, v, ok := strings.Cut(p, "=")
		if !ok || k == "" {
			return nil, api.Invalid(param, "%q is not of the form key=value", clip(p))
		}
		out = append(out, term{k, v})
	}
	return out, nil
}

// hasField reports whether a path of JSON names leads to a scalar in a type.
func hasField(t reflect.Type, path []string) bool {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if len(path) == 0 {
		scalar := t.Kind() != reflect.Map && t.Kind() != reflect.Slice && t.Kind() != reflect.Struct
		return scalar || t == reflect.TypeFor[time.Time]()
	}
	switch t.Kind() {
	case reflect.Map:
		return len(path) == 1
	case reflect.Struct:
		for f := range fieldsOf(t) {
			if jsonField(f) == path[0] {
				return hasField(f.Type, path[1:])
			}
		}
	}
	return false
}

// matches reports whether an object is selected. A field is compared as JSON
// writes it; one that is not set also equals the empty string.
func (s *selection) matches(m *api.Meta, object any) (bool, error) {
	if !s.all && m.Project != s.project {
		return false, nil
	}
	for _, l := range s.labels {
		if v, ok := m.Labels[l.key]; !ok || v != l.value {
			return false, nil
		}
	}
	for _, f := range s.fields {
		v := lookup(reflect.ValueOf(object), strings.Split(f.key, "."))
		if !v.IsValid() || v.IsZero() {
			if f.value == "" {
				continue
			}
			if !v.IsValid() {
				return false, nil
			}
		}
		text, err := json.Marshal(v.Interface())
		if err != nil {
			return false, fmt.Errorf("encode %s of %s %s: %w", f.key, m.Kind, m.Name, err)
		}
		var plain string
		if json.Unmarshal(text, &plain) != nil {
			plain = string(text) // a number or a truth
		}
		if plain != f.value {
			return false, nil
		}
	}
	return true, nil
}

// lookup follows a path that hasField has found to lead somewhere. The result
// is invalid if a pointer or a key of a map on the way is missing.
func lookup(v reflect.Value, path []string) reflect.Value {
	for v.Kind() == reflect.Pointer {
		v = v.Elem()
	}
	if len(path) == 0 || !v.IsValid() {
		return v
	}
	switch v.Kind() {
	case reflect.Map:
		return lookup(v.MapIndex(reflect.ValueOf(path[0])), path[1:])
	case reflect.Struct:
		for f := range fieldsOf(v.Type()) {
			if jsonField(f) == path[0] {
				return lookup(v.FieldByIndex(f.Index), path[1:])
			}
		}
	}
	return reflect.Value{}
}
