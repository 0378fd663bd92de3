// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"fmt"
	"maps"
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
	// Who is not measured in time on a busy machine is by one of the next calls.
	measured := func(all map[string]Measured) {
		t.Helper()
		var got map[string]Measured
		var took time.Duration
		e.until("they are measured", func() bool {
			began := time.Now()
			got = e.h.Measure(t.Context())
			took = time.Since(began)
			return maps.Equal(got, all) && took < MeasureDeadline+2*time.Second
		}, func() string { return fmt.Sprintf("measured %+v in %s", got, took) })
	}
	measured(map[string]Measured{good: want, stuck: want})
	qemu.Hang(true)
	measured(map[string]Measured{good: want})
}
