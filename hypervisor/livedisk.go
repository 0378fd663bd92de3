// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/argv"
	"github.com/muster-vm/muster/hypervisor/qmp"
	"github.com/muster-vm/muster/internal/rbdname"
)

// disks brings the disks closer to the wish, slot by slot: first what is to go,
// then what is to come.
func (l *live) disks(ctx context.Context) error {
	var errs []error
	for slot := 1; slot <= api.MaxDisks; slot++ {
		if err := l.try(l.disk(ctx, slot)); err != nil {
			errs = append(errs, err)
			break
		}
	}
	return errors.Join(errs...)
}

func (l *live) disk(ctx context.Context, slot int) error {
	have, known := l.hw.DiskIn(slot)
	want, wanted := l.want.DiskIn(slot)
	there := l.have[argv.DiskID(slot)]
	switch {
	case known && there && wanted && have.Volume == want.Volume:
		l.takenBack(argv.DiskID(slot), diskName(slot, have.Volume))
		if err := l.growDisk(ctx, slot, want); err != nil {
			return err
		}
		return l.limitDisk(ctx, slot, want)
	case slot > l.hw.Boot.DiskPorts, known && !have.Hotpluggable() || wanted && !want.Hotpluggable():
		return nil // it has a fixed place, or none: at the next start
	case known:
		return l.removeDisk(ctx, slot, have.Volume)
	case there && wanted:
		same, err := l.isDisk(ctx, slot, want)
		if err != nil {
			return err
		}
		if same { // plugged in by a daemon that did not live to write it down
			l.hw.Disks = append(l.hw.Disks, want)
			return l.limitDisk(ctx, slot, want)
		}
		return l.removeDisk(ctx, slot, "")
	case there:
		return l.removeDisk(ctx, slot, "")
	case wanted:
		return l.addDisk(ctx, slot, want)
	}
	return nil
}

func diskName(slot int, volume string) string {
	if volume == "" {
		return fmt.Sprintf("the disk in slot %d", slot)
	}
	return fmt.Sprintf("disk %s (slot %d)", volume, slot)
}

// isDisk reports whether the disk that QEMU has in a slot is a volume.
func (l *live) isDisk(ctx context.Context, slot int, d api.VMDisk) (bool, error) {
	path, _, err := l.s.h.cfg.Volumes.Resolve(l.s.v, l.s.vm.Meta.Project, d.Volume)
	if err != nil {
		return false, nil //nolint:nilerr // what has no file is not in QEMU
	}
	if err := l.blockNodes(ctx); err != nil {
		return false, err
	}
	return rbdname.Same(l.nodes[argv.FileNode(slot)], path), nil
}

// removeDisk takes a disk out: the guest lets go, then its block nodes go, and
// only then is the volume somebody else's business.
func (l *live) removeDisk(ctx context.Context, slot int, volume string) error {
	l.leaving = l.leaving || volume == ""
	gone, err := l.release(ctx, argv.DiskID(slot), diskName(slot, volume))
	if err != nil || !gone {
		return err
	}
	if err := l.dropDisk(ctx, slot); err != nil {
		return err
	}
	l.s.h.log.Info("disk unplugged", "vm", l.s.vm.Meta.ID, "slot", slot, "volume", volume)
	l.hw.Disks = slices.DeleteFunc(l.hw.Disks, func(d api.VMDisk) bool { return d.Slot == slot })
	l.s.lookAgain(lookSoon) // the slot may be wished for
	return nil
}

// dropDisk removes the block nodes of a slot that has no device.
func (l *live) dropDisk(ctx context.Context, slot int) error {
	return l.dropNodes(ctx, argv.DiskNode(slot), argv.FileNode(slot))
}

// dropNodes removes block nodes that nothing uses, as far as they are there.
func (l *live) dropNodes(ctx context.Context, nodes ...string) error {
	if err := l.blockNodes(ctx); err != nil {
		return err
	}
	for _, node := range nodes {
		if _, ok := l.nodes[node]; !ok {
			continue
		}
		if err := l.s.in.execute(ctx, "blockdev-del", map[string]any{"node-name": node}, nil); err != nil {
			return err
		}
		delete(l.nodes, node)
	}
	return nil
}

// addDisk plugs a disk in. What QEMU refuses leaves nothing behind.
func (l *live) addDisk(ctx context.Context, slot int, d api.VMDisk) error {
	if i := slices.IndexFunc(l.hw.Disks, func(o api.VMDisk) bool { return o.Volume == d.Volume }); i >= 0 {
		l.waits = append(l.waits, fmt.Sprintf("volume %s to leave slot %d", d.Volume, l.hw.Disks[i].Slot))
		return nil
	}
	path, format, err := l.s.h.cfg.Volumes.Resolve(l.s.v, l.s.vm.Meta.Project, d.Volume)
	if err == nil {
		err = l.s.grantVolume(ctx, d.Volume)
	}
	if err != nil {
		l.waits = append(l.waits, fmt.Sprintf("volume %s: %v", d.Volume, err))
		l.s.lookAgain(waitLook)
		return nil
	}
	if err := l.dropDisk(ctx, slot); err != nil { // of an attempt that was cut off
		return err
	}
	if err := l.addKey(ctx, path); err != nil {
		return err
	}
	disk := argv.Disk{Slot: slot, Path: path, Format: format, Options: d}
	err = l.s.in.execute(ctx, "blockdev-add", disk.FileOptions().Object(), nil)
	if err == nil {
		l.nodes[argv.FileNode(slot)] = path
		err = l.s.in.execute(ctx, "blockdev-add", disk.DiskOptions().Object(), nil)
	}
	if err == nil {
		l.nodes[argv.DiskNode(slot)] = path
		err = l.s.in.execute(ctx, "device_add", disk.HotOptions(l.hw.Boot).Object(), nil)
	}
	var refused *qmp.CommandError
	if errors.As(err, &refused) {
		if undo := l.dropDisk(ctx, slot); undo != nil {
			return errors.Join(err, undo)
		}
		return &qmp.CommandError{Command: refused.Command, Class: refused.Class, Desc: fmt.Sprintf("%s: %s", diskName(slot, d.Volume), refused.Desc)}
	}
	if err != nil {
		return err
	}
	l.s.h.log.Info("disk plugged in", "vm", l.s.vm.Meta.ID, "slot", slot, "volume", d.Volume)
	l.hw.Disks = append(l.hw.Disks, d)
	return l.limitDisk(ctx, slot, d)
}

// toGrow is the size that a volume is to get, 0 if it has it.
func (s *step) toGrow(volume string) api.Size {
	vol, err := configdb.Volumes.Find(s.v, s.vm.Meta.Project, volume)
	if err != nil || vol.Status.Phase != api.StorageReady || vol.Spec.Size <= vol.Status.Size {
		return 0
	}
	return vol.Spec.Size
}

// grows reports whether a disk is to be enlarged that QEMU was not told of yet.
func (l *live) grows() bool {
	return slices.ContainsFunc(l.hw.Disks, func(d api.VMDisk) bool {
		size := l.s.toGrow(d.Volume)
		return size > 0 && l.s.in.grown[d.Volume] != size
	})
}

// growDisk enlarges a disk (QAPI block_resize), which the guest sees at once.
// QEMU itself refuses to make one smaller than what is there.
func (l *live) growDisk(ctx context.Context, slot int, d api.VMDisk) error {
	size := l.s.toGrow(d.Volume)
	if size == 0 || l.s.in.grown[d.Volume] == size {
		return nil
	}
	err := l.s.in.execute(ctx, "block_resize", map[string]any{"node-name": argv.DiskNode(slot), "size": int64(size)}, nil)
	if err != nil {
		return err
	}
	if l.s.in.grown == nil {
		l.s.in.grown = map[string]api.Size{}
	}
	l.s.in.grown[d.Volume] = size
	l.s.h.log.Info("disk enlarged", "vm", l.s.vm.Meta.ID, "slot", slot, "volume", d.Volume, "size", size)
	return nil
}
