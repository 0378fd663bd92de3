// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

func TestEveryQEMUIsMeasuredAndOneThatHangsHoldsUpNoOther(t *testing.T) {
	e := newEnv(t, false)
	stuck, _ := e.running(api.VMSpec{})
	qemu := e.fakes.qemu()
	good, _ := e.runningNamed("web2", api.VMSpec{})
	want := Measured{Balloon: 96 << 20, DiskRead: 1005, DiskWritten: 27}
	if got := e.h.Measure(t.Context()); len(got) != 2 || got[good] != want || got[stuck] != want {
		t.Fatalf("measured %+v", got)
	}
	qemu.Hang(true)
	began := time.Now()
	got := e.h.Measure(t.Context())
	if took := time.Since(began); len(got) != 1 || got[good] != want || took > MeasureDeadline+2*time.Second {
		t.Fatalf("measured %+v in %s", got, took)
	}
}
