// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
)

// body reads the whole body within its limits. The deadline is taken back
// afterwards: while the handler works, the server watches the connection for
// its end, and a read deadline would look like one.
func (q *request) body() ([]byte, error) {
	_ = q.ctl.SetReadDeadline(time.Now().Add(bodyTimeout))
	b, err := io.ReadAll(http.MaxBytesReader(q.w, q.r.Body, maxBodyBytes))
	_ = q.ctl.SetReadDeadline(time.Time{})
	var tooLong *http.MaxBytesError
	switch {
	case err == nil || errors.As(err, &tooLong):
		return b, err
	default:
		return nil, api.Errorf(api.CodeIncomplete, "read the body: %w", err)
	}
}

// optional reads a body that may be left out, and decodes what there is.
func (q *request) optional(in any) ([]byte, error) {
	body, err := q.body()
	if err == nil && len(body) > 0 {
		err = decode(body, in)
	}
	return body, err
}

// wish is optional for a body that has defaults and rules of its own.
func (q *request) wish(in interface{ Validate() error }) ([]byte, error) {
	body, err := q.optional(in)
	if err == nil {
		err = in.Validate()
	}
	return body, err
}

// decode reads JSON into v: one value, no unknown fields, no wrong types. A
// body that is no JSON at all is answered with 400, a wrong field with 422.
func decode(body []byte, v any) error {
	err := api.DecodeStrict(bytes.NewReader(body), v)
	if err == nil {
		return nil
	}
	if !json.Valid(body) {
		return &httpError{http.StatusBadRequest, err}
	}
	if better := locate(body, reflect.TypeOf(v).Elem(), ""); better != nil {
		return better
	}
	return err
}

var unmarshaler = reflect.TypeFor[json.Unmarshaler]()

// locate finds the field at fault and returns an error with its whole path,
// which encoding/json does not tell for unknown fields and for types that
// decode themselves.
func locate(raw json.RawMessage, t reflect.Type, path string) error {
	if bytes.Equal(bytes.TrimSpace(raw), []byte("null")) {
		return nil
	}
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	custom := reflect.PointerTo(t).Implements(unmarshaler)
	switch {
	case custom:
	case t.Kind() == reflect.Struct:
		return locateStruct(raw, t, path)
	case t.Kind() == reflect.Slice && t.Elem().Kind() != reflect.Uint8:
		var list []json.RawMessage
		if json.Unmarshal(raw, &list) != nil {
			return wrongType(path, raw, "array")
		}
		for i, item := range list {
			if err := locate(item, t.Elem(), fmt.Sprintf("%s[%d]", path, i)); err != nil {
				return err
			}
		}
		return nil
	case t.Kind() == reflect.Map:
		var m map[string]json.RawMessage
		if json.Unmarshal(raw, &m) != nil {
			return wrongType(path, raw, "object")
		}
		for _, k := range slices.Sorted(maps.Keys(m)) {
			if err := locate(m[k], t.Elem(), join(path, k)); err != nil {
				return err
			}
		}
		return nil
	}
	err := json.Unmarshal(raw, reflect.New(t).Interface())
	var typ *json.UnmarshalTypeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &typ):
		return wrongType(path, raw, jsonName(t))
	}
	return api.Invalid(path, "%v", err)
}

func locateStruct(raw json.RawMessage, t reflect.Type, path string) error {
	var m map[string]json.RawMessage
	if json.Unmarshal(raw, &m) != nil {
		return wrongType(path, raw, "object")
	}
	fields := map[string]reflect.StructField{}
	for f := range fieldsOf(t) {
		fields[strings.ToLower(jsonField(f))] = f
	}
	for _, k := range slices.Sorted(maps.Keys(m)) {
		f, ok := fields[strings.ToLower(k)]
		if !ok {
			return api.Invalid(join(path, clip(k)), "is not a known field; %sopenapi.json has the fields of this kind", base)
		}
		if err := locate(m[k], f.Type, join(path, k)); err != nil {
			return err
		}
	}
	return nil
}

// fieldsOf yields the fields of a struct that JSON shows.
func fieldsOf(t reflect.Type) func(func(reflect.StructField) bool) {
	return func(yield func(reflect.StructField) bool) {
		for i := range t.NumField() {
			f := t.Field(i)
			if f.IsExported() && jsonField(f) != "-" && !yield(f) {
				return
			}
		}
	}
}

func jsonField(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
	if name == "" {
		return f.Name
	}
	return name
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

func wrongType(path string, raw json.RawMessage, want string) error {
	return api.Invalid(path, "is a JSON %s where a %s belongs: %s", jsonKind(raw), want, clip(string(raw)))
}

func jsonKind(raw json.RawMessage) string {
	raw = bytes.TrimSpace(raw)
	switch {
	case len(raw) == 0:
		return "nothing"
	case raw[0] == '{':
		return "object"
	case raw[0] == '[':
		return "array"
	case raw[0] == '"':
		return "string"
	case raw[0] == 't', raw[0] == 'f':
		return "boolean"
	}
	return "number"
}

// jsonName is the JSON type that a Go type is written as.
func jsonName(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Bool:
		return "boolean"
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return "integer"
	case reflect.Float32, reflect.Float64:
		return "number"
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			return "string"
		}
		return "array"
	case reflect.Struct, reflect.Map:
		return "object"
	}
	return "string"
}

// mergePatch applies a merge patch (RFC 7396) to a document.
func mergePatch(document, patch any) any {
	p, ok := patch.(map[string]any)
	if !ok {
		return patch
	}
	d, ok := document.(map[string]any)
	if !ok {
		d = map[string]any{}
	}
	out := maps.Clone(d)
	for k, v := range p {
		if v == nil {
			delete(out, k)
			continue
		}
		out[k] = mergePatch(out[k], v)
	}
	return out
}

// generic decodes JSON without losing digits of large numbers.
func generic(b []byte) (any, error) {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	var v any
	err := dec.Decode(&v)
	return v, err
}
