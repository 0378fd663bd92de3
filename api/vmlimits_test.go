// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"reflect"
	"strings"
	"testing"
)

func TestLimitsAreChecked(t *testing.T) {
	for _, good := range []*VMLimits{
		nil, {}, {CPUWeight: 1, IOWeight: 10000, CPUMax: 51200, CPUSet: "0", MemoryMax: 640 * MiB},
	} {
		if err := good.validate(512 * MiB); err != nil {
			t.Errorf("%+v: %v", good, err)
		}
	}
	for field, bad := range map[string]VMLimits{
		"spec.limits.cpuWeight": {CPUWeight: 10001}, "spec.limits.ioWeight": {IOWeight: -1}, "spec.limits.cpuMax": {CPUMax: 51201},
		"spec.limits.memoryMax": {MemoryMax: 639 * MiB}, "spec.limits.cpuSet": {CPUSet: "3-1"},
	} {
		err := bad.validate(512 * MiB)
		if e, ok := err.(*Error); !ok || e.Field != field || e.Code != CodeInvalid {
			t.Errorf("%s: %v", field, err)
		}
	}
	s := VMSpec{Memory: 512 * MiB, CPUs: 1, Limits: &VMLimits{CPUMax: -1}}
	s.SetDefaults()
	if err := s.Validate(); err == nil || !strings.Contains(err.Error(), "percent of one CPU") {
		t.Error(err)
	}
}

func TestCPUList(t *testing.T) {
	for text, want := range map[string][]int{"": nil, "0": {0}, "0-2,8": {0, 1, 2, 8}, "3,1,2-3": {1, 2, 3}} {
		if got, err := CPUList(text); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for _, bad := range []string{",", "a", "1-", "-1", "2-1", "01", "0-8192", "1,,2", " 1", "1\n", strings.Repeat("1,", 600) + "1"} {
		if got, err := CPUList(bad); err == nil {
			t.Errorf("%q: %v", bad, got)
		}
	}
}
