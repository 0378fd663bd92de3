// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"
)

// carried is a spec of this version in these tests.
type carried struct {
	Name    string               `json:"name,omitempty"`
	Inner   carriedInner         `json:"inner,omitzero"`
	Ptr     *carriedInner        `json:"ptr,omitempty"`
	List    []carriedInner       `json:"list,omitempty"`
	Words   []string             `json:"words,omitempty"`
	Bytes   []byte               `json:"bytes,omitempty"`
	Labels  map[string]string    `json:"labels,omitempty"`
	Map     map[string]carriedIn `json:"map,omitempty"`
	When    time.Time            `json:"when,omitzero"`
	Plain   int
	private int //nolint:unused // never stored
}

type carriedInner struct {
	A int `json:"a,omitempty"`
	B int `json:"b,omitempty"`
}

type carriedIn = carriedInner

func TestRewritingKeepsWhatThisVersionDoesNotKnow(t *testing.T) {
	for name, c := range map[string]struct {
		stored string // as a newer version wrote it
		change func(*carried)
		want   string // "" for a refusal
	}{
		"a field of the object":            {`{"name":"x","new":{"deep":[1,2]}}`, func(c *carried) { c.Name = "y" }, `{"name":"y","Plain":0,"new":{"deep":[1,2]}}`},
		"a large number":                   {`{"new":18446744073709551615}`, func(c *carried) { c.Name = "y" }, `{"name":"y","Plain":0,"new":18446744073709551615}`},
		"nothing unknown":                  {`{"name":"x"}`, func(c *carried) { c.Name = "y" }, `{"name":"y","Plain":0}`},
		"a name in another case":           {`{"name":"x","plaiN":3}`, func(c *carried) { c.Name = "y" }, `{"name":"y","Plain":3}`},
		"inside a struct":                  {`{"inner":{"a":1,"new":7}}`, func(c *carried) { c.Inner.A = 2 }, `{"inner":{"a":2,"new":7},"Plain":0}`},
		"a struct that is zero but for it": {`{"inner":{"new":7}}`, func(c *carried) { c.Name = "y" }, `{"name":"y","inner":{"new":7},"Plain":0}`},
		"a struct that becomes zero":       {`{"inner":{"a":1,"new":7}}`, func(c *carried) { c.Inner = carriedInner{} }, `{"inner":{"new":7},"Plain":0}`},
		"behind a pointer":                 {`{"ptr":{"a":1,"new":7}}`, func(c *carried) { c.Ptr.B = 5 }, `{"ptr":{"a":1,"b":5,"new":7},"Plain":0}`},
		"a pointer that is taken away":     {`{"ptr":{"a":1,"new":7}}`, func(c *carried) { c.Ptr = nil }, `{"Plain":0}`},
		"a pointer that is null":           {`{"ptr":null,"new":1}`, func(c *carried) { c.Ptr = &carriedInner{A: 1} }, `{"ptr":{"a":1},"Plain":0,"new":1}`},
		"a label that is taken away":       {`{"labels":{"a":"1","b":"2"},"new":1}`, func(c *carried) { delete(c.Labels, "a") }, `{"labels":{"b":"2"},"Plain":0,"new":1}`},
		"in a map":                         {`{"map":{"k":{"a":1,"new":7},"l":{"new":8}}}`, func(c *carried) { delete(c.Map, "l"); c.Map["k"] = carriedInner{A: 2} }, `{"map":{"k":{"a":2,"new":7}},"Plain":0}`},
		"a list that stays":                {`{"list":[{"a":1,"new":7},{"a":2}]}`, func(c *carried) { c.Name = "y" }, `{"name":"y","list":[{"a":1,"new":7},{"a":2}],"Plain":0}`},
		"a list with one more":             {`{"list":[{"a":1,"new":7}]}`, func(c *carried) { c.List = append(c.List, carriedInner{A: 2}) }, `{"list":[{"a":1,"new":7},{"a":2}],"Plain":0}`},
		"a list in another order":          {`{"list":[{"a":1,"new":7},{"a":2,"new":8}]}`, func(c *carried) { c.List = []carriedInner{{A: 2}, {A: 1}} }, `{"list":[{"a":2,"new":8},{"a":1,"new":7}],"Plain":0}`},
		"a list with one less":             {`{"list":[{"a":1,"new":7},{"a":2,"new":8}]}`, func(c *carried) { c.List = c.List[1:] }, `{"list":[{"a":2,"new":8}],"Plain":0}`},
		"a list of equals":                 {`{"list":[{"a":1,"new":7},{"a":1,"new":8}]}`, func(c *carried) { c.Name = "y" }, `{"name":"y","list":[{"a":1,"new":7},{"a":1,"new":8}],"Plain":0}`},
		"a known element is changed":       {`{"list":[{"a":1,"new":7},{"a":2}]}`, func(c *carried) { c.List[1].A = 3 }, `{"list":[{"a":1,"new":7},{"a":3}],"Plain":0}`},
		"an unknown element is changed":    {`{"list":[{"a":1,"new":7},{"a":2}]}`, func(c *carried) { c.List[0].A = 3 }, ""},
		"a list of words":                  {`{"words":["a","b"],"new":1}`, func(c *carried) { c.Words = []string{"c"} }, `{"words":["c"],"Plain":0,"new":1}`},
		"bytes and times":                  {`{"bytes":"AAE=","when":"2026-01-01T00:00:00Z","new":1}`, func(c *carried) { c.Bytes = []byte{2} }, `{"bytes":"Ag==","when":"2026-01-01T00:00:00Z","Plain":0,"new":1}`},
	} {
		var o Object[carried, struct{}]
		stored := []byte(`{"schema":1,"meta":{"name":"n","newMeta":true},"spec":` + c.stored + `}`)
		if _, err := o.Decode(stored, nil); err != nil {
			t.Fatal(err)
		}
		c.change(&o.Spec)
		r, err := o.RewriteSpec(stored)
		if err != nil {
			t.Fatal(err)
		}
		now, err := o.EncodeSpec()
		if err != nil {
			t.Fatal(err)
		}
		got, err := r.By(now)
		if c.want == "" {
			if !errors.Is(err, ErrNewerSchema) || !strings.HasPrefix(err.Error(), "spec.list has elements") {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		want := `{"schema":1,"meta":{"name":"n","newMeta":true},"spec":` + c.want + `}`
		if !sameJSON(t, got, []byte(want)) {
			t.Errorf("%s:\ngot  %s\nwant %s", name, got, want)
		}
		// As it is stored now, the next one changes nothing more.
		r, err = o.RewriteSpec(got)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := r.By(now); err != nil || !sameJSON(t, again, got) {
			t.Errorf("%s, once more: %s, %v", name, again, err)
		}
	}
}

func sameJSON(t *testing.T, a, b []byte) bool {
	t.Helper()
	var x, y any
	for _, p := range []struct {
		text []byte
		into *any
	}{{a, &x}, {b, &y}} {
		dec := json.NewDecoder(strings.NewReader(string(p.text)))
		dec.UseNumber()
		if err := dec.Decode(p.into); err != nil {
			t.Fatalf("%s: %v", p.text, err)
		}
	}
	return reflect.DeepEqual(x, y)
}

func TestANewerSchemaIsNotRewritten(t *testing.T) {
	var o Object[carried, carriedInner]
	for _, text := range []string{`{"schema":2,"meta":{},"spec":{}}`, `{"schema":2,"meta":"of another form","spec":7}`} {
		if _, err := o.RewriteSpec([]byte(text)); !errors.Is(err, ErrNewerSchema) {
			t.Errorf("%s: %v", text, err)
		}
	}
	if _, err := o.RewriteStatus([]byte(`{"schema":3,"status":[]}`)); !errors.Is(err, ErrNewerSchema) {
		t.Error("a status of a newer schema may be rewritten")
	}
	if _, err := o.RewriteStatus([]byte(`{"schema":1,"status":[]}`)); err == nil || errors.Is(err, ErrNewerSchema) {
		t.Errorf("a damaged status: %v", err)
	}
}

// FuzzRewrite: whatever is stored, a rewriting that changes nothing known loses
// nothing, and one that changes something keeps what is unknown at the top.
func FuzzRewrite(f *testing.F) {
	f.Add([]byte(`{"name":"x","inner":{"a":1,"n":2},"list":[{"a":1,"n":[{}]}],"map":{"k":{"n":1}},"n":null}`))
	f.Add([]byte(`{"ptr":{"n":{"a":1}},"words":["x"],"labels":{"":""},"Plain":1e3}`))
	f.Fuzz(func(t *testing.T, spec []byte) {
		stored := []byte(`{"schema":1,"meta":{},"spec":` + string(spec) + `}`)
		var o Object[carried, struct{}]
		if _, err := o.Decode(stored, nil); err != nil {
			return
		}
		r, err := o.RewriteSpec(stored)
		if err != nil {
			return
		}
		o.Spec.Name += "y"
		now, err := o.EncodeSpec()
		if err != nil {
			t.Fatal(err)
		}
		got, err := r.By(now)
		if err != nil {
			if errors.Is(err, ErrNewerSchema) {
				t.Fatalf("%s is refused though no list changes: %v", spec, err)
			}
			return
		}
		was, is := members(members(stored)["spec"]), members(members(got)["spec"])
		for k := range was {
			if _, known := memberType(reflect.TypeFor[carried](), k); !known {
				if _, kept := is[k]; !kept {
					t.Fatalf("%q of %s is lost: %s", k, spec, got)
				}
			}
		}
		var back Object[carried, struct{}]
		if _, err := back.Decode(got, nil); err != nil || back.Spec.Name != o.Spec.Name && !caseVariants(was) {
			t.Fatalf("%s: name %q, want %q, %v", got, back.Spec.Name, o.Spec.Name, err)
		}
	})
}

// caseVariants: encoding/json takes "NAME" for name, so such text is ambiguous;
// no version writes it.
func caseVariants(m map[string]json.RawMessage) bool {
	for k := range m {
		if k != "name" && strings.EqualFold(k, "name") {
			return true
		}
	}
	return false
}
