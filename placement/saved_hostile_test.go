// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package placement

import (
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/configdb/storetest"
)

// A suspended VM was bound to any node with room; one that cannot load its memory said
// so only when the VM was to go on, and the VM was suspended again.
func TestASuspendedVMGoesWhereItsMemoryCanBeLoaded(t *testing.T) {
	for name, c := range map[string]struct {
		saved api.SavedMachine
		other func(*api.NodeFactsStatus)
		why   string // "" fits
	}{
		"the same":            {saved: api.SavedMachine{Type: "pc-q35-7.2", CPU: "host", Accelerator: api.AccelKVM, QEMUVersion: "7.2.22"}},
		"a newer QEMU":        {saved: api.SavedMachine{Type: "pc-q35-7.2", QEMUVersion: "7.2.22"}, other: func(f *api.NodeFactsStatus) { f.QEMUVersion = "10.0.2" }},
		"another patch level": {saved: api.SavedMachine{QEMUVersion: "7.2.22"}, other: func(f *api.NodeFactsStatus) { f.QEMUVersion = "7.2.1" }},
		"an older QEMU": {
			api.SavedMachine{Type: "pc-q35-7.2", QEMUVersion: "10.0.2"}, func(f *api.NodeFactsStatus) { f.QEMUVersion = "7.2.22" }, "of QEMU 10.0.2, it has the older 7.2.22",
		},
		"another accelerator": {
			api.SavedMachine{Accelerator: api.AccelKVM}, func(f *api.NodeFactsStatus) { f.Accelerator = api.AccelTCG }, "a guest with kvm, it has tcg",
		},
		"no such machine":        {saved: api.SavedMachine{Type: "pc-q35-8.2"}, why: "of the machine pc-q35-8.2, which its QEMU does not have"},
		"less of a CPU":          {saved: api.SavedMachine{CPU: "Haswell-v1,enforce=on"}, why: "lacks avx2, pcid"},
		"no such CPU":            {saved: api.SavedMachine{CPU: "Quantum-v1"}, why: `does not know the CPU model "Quantum-v1"`},
		"less than the baseline": {saved: api.SavedMachine{CPU: "Westmere-v1,+aes,+avx512f,-x2apic,enforce=on"}, why: "lacks avx512f, which"},
		"less than its host": {
			api.SavedMachine{CPU: "host,migratable=on"}, func(f *api.NodeFactsStatus) { f.GuestFeatures = []string{"sse2"} }, "lacks aes, which",
		},
		"another vendor": {
			api.SavedMachine{CPU: "host"}, func(f *api.NodeFactsStatus) { f.CPU.Vendor = "AuthenticAMD" }, "is of AuthenticAMD, that of the saved memory of GenuineIntel",
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := &world{t, storetest.New(t)}
			m1, m2 := w.node("m1", 16*api.GiB, nil), w.node("m2", 16*api.GiB, nil)
			w.pool("local", api.PoolShared, m1, m2)
			base := func(f *api.NodeFactsStatus) {
				f.QEMUVersion, f.Accelerator, f.CPU.Vendor = "7.2.22", api.AccelKVM, "GenuineIntel"
			}
			w.facts(m1, base)
			w.facts(m2, func(f *api.NodeFactsStatus) {
				base(f)
				if c.other != nil {
					c.other(f)
				}
			})
			vm := newVM("web1", api.GiB)
			w.bound(vm, m1)
			st := api.SavedState{Meta: api.NewMeta(api.KindSavedState, "", "web1"), Spec: api.SavedStateSpec{Machine: &c.saved}}
			st.Meta.ID = vm.Meta.ID
			w.do(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.SavedStates.CreateUnnamed(tx, &st) })
			_, err := Choose(w.db.Local(), Request{VM: vm, Only: "m2"})
			if c.why == "" && err != nil || c.why != "" && (api.CodeOf(err) != api.CodeUnplaceable || !strings.Contains(err.Error(), c.why)) {
				t.Errorf("%v; want %q", err, c.why)
			}
			w.do(func(v *configdb.View, tx *configdb.Txn) error { // its memory is thrown away
				st, err := configdb.SavedStates.Get(v, vm.Meta.ID)
				if err != nil {
					return err
				}
				st.Spec.Discard = true
				return configdb.SavedStates.UpdateSpec(v, tx, &st)
			})
			if _, err := Choose(w.db.Local(), Request{VM: vm, Only: "m2"}); err != nil {
				t.Error(err)
			}
		})
	}
}
