// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
)

func TestDecodeStrict(t *testing.T) {
	for name, c := range map[string]struct{ body, field, says string }{
		"unknown at the top":    {`{"mata":{}}`, "mata", "not a known field"},
		"unknown in spec":       {`{"spec":{"cores":1}}`, "cores", "not a known field"},
		"unknown and huge":      {`{"` + strings.Repeat("x", 1<<16) + `":1}`, strings.Repeat("x", 80) + "…", "not a known field"},
		"wrong type":            {`{"spec":{"cpus":"two"}}`, "spec.cpus", "string"},
		"wrong type in a list":  {`{"spec":{"disks":[{"volume":7}]}}`, "spec.disks.volume", "number"},
		"fraction for a number": {`{"spec":{"cpus":1.5}}`, "spec.cpus", "1.5"},
		"over 64 bits":          {`{"spec":{"cpus":99999999999999999999}}`, "spec.cpus", "number"},
		"negative unsigned":     {`{"spec":{"reboots":-1}}`, "spec.reboots", "number"},
		"list for an object":    {`{"spec":[]}`, "spec", "array"},
		"a list":                {`[]`, "", "array"},
		"a word":                {`"x"`, "", "string"},
		"wrong size":            {`{"spec":{"memory":"12Q"}}`, "", "12Q"},
		"wrong time":            {`{"meta":{"createdAt":"yesterday"}}`, "", "yesterday"},
		"empty":                 {``, "", "empty"},
		"blank":                 {" \n", "", "empty"},
		"truncated":             {`{"spec":{"cpus":1`, "", "ends in the middle"},
		"no JSON":               {`cpus: 1`, "", "not valid JSON at byte 1"},
		"data after it":         {`{} {}`, "", "after the first"},
		"garbage after it":      {`{} x`, "", "after the first"},
		"brace after it":        {`{}}`, "", "after the first"},
		"too deep":              {strings.Repeat(`{"spec":`, 20000), "", "max depth"},
	} {
		t.Run(name, func(t *testing.T) {
			var vm VM
			err := DecodeStrict(strings.NewReader(c.body), &vm)
			refused(t, err, c.field)
			if err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("%q does not say %q", err, c.says)
			}
		})
	}
	var vm VM
	if err := DecodeStrict(strings.NewReader(` {"meta":{"name":"a"},"spec":{"cpus":2,"memory":"1G"}}`+"\n\n"), &vm); err != nil {
		t.Fatal(err)
	}
	if vm.Meta.Name != "a" || vm.Spec.CPUs != 2 || vm.Spec.Memory != GiB {
		t.Errorf("decoded %+v", vm)
	}
}

// A body that cannot be read is not the fault of its JSON.
func TestDecodeStrictPassesReadErrorsOn(t *testing.T) {
	broken := errors.New("body over its limit")
	for name, start := range map[string]string{"in the value": `{"spec":`, "after the value": `{} `} {
		var vm VM
		err := DecodeStrict(io.MultiReader(strings.NewReader(start), iotest.ErrReader(broken)), &vm)
		if !errors.Is(err, broken) || CodeOf(err) == CodeInvalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzDecodeStrict(f *testing.F) {
	f.Add([]byte(`{"meta":{"name":"a","labels":{"a":"b"}},"spec":{"disks":[{"size":"1G"}]}}`))
	f.Add([]byte(`{"spec":{"memory":1e9}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var vm VM
		if DecodeStrict(bytes.NewReader(b), &vm) != nil || vm.Prepare() != nil {
			return
		}
		// What was accepted survives the store.
		enc, err := vm.EncodeSpec()
		if err != nil {
			t.Fatal(err)
		}
		var back VM
		if _, err := back.Decode(enc, nil); err != nil {
			t.Fatal(err)
		}
		again, err := back.EncodeSpec()
		if err != nil || !bytes.Equal(enc, again) {
			t.Fatalf("unstable encoding:\n%s\n%s", enc, again)
		}
	})
}

func TestIDs(t *testing.T) {
	const many = 10_000
	seen := map[string]bool{}
	for range many {
		id := NewID()
		if !IsID(id) || id[14] != '7' || !strings.ContainsRune("89ab", rune(id[19])) || seen[id] {
			t.Fatalf("%s is not a fresh UUIDv7", id)
		}
		seen[id] = true
	}
	for _, bad := range []string{
		"", "a", strings.ToUpper(NewID()), NewID() + "0", NewID()[1:], strings.ReplaceAll(NewID(), "-", "0"),
		"{" + NewID()[2:] + "}", "0193c0de-0000-7000-8000-00000000000g", "0193c0de_0000-7000-8000-000000000000", strings.Repeat("-", 36),
	} {
		if IsID(bad) {
			t.Errorf("%q is taken for an ID", bad)
		}
	}
}

func TestIDsSortByTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ids []string
		for range 1000 {
			ids = append(ids, NewID())
			time.Sleep(time.Millisecond)
		}
		if !slices.IsSorted(ids) {
			t.Error("IDs of later milliseconds sort before earlier ones")
		}
		// 2000-01-01, where the fake clock begins.
		if !strings.HasPrefix(ids[0], fmt.Sprintf("%012x", time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC).UnixMilli())[:8]) {
			t.Errorf("%s does not begin with the milliseconds", ids[0])
		}
	})
}

func TestSetCondition(t *testing.T) {
	t0 := time.Date(2026, 1, 1, 12, 0, 0, 0, time.FixedZone("x", 7200))
	var list []Condition
	list = SetCondition(list, Condition{Type: "Ready", OK: true, Reason: "Up", Since: t0.Add(time.Hour)}, t0)
	if c, ok := FindCondition(list, "Ready"); !ok || !c.Since.Equal(t0) || c.Since.Location() != time.UTC {
		t.Fatalf("new condition %+v", c)
	}
	before := slices.Clone(list)
	same := SetCondition(list, Condition{Type: "Ready", OK: true, Reason: "Up", Message: "new words"}, t0.Add(time.Minute))
	if c, _ := FindCondition(same, "Ready"); !c.Since.Equal(t0) || c.Message != "new words" {
		t.Errorf("unchanged condition %+v", c)
	}
	if !slices.Equal(list, before) {
		t.Error("the list given was changed")
	}
	for name, c := range map[string]Condition{"ok": {Type: "Ready", Reason: "Up"}, "reason": {Type: "Ready", OK: true, Reason: "Down"}} {
		out := SetCondition(list, c, t0.Add(time.Minute))
		if got, _ := FindCondition(out, "Ready"); !got.Since.Equal(t0.Add(time.Minute)) || len(out) != 1 {
			t.Errorf("changed %s: %+v", name, out)
		}
	}
	two := SetCondition(list, Condition{Type: "Protected"}, t0)
	if len(two) != 2 || len(list) != 1 {
		t.Errorf("second type: %+v", two)
	}
	if _, ok := FindCondition(two, "Other"); ok {
		t.Error("found a condition that is not there")
	}
}

func TestErrors(t *testing.T) {
	cause := errors.New("disk full")
	err := fmt.Errorf("upload: %w", Errorf(CodeStorageFull, "write image %q: %w", "a", cause))
	if !errors.Is(err, cause) || CodeOf(err) != CodeStorageFull {
		t.Errorf("chain of %v lost", err)
	}
	if want := `upload: write image "a": disk full`; err.Error() != want {
		t.Errorf("%q, want %q", err, want)
	}
	if got := (&Error{Detail: "read", Field: "spec.x", Err: cause}).Error(); got != "spec.x: read: disk full" {
		t.Errorf("%q", got)
	}
	if CodeOf(cause) != CodeInternal || CodeOf(nil) != CodeInternal {
		t.Error("an error without a code is internal")
	}
	inner := Errorf(CodeRefused, "outer: %w", Errorf(CodeNotFound, "inner"))
	if CodeOf(inner) != CodeRefused || inner.Error() != "outer: inner" {
		t.Errorf("code of the outer error: %s %q", CodeOf(inner), inner)
	}
}

func TestMetaHelpers(t *testing.T) {
	m := NewMeta(KindVM, "", "a")
	if m.Project != DefaultProject || m.Generation != 1 || !IsID(m.ID) || m.CreatedAt.Location() != time.UTC {
		t.Errorf("new meta %+v", m)
	}
	if m.Deleting() || m.HasFinalizer("x") {
		t.Errorf("a new object is being deleted: %+v", m)
	}
	if got := KindPool.Plural(); got != "pools" {
		t.Errorf("plural %q", got)
	}
}

func TestCloneSharesNothing(t *testing.T) {
	vm := goldenObjects().vm
	c := vm.Clone()
	before, _ := vm.EncodeSpec()
	c.Meta.Labels["tier"] = "changed"
	c.Meta.Finalizers[0] = "changed"
	*c.Meta.DeletingAt = time.Time{}
	c.Spec.Disks[0].Volume = "changed"
	c.Status.Conditions[0].Reason = "changed"
	*c.Status.StartedAt = time.Time{}
	if after, _ := vm.EncodeSpec(); !bytes.Equal(before, after) {
		t.Error("a change of the clone changed the original")
	}
	if vm.Status.Conditions[0].Reason == "changed" || vm.Status.StartedAt.IsZero() {
		t.Error("a change of the clone changed the original's status")
	}
}
