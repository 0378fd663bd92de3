// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/argv"
	"github.com/muster-vm/muster/hypervisor/memory"
	"github.com/muster-vm/muster/hypervisor/qmp"
)

// Times of the memory controller.
const (
	// BalanceInterval is the pause between two looks at the memory of the VMs.
	BalanceInterval = 5 * time.Second
	// freshFor is how long after its start a guest does not use much yet.
	freshFor = 2 * BalanceInterval
	// SilentAfter is how long a guest may say nothing before nobody counts on
	// memory that it might give back.
	SilentAfter = 90 * time.Second
)

// balloon is what is known of the memory of one running VM. It belongs to the
// controller; the VM's reconciler reads it. Both hold h.mu.
type balloon struct {
	pid     int // of the QEMU that it is about
	polling bool
	since   time.Time // when this QEMU was seen first
	vm      memory.VM
	reason  string
	silent  bool
}

// balance runs the controller until the hypervisor ends.
func (h *Hypervisor) balance(ctx context.Context) {
	t := time.NewTicker(BalanceInterval)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-h.hurry: // a start waits
		case <-ctx.Done():
			return
		}
		h.BalanceNow(ctx)
	}
}

// resident is a VM that runs here, as the controller needs it.
type resident struct {
	in  *instance
	vm  api.VM
	hot api.Size // beyond the balloon's reach
}

// BalanceNow looks at the memory of all VMs of this node once, and changes the
// targets that have to change. It asks no QEMU as long as no VM may be squeezed.
func (h *Hypervisor) BalanceNow(ctx context.Context) {
	v := h.cfg.DB.Local()
	all := h.residents(v)
	var elastic []resident
	for _, r := range all {
		if r.vm.Status.Elastic(&r.vm.Spec) || r.squeezed() {
			elastic = append(elastic, r)
		}
	}
	if len(elastic) == 0 {
		return
	}
	node := h.room(v, all)
	now := h.cfg.Now()
	stall, told := h.cfg.HostPressure()
	h.mu.Lock()
	h.pressure.Note(&node, stall, told, now)
	h.mu.Unlock()
	var vms []memory.VM
	var known []resident
	for _, r := range elastic {
		if r.in.leaves() { // its memory is on its way as it is
			node.Budget -= heldNow(&r.vm)
			continue
		}
		b, err := h.observe(ctx, r, now)
		if err != nil {
			if ctx.Err() == nil {
				h.log.Debug("the memory of a vm is not known", "vm", r.vm.Meta.ID, "err", err)
			}
			node.Budget -= r.vm.Status.Hardware.Memory // it may use all of it
			continue
		}
		vms, known = append(vms, b), append(known, r)
	}
	for _, d := range memory.Decide(node, vms, now) {
		i := slices.IndexFunc(known, func(r resident) bool { return r.vm.Meta.ID == d.ID })
		h.setBalloon(ctx, known[i], d, now)
	}
}

// heldNow is what the guest of a running VM may use.
func heldNow(vm *api.VM) api.Size {
	if m := vm.Status.Memory; m != nil {
		return min(m.Target, vm.Status.Hardware.Memory)
	}
	return vm.Status.Hardware.Memory
}

// squeezed reports that a VM that may not be squeezed any more still is.
func (r *resident) squeezed() bool {
	m := r.vm.Status.Memory
	return m != nil && m.Target < r.vm.Status.Hardware.Memory
}

// residents are the VMs whose QEMU runs here.
func (h *Hypervisor) residents(v *configdb.View) []resident {
	h.mu.Lock()
	ins := make([]*instance, 0, len(h.instances))
	for _, in := range h.instances {
		ins = append(ins, in)
	}
	h.mu.Unlock()
	var out []resident
	for _, in := range ins {
		vm, err := configdb.VMs.Get(v, in.id)
		b, err2 := configdb.Bindings.Get(v, in.id)
		if errors.Join(err, err2) != nil || b.Spec.NodeID != h.cfg.NodeID || vm.Status.Hardware == nil || in.openConn() == nil {
			continue
		}
		r := resident{in: in, vm: vm}
		if hw := vm.Status.Hardware; hw.Boot != nil {
			r.hot = argv.HotMemory(hw.Boot, hw.Memory)
		}
		out = append(out, r)
	}
	return out
}

// room is what the node has for VMs that may be squeezed.
func (h *Hypervisor) room(v *configdb.View, all []resident) memory.Node {
	var node memory.Node
	n, err := configdb.Nodes.Get(v, h.cfg.NodeID)
	if err == nil {
		node.Budget = n.Status.Memory - n.Spec.ReservedMemory
	}
	for _, r := range all {
		node.Budget -= api.OverheadPerVM
		if !r.vm.Status.Elastic(&r.vm.Spec) && !r.squeezed() {
			node.Budget -= r.vm.Status.Hardware.Memory
		}
	}
	h.mu.Lock()
	for _, need := range h.starting {
		node.Budget -= need
	}
	h.mu.Unlock()
	node.Total, node.Available = h.cfg.HostMemory()
	return node
}

// observe asks a balloon, and believes of its answer only what can be true.
func (h *Hypervisor) observe(ctx context.Context, r resident, now time.Time) (memory.VM, error) {
	hw := r.vm.Status.Hardware
	h.mu.Lock()
	b := r.in.balloon
	if b == nil || b.pid != r.vm.Status.PID {
		b = &balloon{pid: r.vm.Status.PID, since: now, vm: memory.VM{ID: r.vm.Meta.ID, Target: hw.Memory}}
		if m := r.vm.Status.Memory; m != nil { // an earlier daemon's
			b.vm.Target, b.reason, b.silent = m.Target, m.Reason, m.Silent
		}
	}
	r.in.balloon = b
	polling := b.polling
	h.mu.Unlock()

	ctx, cancel := context.WithTimeout(ctx, MeasureDeadline)
	defer cancel()
	if !polling {
		err := r.in.execute(ctx, "qom-set", map[string]any{"path": peripheral("balloon0"), "property": "guest-stats-polling-interval", "value": int(BalanceInterval / time.Second)}, nil)
		if err != nil {
			return memory.VM{}, err
		}
	}
	var actual struct {
		Actual int64 `json:"actual"`
	}
	if err := r.in.execute(ctx, "query-balloon", nil, &actual); err != nil {
		return memory.VM{}, err
	}
	var stats guestStats
	if err := r.in.execute(ctx, "qom-get", map[string]any{"path": peripheral("balloon0"), "property": "guest-stats"}, &stats); err != nil {
		return memory.VM{}, err
	}
	vm, changed := h.believe(b, r, &stats, api.Size(actual.Actual), now)
	if changed {
		h.loop.Enqueue(r.vm.Meta.ID)
	}
	return vm, nil
}

// believe takes over what a guest said, and reports whether it fell silent or
// spoke again.
func (h *Hypervisor) believe(b *balloon, r resident, stats *guestStats, actual api.Size, now time.Time) (memory.VM, bool) {
	hw := r.vm.Status.Hardware
	h.mu.Lock()
	defer h.mu.Unlock()
	b.polling = true
	b.vm.Fresh = now.Sub(b.since) < freshFor
	b.vm.Max = hw.Memory
	b.vm.Min = min(max(r.vm.Spec.MemoryMin, r.hot+api.MinMemory), hw.Memory)
	if !r.vm.Status.Elastic(&r.vm.Spec) {
		b.vm.Min = hw.Memory // it gets back what was taken
	}
	b.vm.Actual = min(max(actual+r.hot, 0), hw.Memory)
	if used, at, ok := stats.used(b.vm.Actual, now); ok {
		b.vm.Used, b.vm.StatsAt = used, at
	}
	silent := now.Sub(b.vm.StatsAt) > SilentAfter && now.Sub(b.since) > SilentAfter
	changed := silent != b.silent
	b.silent = silent
	return b.vm, changed
}

// guestStats is what the guest says of itself (virtio 1.2 section 5.5.6.3).
type guestStats struct {
	LastUpdate int64 `json:"last-update"`
	Stats      struct {
		Total     json64 `json:"stat-total-memory"`
		Available json64 `json:"stat-available-memory"`
		Free      json64 `json:"stat-free-memory"`
	} `json:"stats"`
}

// json64 is a number of a guest, which QEMU prints as unsigned: unknown is
// 2^64-1.
type json64 float64

// used is what the guest cannot do without; ok is false if it did not say, or
// what it says cannot be true.
func (g *guestStats) used(actual api.Size, now time.Time) (api.Size, time.Time, bool) {
	at := time.Unix(g.LastUpdate, 0)
	left := g.Stats.Available
	if left < 0 || left >= math.MaxInt64 { // Linux before 4.6
		left = g.Stats.Free
	}
	if g.LastUpdate <= 0 || at.After(now.Add(memory.StatsAge)) || left < 0 || left >= json64(actual) {
		return 0, at, false
	}
	return actual - api.Size(left), at, true
}

// setBalloon tells a guest what it may use.
func (h *Hypervisor) setBalloon(ctx context.Context, r resident, d memory.Decision, now time.Time) {
	ctx, cancel := context.WithTimeout(ctx, MeasureDeadline)
	defer cancel()
	if err := r.in.execute(ctx, "balloon", map[string]any{"value": int64(d.To - r.hot)}, nil); err != nil {
		var refused *qmp.CommandError
		if errors.As(err, &refused) {
			h.log.Warn("QEMU refuses to move the balloon of a vm", "vm", d.ID, "err", err)
		}
		return
	}
	h.log.Info("memory of a vm", "vm", d.ID, "from", d.From, "to", d.To, "why", d.Why)
	h.mu.Lock()
	if b := r.in.balloon; b != nil {
		if d.To < b.vm.Target {
			b.vm.SqueezedAt = now
		} else {
			b.vm.GrownAt = now
		}
		b.vm.Target, b.reason = d.To, d.Why
	}
	h.mu.Unlock()
	h.loop.Enqueue(d.ID)
}

// showMemory writes into the status what was decided. It changes in coarse steps
// only, so that it is no write without need.
func (s *step) showMemory() {
	s.h.mu.Lock()
	defer s.h.mu.Unlock()
	b := s.in.balloon
	if b == nil || b.pid != s.vm.Status.PID {
		return
	}
	if !s.vm.Status.Elastic(&s.vm.Spec) && b.vm.Target >= s.vm.Status.Hardware.Memory {
		s.vm.Status.Memory = nil
		return
	}
	s.vm.Status.Memory = &api.VMMemory{Target: b.vm.Target, Reason: b.reason, Silent: b.silent}
}

// makeRoom reports whether the node has the memory for a start. If it has not,
// but can take it from other VMs, that is begun, and the start waits.
func (s *step) makeRoom() bool {
	h := s.h
	all := h.residents(s.v)
	n, err := configdb.Nodes.Get(s.v, h.cfg.NodeID)
	if err != nil || n.Status.Memory == 0 || !slices.ContainsFunc(all, func(r resident) bool { return r.vm.Status.Elastic(&r.vm.Spec) }) {
		return true // nobody to take it from: placement has decided
	}
	need := s.vm.Spec.Memory
	if s.vm.Status.Elastic(&s.vm.Spec) {
		need = s.vm.Spec.MemoryMin
	}
	if s.b.Spec.NodeID != h.cfg.NodeID { // it arrives with what it has now
		need = heldNow(&s.vm)
	}
	need += api.OverheadPerVM
	held := api.Size(0)
	h.mu.Lock()
	for _, r := range all {
		mine := r.vm.Status.Hardware.Memory
		if b := r.in.balloon; r.vm.Status.Elastic(&r.vm.Spec) && b != nil && b.pid == r.vm.Status.PID {
			mine = min(max(b.vm.Target, b.vm.Actual), mine)
		}
		held += mine + api.OverheadPerVM
	}
	h.starting[s.vm.Meta.ID] = need // until it runs, or is not to start any more
	for _, other := range h.starting {
		held += other
	}
	h.mu.Unlock()
	missing := held - (n.Status.Memory - n.Spec.ReservedMemory)
	if missing <= 0 {
		return true
	}
	select {
	case h.hurry <- struct{}{}:
	default:
	}
	s.wait(api.VMStarting, fmt.Sprintf("waiting: other vms on this node give memory back; %s are still missing (muster node memory %s)", missing, h.cfg.NodeName))
	s.result.After = BalanceInterval / 5
	return false
}

// notStarting takes back the room that was asked for.
func (h *Hypervisor) notStarting(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.starting, id)
}

// hostMeminfo reads what the kernel says; zeros if it says nothing.
func hostMeminfo() (total, available api.Size) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, 0
	}
	return parseMem(b, "MemTotal:"), parseMem(b, "MemAvailable:")
}

// hostPressure is how much of the last ten seconds, in percent, some process of the
// host waited for memory (PSI); ok is false if the kernel does not say.
func hostPressure() (stall float64, ok bool) {
	b, err := os.ReadFile("/proc/pressure/memory")
	if err != nil {
		return 0, false
	}
	return parsePressure(string(b))
}

func parsePressure(text string) (stall float64, ok bool) {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "some" {
			continue
		}
		value, found := strings.CutPrefix(fields[1], "avg10=")
		stall, err := strconv.ParseFloat(value, 64)
		return stall, found && err == nil && stall >= 0 && stall <= 100
	}
	return 0, false
}
