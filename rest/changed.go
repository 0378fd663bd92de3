// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
)

// maxChanged is how many bytes of names the event of a change has.
const maxChanged = 500

// changedFields names the fields of labels and spec that differ, for the audit
// trail. Values are left out: some are secrets.
func changedFields[S, T any](old, now *api.Object[S, T]) string {
	var names []string
	compareFields("meta.labels", old.Meta.Labels, now.Meta.Labels, &names)
	compareFields("spec", old.Spec, now.Spec, &names)
	slices.Sort(names)
	size := 0
	for i, name := range names {
		if size += len(name) + len(", "); size > maxChanged {
			names = append(names[:i], "and more")
			break
		}
	}
	return strings.Join(names, ", ")
}

func compareFields(path string, old, now any, names *[]string) {
	a, okA := document(old)
	b, okB := document(now)
	if !okA || !okB {
		if !reflect.DeepEqual(old, now) {
			*names = append(*names, path)
		}
		return
	}
	keys := map[string]bool{}
	for k := range a {
		keys[k] = true
	}
	for k := range b {
		keys[k] = true
	}
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		if k == "sealedSecret" || k == "sealedPassword" { // follows from secret
			continue
		}
		compareFields(path+"."+k, a[k], b[k], names)
	}
}

// document is a value as a JSON object; ok is false if it is something else.
// Nothing is an object without fields.
func document(v any) (fields map[string]any, ok bool) {
	if v == nil {
		return nil, true
	}
	if m, isMap := v.(map[string]any); isMap {
		return m, true
	}
	switch reflect.Indirect(reflect.ValueOf(v)).Kind() {
	case reflect.Struct, reflect.Map:
	default:
		return nil, false
	}
	b, err := json.Marshal(v)
	if err != nil {
		return nil, false
	}
	return fields, json.Unmarshal(b, &fields) == nil
}
