// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"bufio"
	"bytes"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/hypervisor/accel"
)

// The conditions of a node that this module reports.
const (
	// ConditionHypervisor is not OK when QEMU cannot be used or the chosen
	// accelerator cannot work.
	ConditionHypervisor = "Hypervisor"
	// ConditionIsolation is not OK when QEMU runs as a user that can do more than
	// it needs.
	ConditionIsolation = "Isolation"
	// ConditionStrangers is not OK when QEMUs run that no VM object explains.
	ConditionStrangers = "Strangers"
)

// Facts are what this module knows of its host, for the node's status.
type Facts struct {
	// Known: QEMU and the accelerator have been found out since the daemon began.
	Known bool
	// Accelerator is empty until it has been found out.
	Accelerator       api.Accelerator
	AcceleratorReason string
	// QEMUVersion is empty when QEMU cannot be used; see Conditions.
	QEMUVersion string
	CPUs        int
	Memory      api.Size
	Conditions  []api.Condition
}

// Facts returns what is known now. Conditions carry no time; set it with
// api.SetCondition.
func (h *Hypervisor) Facts() Facts {
	r, known := h.facts.result()
	f := Facts{Known: known, CPUs: runtime.NumCPU(), Memory: hostMemory()}
	c := api.Condition{Type: ConditionHypervisor, OK: true, Reason: "Usable"}
	switch {
	case !known:
		f.AcceleratorReason = "being found out"
		c.OK, c.Reason, c.Message = false, "Detecting", "QEMU and the accelerator are being found out"
	case r.Problem != "":
		c.OK, c.Reason, c.Message = false, r.ProblemReason, r.Problem
	}
	if known {
		f.Accelerator, f.AcceleratorReason, f.QEMUVersion = r.Accelerator, r.Reason, r.Version
	}
	f.Conditions = []api.Condition{c, h.strangersCondition(), h.isolationCondition()}
	return f
}

func (h *Hypervisor) strangersCondition() api.Condition {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.strangers) == 0 {
		return api.Condition{Type: ConditionStrangers, OK: true, Reason: "None"}
	}
	var list []string
	for _, id := range slices.Sorted(maps.Keys(h.strangers)) {
		list = append(list, fmt.Sprintf("%s (pid %d)", id, h.strangers[id].PID))
	}
	return api.Condition{
		Type: ConditionStrangers, Reason: "UnknownQEMU",
		Message: fmt.Sprintf("%d QEMU processes run here that belong to no VM of this cluster: %s; they are left alone, end them by hand if they are not needed", len(list), strings.Join(list, ", ")),
	}
}

// hostMemory is MemTotal of /proc/meminfo, 0 if that cannot be read.
func hostMemory() api.Size {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	return parseMemTotal(b)
}

func parseMemTotal(b []byte) api.Size { return parseMem(b, "MemTotal:") }

func parseMem(b []byte, key string) api.Size {
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) >= 2 && f[0] == key {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil || kib < 0 {
				return 0
			}
			return api.Size(kib) * api.KiB
		}
	}
	return 0
}

// factFinder keeps the answer about QEMU for one wish.
type factFinder struct {
	mu          sync.Mutex
	busy, known bool
	want        api.Accelerator
	r           accel.Result
}

// begin claims the search; false means known for this wish, or under way.
func (f *factFinder) begin(want api.Accelerator) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.busy || f.known && f.want == want {
		return false
	}
	f.busy = true
	return true
}

func (f *factFinder) set(want api.Accelerator, r accel.Result) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.busy, f.known, f.want, f.r = false, true, want, r
}

// invalidate makes the next begin search again; the answer stays meanwhile.
func (f *factFinder) invalidate() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.want = ""
}

func (f *factFinder) get() accel.Result {
	r, _ := f.result()
	return r
}

func (f *factFinder) result() (accel.Result, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.r, f.known
}

// forWish returns the answer for what is wished, if it is known.
func (f *factFinder) forWish(want api.Accelerator) (accel.Result, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.r, f.known && f.want == want
}
