// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/muster-vm/muster/hypervisor/argv"
	"github.com/muster-vm/muster/hypervisor/qmp"
	"github.com/muster-vm/muster/internal/rbdname"
)

// tray is what QEMU says of a CD-ROM drive (QAPI BlockInfo).
type tray struct {
	QDev     string `json:"qdev"`
	Open     bool   `json:"tray_open"`
	Inserted *struct {
		Node string `json:"node-name"`
	} `json:"inserted"`
}

// askedTray is a request to the guest to open a tray that it has locked.
type askedTray struct{ since, asked time.Time }

// refusedMedium is one that QEMU did not take.
type refusedMedium struct {
	image string
	at    time.Time
	err   *qmp.CommandError
}

// drives changes what is in the CD-ROM drives. The drives themselves are those of
// the start: if the wish has fewer of them, or another kind in a place, that waits
// for the next one.
func (l *live) drives(ctx context.Context) error {
	if len(l.want.CDROMs) < len(l.hw.CDROMs) {
		return nil
	}
	for n := range l.hw.CDROMs {
		if l.want.CDROMs[n].Bus != l.hw.CDROMs[n].Bus {
			continue
		}
		if err := l.try(l.drive(ctx, n)); err != nil {
			return err
		}
	}
	return nil
}

func driveName(n int) string { return fmt.Sprintf("drive cdrom%d", n) }

// drive brings one drive closer to the wish. What it holds is known by the file
// that QEMU has open, whatever the status says: a daemon may have died between
// the command and the status.
func (l *live) drive(ctx context.Context, n int) error {
	have, want := l.hw.CDROMs[n].Image, l.want.CDROMs[n].Image
	t, err := l.tray(ctx, n)
	if err != nil {
		return err
	}
	holds := ""
	if t.Inserted != nil {
		holds = l.nodes[argv.CDROMFileNode(n)]
	}
	path, format := "", ""
	if want != "" {
		path, format, err = l.s.h.cfg.Volumes.ResolveImage(l.s.v, l.s.vm.Meta.Project, want)
		if err != nil {
			return l.noImage(n, holds, err)
		}
	}
	if rbdname.Same(holds, path) {
		return l.settleDrive(ctx, n, t, have != want)
	}
	if t.Inserted != nil {
		open, err := l.openTray(ctx, n, t)
		if err != nil || !open {
			l.leaving = l.leaving || !l.isImage(have, holds)
			return err
		}
		if err := l.s.in.execute(ctx, "blockdev-remove-medium", map[string]any{"id": argv.CDROMID(n)}, nil); err != nil {
			return err
		}
		l.s.h.log.Info("medium taken out", "vm", l.s.vm.Meta.ID, "drive", n, "image", have)
	}
	l.hw.CDROMs[n].Image = ""
	if err := l.dropNodes(ctx, argv.CDROMNode(n), argv.CDROMFileNode(n)); err != nil {
		return err
	}
	if want == "" {
		return l.closeTray(ctx, n)
	}
	return l.insert(ctx, n, argv.CDROM{Path: path, Format: format})
}

// tray asks QEMU what a drive holds.
func (l *live) tray(ctx context.Context, n int) (tray, error) {
	if err := l.blockNodes(ctx); err != nil {
		return tray{}, err
	}
	var list []tray
	if err := l.s.in.execute(ctx, "query-block", nil, &list); err != nil {
		return tray{}, err
	}
	for _, t := range list {
		if t.QDev == argv.CDROMID(n) || strings.HasSuffix(t.QDev, "/"+argv.CDROMID(n)) {
			return t, nil
		}
	}
	return tray{}, &qmp.CommandError{Command: "query-block", Class: "DeviceNotFound", Desc: fmt.Sprintf("QEMU does not have %s", driveName(n))}
}

// noImage waits for an image that has no file now. What a drive holds of it stays.
func (l *live) noImage(n int, holds string, why error) error {
	have, want := l.hw.CDROMs[n].Image, l.want.CDROMs[n].Image
	if have == want && holds != "" {
		return nil
	}
	l.leaving = l.leaving || l.full && holds != "" && !l.isImage(have, holds)
	l.waits = append(l.waits, fmt.Sprintf("image %s: %v", want, why))
	l.s.lookAgain(waitLook)
	return nil
}

// isImage reports whether a file is an image's.
func (l *live) isImage(name, file string) bool {
	path, _, err := l.s.h.cfg.Volumes.ResolveImage(l.s.v, l.s.vm.Meta.Project, name)
	return name != "" && err == nil && rbdname.Same(file, path)
}

// settleDrive ends a change of a drive that holds what is wished for. A tray that
// the guest opened by itself stays open; one that it was asked to open does not.
func (l *live) settleDrive(ctx context.Context, n int, t tray, changed bool) error {
	_, asked := l.s.in.trays[n]
	if t.Open && (changed || asked) {
		if err := l.closeTray(ctx, n); err != nil {
			return err
		}
	}
	delete(l.s.in.trays, n)
	l.hw.CDROMs[n].Image = l.want.CDROMs[n].Image
	return nil
}

// openTray opens a tray, and reports whether it is open. A guest that has locked
// it is asked, again and again, unless the wish says that it is not.
func (l *live) openTray(ctx context.Context, n int, t tray) (open bool, err error) {
	in := l.s.in
	if t.Open {
		delete(in.trays, n)
		return true, nil
	}
	a := in.trays[n]
	if a == nil {
		a = &askedTray{since: l.s.now}
		if in.trays == nil {
			in.trays = map[int]*askedTray{}
		}
		in.trays[n] = a
	}
	force := n < len(l.s.vm.Spec.CDROMs) && l.s.vm.Spec.CDROMs[n].Force
	if force || l.s.now.Sub(a.asked) >= UnplugInterval {
		if err := in.execute(ctx, "blockdev-open-tray", map[string]any{"id": argv.CDROMID(n), "force": force}, nil); err != nil {
			return false, err
		}
		a.asked = l.s.now
		if t, err = l.tray(ctx, n); err != nil {
			return false, err
		}
		if t.Open {
			delete(in.trays, n)
			return true, nil
		}
	}
	l.s.lookAgain(UnplugInterval - l.s.now.Sub(a.asked))
	if l.s.now.Sub(a.since) >= UnplugTimeout {
		l.locked = append(l.locked, driveName(n))
	} else {
		l.s.lookAgain(UnplugTimeout - l.s.now.Sub(a.since))
	}
	l.waits = append(l.waits, "the guest to open the tray of "+driveName(n)+", which it has locked")
	return false, nil
}

func (l *live) closeTray(ctx context.Context, n int) error {
	return l.s.in.execute(ctx, "blockdev-close-tray", map[string]any{"id": argv.CDROMID(n)}, nil)
}

// insert puts an image into an empty drive. What QEMU refuses leaves nothing
// behind.
func (l *live) insert(ctx context.Context, n int, c argv.CDROM) error {
	want, in := l.want.CDROMs[n].Image, l.s.in
	// Each attempt moves the tray, which QEMU tells, so that somebody looks again at once.
	if r, ok := in.refusedMedia[n]; ok && r.image == want && l.s.now.Sub(r.at) < HotplugRetry {
		l.s.lookAgain(HotplugRetry - l.s.now.Sub(r.at))
		return r.err
	}
	delete(in.refusedMedia, n)
	if err := l.s.grantImage(ctx, want); err != nil {
		l.waits = append(l.waits, fmt.Sprintf("image %s: %v", want, err))
		l.s.lookAgain(waitLook)
		return nil
	}
	t, err := l.tray(ctx, n)
	if err != nil {
		return err
	}
	if open, err := l.openTray(ctx, n, t); err != nil || !open {
		return err
	}
	if err := l.addKey(ctx, c.Path); err != nil {
		return err
	}
	err = l.s.in.execute(ctx, "blockdev-add", c.FileOptions(n).Object(), nil)
	if err == nil {
		l.nodes[argv.CDROMFileNode(n)] = c.Path
		err = l.s.in.execute(ctx, "blockdev-add", c.MediumOptions(n).Object(), nil)
	}
	if err == nil {
		l.nodes[argv.CDROMNode(n)] = c.Path
		err = l.s.in.execute(ctx, "blockdev-insert-medium", map[string]any{"id": argv.CDROMID(n), "node-name": argv.CDROMNode(n)}, nil)
	}
	var refused *qmp.CommandError
	if errors.As(err, &refused) {
		if undo := errors.Join(l.dropNodes(ctx, argv.CDROMNode(n), argv.CDROMFileNode(n)), l.closeTray(ctx, n)); undo != nil {
			return errors.Join(err, undo)
		}
		told := &qmp.CommandError{Command: refused.Command, Class: refused.Class, Desc: fmt.Sprintf("image %s in %s: %s", want, driveName(n), refused.Desc)}
		if in.refusedMedia == nil {
			in.refusedMedia = map[int]refusedMedium{}
		}
		in.refusedMedia[n] = refusedMedium{want, l.s.now, told}
		return told
	}
	if err != nil {
		return err
	}
	if err := l.closeTray(ctx, n); err != nil {
		return err
	}
	l.s.h.log.Info("medium inserted", "vm", l.s.vm.Meta.ID, "drive", n, "image", want)
	l.hw.CDROMs[n].Image = want
	return nil
}
