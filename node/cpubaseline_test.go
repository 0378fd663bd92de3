// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// tellCPU writes a node's facts, or removes them.
func (m *member) tellCPU(t *testing.T, name string, features []string, models ...string) {
	t.Helper()
	m.commit(t, func(v *configdb.View, tx *configdb.Txn) error {
		n, err := configdb.Nodes.Find(v, "", name)
		if err != nil {
			return err
		}
		st := api.NodeFactsStatus{Node: name, GuestFeatures: features}
		for _, model := range models {
			st.CPUModels = append(st.CPUModels, api.CPUModelFacts{Name: model, Features: len(model)})
		}
		f, err := configdb.NodeFacts.Get(v, n.Meta.ID)
		switch {
		case err == nil && features == nil:
			configdb.NodeFacts.DeleteUnnamed(tx, &f)
			return nil
		case err == nil:
			f.Status = st
			return configdb.NodeFacts.UpdateStatus(v, tx, &f)
		}
		f = api.NodeFacts{Meta: api.NewMeta(api.KindNodeFacts, "", name), Spec: api.NodeFactsSpec{NodeID: n.Meta.ID}, Status: st}
		f.Meta.ID = n.Meta.ID
		return configdb.NodeFacts.CreateUnnamed(tx, &f)
	})
}

func TestTheCPUBaselineFollowsTheNodes(t *testing.T) {
	m, _ := leveled(t)
	baseline := func() (api.CPUBaseline, error) {
		t.Helper()
		if err := m.writeCPUBaseline(t.Context(), m.store.Term()); err != nil {
			t.Fatal(err)
		}
		return configdb.CPUBaselines.Get(m.store.Local(), m.info.ClusterID)
	}
	if b, err := baseline(); api.CodeOf(err) != api.CodeNotFound {
		t.Fatalf("a baseline before anybody has told his CPU: %+v, %v", b, err)
	}
	m.tellCPU(t, "m1", []string{"aes", "avx2"}, "Haswell-v1", "qemu64-v1")
	if b, err := baseline(); err != nil || b.Spec.QEMU() != "Haswell-v1,+aes,+avx2,enforce=on" || b.Meta.Generation != 1 {
		t.Fatalf("%+v, %v", b, err)
	}
	rev := m.store.Local().Revision()
	if _, err := baseline(); err != nil || m.store.Local().Revision() != rev {
		t.Errorf("written again though nothing changed: %v", err)
	}
	m.tellCPU(t, "m2", []string{"aes"}, "qemu64-v1")
	b, err := baseline()
	if err != nil || b.Spec.QEMU() != "qemu64-v1,+aes,enforce=on" || b.Meta.Generation != 2 || len(b.Spec.Nodes) != 2 {
		t.Fatalf("one with less came: %+v, %v", b, err)
	}
	// Nothing runs on both: what there is stays, and VMs with it are not placed there.
	m.tellCPU(t, "m2", []string{"aes"}, "athlon-v1")
	if now, err := baseline(); err != nil || now.Meta.Generation != 2 {
		t.Errorf("%+v, %v", now, err)
	}
	m.tellCPU(t, "m2", nil)
	if b, err := baseline(); err != nil || b.Spec.Model != "Haswell-v1" || b.Meta.Generation != 3 {
		t.Errorf("the one with less went: %+v, %v", b, err)
	}
	m.tellCPU(t, "m3", []string{"aes"}, "qemu64-v1")
	if err := m.writeCPUBaseline(t.Context(), m.store.Term()-1); err == nil {
		t.Error("a deposed leader's baseline was written")
	}
}
