// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/muster-vm/muster/api"
)

// inspected is what a file in tmp/ turned out to be.
type inspected struct {
	path        string // the file to keep, a converted one if need be
	format      string // qcow2 or raw
	virtualSize int64
}

// inspect decides whether a file may become an image, and converts foreign
// formats to a second file beside it (path + ".qcow2"), which the caller
// removes with the first. Nothing the file says is trusted: see header.go.
func (s *Service) inspect(ctx context.Context, lp *localPool, path string) (inspected, error) {
	out, err := s.inspectAs(ctx, lp, path, "")
	if err != nil || !convertible[out.format] {
		return out, err
	}
	converted := path + ".qcow2"
	err = s.tool(ctx, lp, convertDeadline, func(ctx context.Context) error { return s.img.convert(ctx, path, out.format, converted) })
	if err != nil {
		return out, unreadable(lp, err)
	}
	return s.inspectAs(ctx, lp, converted, formatQcow2)
}

// inspectAs looks at one file; want is the format it must have, if known.
func (s *Service) inspectAs(ctx context.Context, lp *localPool, path, want string) (inspected, error) {
	said, err := call(ctx, lp.work, callDeadline, func() (string, error) {
		f, err := os.Open(path)
		if err != nil {
			return "", err
		}
		defer f.Close()
		return checkHeader(f)
	})
	if err != nil {
		return inspected{}, diskError(lp, "read the image's header", err)
	}
	info, err := call(ctx, lp.work, infoDeadline+callDeadline, func() (*imageInfo, error) {
		return s.img.info(ctx, path, want)
	})
	if err != nil {
		return inspected{}, unreadable(lp, err)
	}
	if err := judge(info, said, want); err != nil {
		return inspected{}, err
	}
	if info.Format == formatQcow2 {
		if err := s.checkTables(ctx, lp, path, info); err != nil {
			return inspected{}, err
		}
	}
	return inspected{path: path, format: info.Format, virtualSize: info.VirtualSize}, nil
}

// judge applies the rules to what qemu-img found.
func judge(info *imageInfo, said, want string) error {
	known := info.Format == formatQcow2 || info.Format == formatRaw || convertible[info.Format]
	switch {
	case !known:
		return refuse("its format %s is not supported; convert it to qcow2 first", clip(info.Format))
	case said != "" && info.Format != said, said == "" && (info.Format == formatQcow2 || info.Format == formatVMDK):
		return refuse("its header and qemu-img disagree about its format (%s)", clip(info.Format))
	case want != "" && info.Format != want:
		return refuse("its format is %s where %s was expected", clip(info.Format), want)
	case info.Backing != "" || info.FullBacking != "":
		return refuse("it has a backing file; flatten it first with: qemu-img convert -O qcow2 OLD NEW")
	case info.Encrypted:
		return refuse("it is encrypted; decrypt it first with: qemu-img convert")
	case len(info.Snapshots) > 0:
		return refuse("it has internal snapshots; drop them first with: qemu-img convert -O qcow2 OLD NEW")
	case info.VirtualSize <= 0:
		return refuse("its virtual size is 0")
	case info.VirtualSize > maxVirtualSize:
		return refuse("its virtual size of %d bytes is over the limit of %s", info.VirtualSize, api.Size(maxVirtualSize))
	}
	if d := info.Specific; d != nil {
		switch {
		case d.Data.DataFile != "":
			return refuse("it keeps its data in another file (data-file)")
		case d.Data.Corrupt:
			return refuse("it is marked corrupt; repair it first with: qemu-img check -r all")
		case len(d.Data.Encrypt) > 0:
			return refuse("it is encrypted; decrypt it first with: qemu-img convert")
		case len(d.Data.Extents) > 1:
			return refuse("it is a VMDK of %d files; convert the whole disk to qcow2 first", len(d.Data.Extents))
		}
	}
	return nil
}

// checkTables refuses a qcow2 that is damaged or ends early. The end is known
// to one cluster only, since the last one need not be written out.
func (s *Service) checkTables(ctx context.Context, lp *localPool, path string, info *imageInfo) error {
	r, err := call(ctx, lp.work, checkFileTime+callDeadline, func() (checkResult, error) {
		return s.img.check(ctx, path)
	})
	if err != nil {
		return unreadable(lp, err)
	}
	if r.Corruptions > 0 || r.Errors > 0 {
		return refuse("its tables are damaged (qemu-img check finds %d corruptions and %d errors); fetch it again or repair it", r.Corruptions, r.Errors)
	}
	size, err := call(ctx, lp.work, callDeadline, func() (int64, error) {
		st, err := os.Stat(path)
		if err != nil {
			return 0, err
		}
		return st.Size(), nil
	})
	if err != nil {
		return diskError(lp, "look at the image", err)
	}
	if r.EndOffset-size >= max(info.ClusterSize, 1) {
		return refuse("it is truncated: its tables reach to byte %d, the file has %d; fetch it again", r.EndOffset, size)
	}
	return nil
}

// unreadable turns qemu-img's word about a file into the user's error.
func unreadable(lp *localPool, err error) error {
	var exit *exitError
	if err = diskError(lp, "examine the image", err); errors.As(err, &exit) {
		return refuse("qemu-img cannot read it: %s", exit.text)
	}
	return err
}

// tool runs qemu-img in the pool's lane: a process that waits for a hung file
// system cannot be killed, so we must be able to walk away from it. The
// deadline is the program's own plus time to die. When the context ends it is killed and
// has toolDeath to be gone: by then somebody else may get the volume.
func (s *Service) tool(ctx context.Context, lp *localPool, deadline time.Duration, f func(context.Context) error) error {
	run, giveUp := context.WithCancel(context.WithoutCancel(ctx))
	defer giveUp()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(toolDeath, giveUp) })()
	err := lp.work.do(run, deadline+callDeadline, func() error { return f(ctx) })
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// toolDeath is how long a program that was killed may take to be gone.
const toolDeath = 2 * time.Second
