// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"fmt"
	"slices"
	"testing"

	"github.com/muster-vm/muster/api"
)

// The files of a stopped VM are still those of its user. A daemon that began anew did
// not know that, and neither did another node of a shared pool: they gave the number
// to the next VM that asked for it, whose QEMU could then open those files.
func TestUserOfAStoppedVMIsNotGivenToAnother(t *testing.T) {
	tab := newUserTable(testUsers)
	ids := []string{api.NewID()}
	for len(ids) < 3 { // all of them ask for the same
		if id := api.NewID(); tab.choice(id, 0) == tab.choice(ids[0], 0) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	seen := map[int]string{}
	for _, id := range ids { // each alone, on a node or in a life that knows no other
		fresh := newUserTable(testUsers)
		uid, err := fresh.assign(id, nil, fresh.places(slices.Values(ids)))
		must(t, err)
		if by, taken := seen[uid]; taken {
			t.Errorf("%s got user %d, whose files are those of %s", id, uid, by)
		}
		seen[uid] = id
	}
	// A later VM changes nothing for those that are there.
	later := append(slices.Clone(ids), api.NewID())
	for _, id := range ids {
		if a, b := tab.places(slices.Values(ids))[id], tab.places(slices.Values(later))[id]; a != b {
			t.Errorf("%s had user %d and has %d", id, a, b)
		}
	}
}

// With more VMs than users, those that run have one each.
func TestMoreVMsThanUsers(t *testing.T) {
	tab := newUserTable(testUsers)
	var ids []string
	for i := range 500 {
		ids = append(ids, fmt.Sprintf("0198f0c2-%04d", i))
	}
	size := testUsers.Last - testUsers.First + 1
	seen := map[int]bool{}
	for _, id := range ids[300 : 300+size] {
		uid, err := tab.assign(id, nil, tab.places(slices.Values(ids)))
		must(t, err)
		if seen[uid] {
			t.Fatalf("user %d twice", uid)
		}
		seen[uid] = true
	}
	if _, err := tab.assign("one more", nil, nil); err == nil {
		t.Error("there was one more")
	}
}
