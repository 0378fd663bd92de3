// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package history

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
)

// shownMeta are the fields of the metadata that are configuration. The others
// never change, or follow from changes.
var shownMeta = []string{"labels", "owner", "deletingAt", "finalizers"}

// Secret reports whether a field, by its name in JSON, holds a secret, sealed or
// hashed. The test of this package looks at all fields that there are.
func Secret(field string) bool {
	f := strings.ToLower(field)
	switch f {
	case "secret", "key", "hash", "passwordhash", "usedkey", "password", "passphrase", "privatekey", "clusterkey":
		return true
	}
	return strings.HasPrefix(f, "sealed")
}

// document returns what is compared of a stored spec: some of the metadata, and
// the spec.
func document(stored []byte) (map[string]any, error) {
	out := map[string]any{}
	if stored == nil {
		return out, nil
	}
	dec := json.NewDecoder(bytes.NewReader(stored))
	dec.UseNumber() // sizes must not lose digits
	var doc struct {
		Meta map[string]any `json:"meta"`
		Spec any            `json:"spec"`
	}
	if err := dec.Decode(&doc); err != nil {
		return nil, fmt.Errorf("decode stored spec: %w", err)
	}
	meta := map[string]any{}
	for _, f := range shownMeta {
		if x, ok := doc.Meta[f]; ok {
			meta[f] = x
		}
	}
	if len(meta) > 0 {
		out["meta"] = meta
	}
	out["spec"] = doc.Spec
	return out, nil
}

// Compare returns the fields that differ between two stored specs, in order of
// their paths. nil stands for no object.
func Compare(before, after []byte) ([]api.FieldChange, error) {
	b, err := document(before)
	if err != nil {
		return nil, err
	}
	a, err := document(after)
	if err != nil {
		return nil, err
	}
	out := []api.FieldChange{}
	err = compare("", b, a, func(c api.FieldChange) { out = append(out, c) })
	return out, err
}

// absent stands for a field that is not there.
type absent struct{}

func compare(path string, before, after any, emit func(api.FieldChange)) error {
	b, bm := before.(map[string]any)
	a, am := after.(map[string]any)
	_, nob := before.(absent)
	_, noa := after.(absent)
	if (bm || nob) && (am || noa) && len(b)+len(a) > 0 {
		return compareMaps(path, b, a, emit)
	}
	bl, bs := before.([]any)
	al, as := after.([]any)
	if (bs || nob) && (as || noa) && len(bl)+len(al) > 0 {
		for i := range max(len(bl), len(al)) {
			if err := compare(fmt.Sprintf("%s[%d]", path, i), at(bl, i), at(al, i), emit); err != nil {
				return err
			}
		}
		return nil
	}
	if reflect.DeepEqual(before, after) {
		return nil
	}
	c := api.FieldChange{Path: path}
	var err error
	if c.Before, err = encode(before); err != nil {
		return err
	}
	if c.After, err = encode(after); err != nil {
		return err
	}
	emit(c)
	return nil
}

func compareMaps(path string, before, after map[string]any, emit func(api.FieldChange)) error {
	names := maps.Clone(before)
	if names == nil {
		names = map[string]any{}
	}
	maps.Copy(names, after)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		b, a := get(before, name), get(after, name)
		full := name
		if path != "" {
			full = path + "." + name
		}
		if Secret(name) {
			if !reflect.DeepEqual(b, a) {
				emit(api.FieldChange{Path: full, Secret: true})
			}
			continue
		}
		if err := compare(full, b, a, emit); err != nil {
			return err
		}
	}
	return nil
}

func get(m map[string]any, name string) any {
	if v, ok := m[name]; ok {
		return v
	}
	return absent{}
}

func at(list []any, i int) any {
	if i < len(list) {
		return list[i]
	}
	return absent{}
}

func encode(v any) (json.RawMessage, error) {
	if _, no := v.(absent); no {
		return nil, nil
	}
	return json.Marshal(v)
}

// Shown returns a stored spec as readers see it: without its secrets.
func Shown(stored []byte) (json.RawMessage, error) {
	dec := json.NewDecoder(bytes.NewReader(stored))
	dec.UseNumber()
	var doc map[string]any
	if err := dec.Decode(&doc); err != nil {
		return nil, fmt.Errorf("decode stored spec: %w", err)
	}
	delete(doc, "schema")
	hide(doc)
	return json.Marshal(doc)
}

func hide(v any) {
	switch v := v.(type) {
	case map[string]any:
		for name, x := range v {
			if Secret(name) {
				delete(v, name)
				continue
			}
			hide(x)
		}
	case []any:
		for _, x := range v {
			hide(x)
		}
	}
}
