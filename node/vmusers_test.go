// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestVMUsersAreParsed(t *testing.T) {
	for s, want := range map[string][2]int{DefaultVMUsers: {70000, 70999}, "off": {0, 0}, "200000-265535": {200000, 265535}} {
		if first, last, err := parseUsers(s); err != nil || first != want[0] || last != want[1] {
			t.Errorf("%s: %d, %d, %v", s, first, last, err)
		}
	}
	for _, bad := range []string{"", "70000", "a-b", "0-10", "999-5000", "70000-70000", "70010-70000", "70000-4294967295", "-1-5", "70000-70999-5"} {
		if _, _, err := parseUsers(bad); err == nil || !strings.Contains(err.Error(), "vmUsers") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestRangeMustBeMapped(t *testing.T) {
	const whole, rootless = "         0          0 4294967295\n", "0 1000 1\n1 100000 65536\n"
	for _, tt := range []struct {
		idMap       string
		first, last int
		want        bool
	}{
		{whole, 70000, 70999, true}, {rootless, 70000, 70999, false}, {rootless, 1000, 2000, true},
		{rootless, 65000, 66000, false}, {"", 1, 2, false}, {"x", 1, 2, false},
	} {
		if got := mapped(tt.idMap, tt.first, tt.last); got != tt.want {
			t.Errorf("%+v: %v", tt, got)
		}
	}
}

func TestIDsOfTheHostAreNotGivenToVMs(t *testing.T) {
	dir := t.TempDir()
	passwd, group := filepath.Join(dir, "passwd"), filepath.Join(dir, "group")
	for path, text := range map[string]string{
		passwd: "root:x:0:0:root:/root:/bin/bash\nalice:x:70005:100::/home/alice:/bin/sh\nbroken\n",
		group:  "staff:x:70006:alice\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got := takenIDs(passwd, group, filepath.Join(dir, "none"))
	if len(got) != 3 || !got[0] || !got[70005] || !got[70006] {
		t.Fatalf("%v", got)
	}
}

func TestUsersOfThisHost(t *testing.T) {
	c := Config{VMUsers: DefaultVMUsers}
	if u := c.users(); u.Group != 70000 || u.First != 70001 || u.Last != 70999 || u.Problem != "" {
		t.Errorf("%+v", u)
	}
	c.VMUsers = "off"
	if u := c.users(); u.Last != 0 || !strings.Contains(u.Problem, "off") {
		t.Errorf("%+v", u)
	}
	if caps, err := effectiveCaps("/proc/self/status"); err != nil || caps&(1<<capSetuid) == 0 {
		t.Errorf("%x, %v", caps, err)
	}
}
