// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/hypervisor/argv"
)

// cpuID is the device of a CPU that was plugged in while the VM ran.
func cpuID(n int) string { return fmt.Sprintf("cpu%d", n) }

// cpuPlace is one place for a CPU (QAPI HotpluggableCPU).
type cpuPlace struct {
	Type  string         `json:"type"`
	Props map[string]int `json:"props"`
	Path  string         `json:"qom-path"`
}

// byPlace is the order in which CPUs are numbered.
func byPlace(a, b cpuPlace) int {
	for _, key := range []string{"socket-id", "die-id", "core-id", "thread-id"} {
		if d := cmp.Compare(a.Props[key], b.Props[key]); d != 0 {
			return d
		}
	}
	return 0
}

// cpus plugs CPUs in. Taking one away is asked of a guest under KVM only: under
// TCG, QEMU 7.2 dies of it. Only what was plugged in since the start can go; the
// rest waits for the next start.
func (l *live) cpus(ctx context.Context) error {
	if !l.full && l.hw.CPUs == l.want.CPUs || l.hw.Boot.MaxCPUs <= 1 {
		return nil
	}
	var places []cpuPlace
	if err := l.s.in.execute(ctx, "query-hotpluggable-cpus", nil, &places); err != nil {
		return err
	}
	slices.SortFunc(places, byPlace)
	taken := func(p cpuPlace) bool { return p.Path != "" }
	free := slices.IndexFunc(places, func(p cpuPlace) bool { return !taken(p) })
	if free < 0 {
		free = len(places)
	}
	for n := free; n < len(places) && n < l.want.CPUs && !taken(places[n]); n++ {
		args := map[string]any{"driver": places[n].Type, "id": cpuID(n)}
		for k, v := range places[n].Props {
			args[k] = v
		}
		if err := l.s.in.execute(ctx, "device_add", args, nil); err != nil {
			return err
		}
		l.s.h.log.Info("CPU plugged in", "vm", l.s.vm.Meta.ID, "cpus", n+1)
		free = n + 1
	}
	if free > l.want.CPUs && l.s.in.accel == string(api.AccelKVM) && l.have[cpuID(free-1)] {
		gone, err := l.release(ctx, cpuID(free-1), fmt.Sprintf("CPU %d", free-1))
		if err != nil {
			return err
		}
		if gone {
			free--
			l.s.lookAgain(lookSoon)
		}
	}
	l.hw.CPUs = free
	return nil
}

// memory asks the guest to use more or less of the virtio-mem device. It takes
// and gives back as it can, so what it has is asked for again until it is so.
func (l *live) memory(ctx context.Context) error {
	b := l.hw.Boot
	if !l.full && !l.s.in.growing && l.hw.Memory == l.want.Memory || b.MaxMemory <= b.Memory {
		return nil
	}
	aim := min(max(l.want.Memory, b.Memory), b.MaxMemory)
	hot := argv.HotMemory(b, aim)
	requested, err := l.memorySize(ctx, "requested-size")
	if err != nil {
		return err
	}
	if requested != hot {
		if err := l.s.in.execute(ctx, "qom-set", map[string]any{"path": peripheral(argv.MemoryID), "property": "requested-size", "value": int64(hot)}, nil); err != nil {
			return err
		}
		l.s.in.memorySince = l.s.now
		l.s.h.log.Info("the guest is asked for another size of memory", "vm", l.s.vm.Meta.ID, "memory", b.Memory+hot)
	}
	if l.s.in.memorySince.IsZero() { // asked by an earlier daemon
		l.s.in.memorySince = l.s.now
	}
	plugged, err := l.memorySize(ctx, "size")
	if err != nil {
		return err
	}
	if plugged == hot {
		// The whole wish is there; what is below a block is nobody's.
		l.hw.Memory = b.Memory + hot
		if aim-l.hw.Memory < api.MemoryBlock {
			l.hw.Memory = aim
		}
		return nil
	}
	l.hw.Memory = b.Memory + max(plugged, hot)
	if l.hw.Memory == l.want.Memory { // not yet: the next look shall not take it for done
		l.growing = true
	}
	what := fmt.Sprintf("the guest to take %s of memory, it has %s", aim, b.Memory+plugged)
	if plugged > hot {
		what = fmt.Sprintf("the guest to give memory back: it has %s and shall have %s", b.Memory+plugged, aim)
	}
	what = l.s.in.saidOfMemory(aim, what, l.s.now)
	l.waits = append(l.waits, what)
	l.s.lookAgain(UnplugInterval)
	if l.s.now.Sub(l.s.in.memorySince) >= UnplugTimeout {
		l.slow = what
	}
	return nil
}

// saidOfMemory is what is said of memory that is on its way. What the guest has is
// its own to change, once a second; each word of it would be a write to the database,
// so a new one is said every UnplugInterval at most.
func (in *instance) saidOfMemory(aim api.Size, text string, now time.Time) string {
	if old := in.memorySaid; old.aim != aim || now.Sub(old.at) >= UnplugInterval {
		in.memorySaid = memorySaid{aim, text, now}
	}
	return in.memorySaid.text
}

// memorySaid is the last word, about which wish and when.
type memorySaid struct {
	aim  api.Size
	text string
	at   time.Time
}

func peripheral(id string) string { return "/machine/peripheral/" + id }

func (l *live) memorySize(ctx context.Context, property string) (api.Size, error) {
	var n int64
	err := l.s.in.execute(ctx, "qom-get", map[string]any{"path": peripheral(argv.MemoryID), "property": property}, &n)
	return api.Size(n), err
}

// limitDisk sets what a disk may do in a second (QAPI BlockIOThrottle). QEMU
// starts without limits, so a look that trusts nothing sets them again.
func (l *live) limitDisk(ctx context.Context, slot int, want api.VMDisk) error {
	at := slices.IndexFunc(l.hw.Disks, func(d api.VMDisk) bool { return d.Slot == slot })
	if at < 0 || l.hw.Disks[at].Limit == want.Limit && (!l.full || want.Limit == api.DiskLimit{}) {
		return nil
	}
	args := want.Limit.Throttle()
	path := peripheral(argv.DiskID(slot))
	if want.BusOf() == api.BusVirtio {
		path += "/virtio-backend"
	}
	out := map[string]any{"id": path}
	maps.Copy(out, args)
	if err := l.s.in.execute(ctx, "block_set_io_throttle", out, nil); err != nil {
		return err
	}
	l.hw.Disks[at].Limit = want.Limit
	return nil
}
