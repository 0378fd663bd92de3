// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Object is what REST shows and the store keeps: metadata, the wish of its
// writers (spec) and the report of the one module that owns it (status).
type Object[S, T any] struct {
	Meta   Meta `json:"meta"`
	Spec   S    `json:"spec"`
	Status T    `json:"status"`
}

// Spec is implemented by the pointer of every spec type. SetDefaults fills
// what the writer left out; Validate then names the first field that is wrong.
type Spec interface {
	SetDefaults()
	Validate() error
}

// Clone returns a deep copy by way of the encoding, which all types survive.
// What is read from the store is immutable: clone it, then change the clone.
func (o *Object[S, T]) Clone() Object[S, T] {
	c := Object[S, T]{Meta: o.Meta.clone()}
	deepCopy(&o.Spec, &c.Spec)
	deepCopy(&o.Status, &c.Status)
	return c
}

func deepCopy(from, to any) {
	b, err := json.Marshal(from)
	if err == nil {
		err = json.Unmarshal(b, to)
	}
	if err != nil {
		panic(fmt.Sprintf("api: %T does not survive its own encoding: %v", from, err))
	}
}

// Prepare sets defaults and validates metadata and spec.
func (o *Object[S, T]) Prepare() error {
	if o.Meta.Project == "" {
		o.Meta.Project = DefaultProject
	}
	if err := o.Meta.Validate(); err != nil {
		return err
	}
	if s, ok := any(&o.Spec).(Spec); ok {
		s.SetDefaults()
		return s.Validate()
	}
	return nil
}

// Schema is the number of the stored form that this version writes. A change
// that an older version would misread raises it and adds an upgrade function
// with a golden file.
const Schema = 1

// ErrNewerSchema is returned when an object written by a newer version would
// be rewritten, which would strip fields that this version does not know.
var ErrNewerSchema = errors.New("object was written by a newer version of muster; upgrade this node first")

type storedSpec[S any] struct {
	Schema int  `json:"schema"`
	Meta   Meta `json:"meta"`
	Spec   S    `json:"spec"`
}

type storedStatus[T any] struct {
	Schema int `json:"schema"`
	Status T   `json:"status"`
}

// EncodeSpec returns the stored form of metadata and spec.
func (o *Object[S, T]) EncodeSpec() ([]byte, error) {
	m := o.Meta.clone()
	m.Revision, m.StatusRevision = 0, 0
	return json.Marshal(storedSpec[S]{Schema: Schema, Meta: m, Spec: o.Spec})
}

// EncodeStatus returns the stored form of the status.
func (o *Object[S, T]) EncodeStatus() ([]byte, error) {
	return json.Marshal(storedStatus[T]{Schema: Schema, Status: o.Status})
}

// Decode reads the stored values; status may be nil. Unknown fields, which a
// newer version wrote, are passed over. newer reports that the spec's schema
// is above this version's and must not be rewritten.
func (o *Object[S, T]) Decode(spec, status []byte) (newer bool, err error) {
	var s storedSpec[S]
	if err := json.Unmarshal(spec, &s); err != nil {
		return false, fmt.Errorf("decode stored spec: %w", err)
	}
	if s.Schema < 1 {
		return false, fmt.Errorf("decode stored spec: schema %d is unknown", s.Schema)
	}
	o.Meta, o.Spec = s.Meta, s.Spec
	if status == nil {
		return s.Schema > Schema, nil
	}
	var t storedStatus[T]
	if err := json.Unmarshal(status, &t); err != nil {
		return false, fmt.Errorf("decode stored status: %w", err)
	}
	o.Status = t.Status
	return s.Schema > Schema, nil
}

// DecodeStrict reads a user's JSON into v: one value, no unknown fields, no
// wrong types. The error names the field. An error of the reader itself, such
// as a body over its limit, is returned as it is.
func DecodeStrict(r io.Reader, v any) error {
	src := &source{r: r}
	dec := json.NewDecoder(src)
	dec.DisallowUnknownFields()
	err := dec.Decode(v)
	if src.err != nil {
		return src.err
	}
	if err != nil {
		return strictError(err)
	}
	_, err = dec.Token()
	if src.err != nil {
		return src.err
	}
	if !errors.Is(err, io.EOF) {
		return Invalid("", "the body has data after the first JSON value; send one object")
	}
	return nil
}

// source remembers why reading failed, which is no fault of the JSON.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(b []byte) (int, error) {
	n, err := s.r.Read(b)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		s.err = err
	}
	return n, err
}

func strictError(err error) error {
	var typ *json.UnmarshalTypeError
	var syn *json.SyntaxError
	switch {
	case errors.As(err, &typ):
		return Invalid(typ.Field, "is a JSON %s where a %s belongs", typ.Value, typ.Type)
	case errors.As(err, &syn):
		return Invalid("", "the body is not valid JSON at byte %d: %v", syn.Offset, syn)
	case errors.Is(err, io.EOF):
		return Invalid("", "the body is empty; send a JSON object")
	case errors.Is(err, io.ErrUnexpectedEOF):
		return Invalid("", "the body ends in the middle of a JSON value")
	}
	if f, ok := bytes.CutPrefix([]byte(err.Error()), []byte(`json: unknown field "`)); ok {
		name := string(bytes.TrimSuffix(f, []byte(`"`)))
		return Invalid(clip(name), "is not a known field; see /api/v1/openapi.json for the fields of this kind")
	}
	return Invalid("", "%v", err)
}
