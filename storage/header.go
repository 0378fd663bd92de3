// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"regexp"
	"strconv"
	"strings"

	"github.com/muster-vm/muster/api"
)

// The headers are read here before qemu-img sees a file, because opening is
// already too late: a qcow2 with an external data file, or a VMDK whose
// descriptor names extents, makes it open the other file.
//
// Sources: QEMU docs/interop/qcow2.txt; VMware Virtual Disk Format 5.0.

const (
	headBytes = 64 << 10
	// maxDescriptor is the longest VMDK descriptor that is not refused; QEMU
	// reads descriptorSectors of it, however long it is.
	maxDescriptor     = 1 << 20
	descriptorSectors = 20
	sector            = 512

	qcow2Magic       = "QFI\xfb"
	qcow2BitDirty    = 1 << 0
	qcow2BitCorrupt  = 1 << 1
	qcow2BitDataFile = 1 << 2
	qcow2ExtEnd      = 0
	qcow2ExtDataFile = 0x44415441
	qcow2ExtBacking  = 0xe2792aca
	qcow2ExtCrypto   = 0x0537be77
)

// header formats beside qcow2 and raw that are converted.
const (
	formatQcow2 = "qcow2"
	formatRaw   = "raw"
	formatVMDK  = "vmdk"
)

// convertible are the single-file formats that qemu-img converts to qcow2.
var convertible = map[string]bool{formatVMDK: true, "vdi": true, "vhdx": true, "vpc": true}

func refuse(format string, args ...any) error {
	return api.Errorf(api.CodeInvalid, "the image is refused: "+format, args...)
}

// checkHeader refuses files that name other files. It returns the format that
// the file must turn out to have, or "" if its header says nothing.
func checkHeader(r io.ReaderAt) (string, error) {
	head := make([]byte, headBytes)
	n, err := r.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	head = head[:n]
	switch {
	case n == 0:
		return "", refuse("it is empty")
	case bytes.HasPrefix(head, []byte(qcow2Magic)):
		return formatQcow2, checkQcow2Header(head)
	case bytes.HasPrefix(head, []byte("KDMV")):
		return formatVMDK, checkVMDK(r, head)
	case bytes.HasPrefix(head, []byte("COWD")):
		return "", refuse("it is a VMDK of the old ESX kind; convert it to qcow2 first")
	case looksLikeDescriptor(head):
		return "", refuse("it is a VMDK descriptor, which names other files; convert the disk to qcow2 or to a monolithicSparse VMDK first")
	}
	return "", nil
}

func checkQcow2Header(h []byte) error {
	if len(h) < 72 {
		return refuse("it is a truncated qcow2 file")
	}
	be := binary.BigEndian
	version := be.Uint32(h[4:])
	if version != 2 && version != 3 {
		return refuse("it is a qcow file of version %d; convert it to qcow2 first", version)
	}
	switch size := be.Uint64(h[24:]); {
	case be.Uint64(h[8:]) != 0 || be.Uint32(h[16:]) != 0:
		return refuse("it has a backing file; flatten it first with: qemu-img convert -O qcow2 OLD NEW")
	case size == 0:
		return refuse("its virtual size is 0")
	case size > uint64(maxVirtualSize):
		return refuse("its virtual size of %d bytes is over the limit of %s", size, api.Size(maxVirtualSize))
	case be.Uint32(h[32:]) != 0:
		return refuse("it is encrypted; decrypt it first with: qemu-img convert")
	case be.Uint32(h[60:]) != 0:
		return refuse("it has internal snapshots; drop them first with: qemu-img convert -O qcow2 OLD NEW")
	}
	extensions := 72
	if version == 3 {
		if len(h) < 104 {
			return refuse("it is a truncated qcow2 file")
		}
		features := be.Uint64(h[72:])
		switch {
		case features&qcow2BitDataFile != 0:
			return refuse("it keeps its data in another file (data-file); flatten it first with: qemu-img convert -O qcow2 OLD NEW")
		case features&qcow2BitCorrupt != 0:
			return refuse("it is marked corrupt; repair it first with: qemu-img check -r all")
		}
		extensions = int(min(be.Uint32(h[100:]), headBytes))
	}
	return checkQcow2Extensions(h, extensions)
}

// maxBackingName is the longest name of a backing file (docs/interop/qcow2.txt).
const maxBackingName = 1023

// backingOf returns the backing file that the header of a volume names. One that
// names another file beside it, or is no qcow2 at all, is refused.
func backingOf(r io.ReaderAt) (string, error) {
	head := make([]byte, headBytes)
	n, err := r.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	h, be := head[:n], binary.BigEndian
	bad := func(format string, args ...any) error { return api.Errorf(api.CodeRefused, format, args...) }
	if len(h) < 104 || !bytes.HasPrefix(h, []byte(qcow2Magic)) || be.Uint32(h[4:]) != 3 {
		return "", bad("it is no qcow2 of version 3")
	}
	if be.Uint64(h[72:])&qcow2BitDataFile != 0 {
		return "", bad("it keeps its data in another file")
	}
	if be.Uint32(h[32:]) != 0 {
		return "", bad("it is encrypted")
	}
	offset, size := be.Uint64(h[8:]), be.Uint32(h[16:])
	if offset == 0 {
		return "", nil
	}
	if size > maxBackingName || offset > 1<<32 {
		return "", bad("the name of its backing file is too long, or out of place")
	}
	name := make([]byte, size)
	if _, err := r.ReadAt(name, int64(offset)); err != nil {
		return "", bad("the name of its backing file is out of place")
	}
	return string(name), nil
}

// qcow2SizeAt is where a qcow2 header has the virtual size, in bytes.
const qcow2SizeAt = 24

// sizeIn returns the virtual size that the header of a volume says. It has been
// looked at by backingOf.
func sizeIn(r io.ReaderAt) (int64, error) {
	var b [8]byte
	if _, err := r.ReadAt(b[:], qcow2SizeAt); err != nil {
		return 0, err
	}
	size := binary.BigEndian.Uint64(b[:])
	if size > uint64(maxVirtualSize) {
		return 0, api.Errorf(api.CodeRefused, "its virtual size of %d bytes is over the limit of %s", size, api.Size(maxVirtualSize))
	}
	return int64(size), nil
}

func checkQcow2Extensions(h []byte, at int) error {
	for at+8 <= len(h) {
		kind, length := binary.BigEndian.Uint32(h[at:]), int64(binary.BigEndian.Uint32(h[at+4:]))
		switch kind {
		case qcow2ExtEnd:
			return nil
		case qcow2ExtDataFile:
			return refuse("it keeps its data in another file (data-file)")
		case qcow2ExtBacking:
			return refuse("it names the format of a backing file")
		case qcow2ExtCrypto:
			return refuse("it is encrypted")
		}
		next := int64(at) + 8 + (length+7)&^7
		if next > headBytes {
			break // QEMU refuses extensions beyond the first cluster itself
		}
		at = int(next)
	}
	return nil
}

// looksLikeDescriptor says what QEMU's own detection of a text VMDK says, and
// somewhat more: comments and blank lines, then "version=".
func looksLikeDescriptor(head []byte) bool {
	for line := range bytes.Lines(head) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 {
			continue
		}
		if line[0] != '#' {
			return bytes.HasPrefix(bytes.ToLower(line), []byte("version"))
		}
		if bytes.Contains(line, []byte("Disk DescriptorFile")) {
			return true
		}
	}
	return false
}

// checkVMDK accepts a sparse VMDK whose embedded descriptor names one extent,
// which QEMU then takes to be the file itself, and no parent.
func checkVMDK(r io.ReaderAt, h []byte) error {
	if len(h) < sector {
		return refuse("it is a truncated VMDK file")
	}
	le := binary.LittleEndian
	capacity, offset, size := le.Uint64(h[12:]), le.Uint64(h[28:]), le.Uint64(h[36:])
	switch {
	case capacity == 0:
		// QEMU would follow the embedded descriptor to other files.
		return refuse("it is a VMDK without content of its own")
	case capacity > uint64(maxVirtualSize)/sector:
		return refuse("its virtual size is over the limit of %s", api.Size(maxVirtualSize))
	case offset == 0 || size == 0:
		return refuse("it is one part of a VMDK that was split into several files; convert the whole disk to qcow2 first")
	case size > maxDescriptor/sector || offset > 1<<32:
		return refuse("its VMDK descriptor is absurdly large")
	}
	desc := make([]byte, max(size, descriptorSectors)*sector)
	n, err := r.ReadAt(desc, int64(offset*sector))
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return checkDescriptor(desc[:n])
}

var extentLine = regexp.MustCompile(`(?i)^(RW|RDONLY|NOACCESS)\s+(\d+)\s+(\S+)\s+"([^"]*)"`)

func checkDescriptor(desc []byte) error {
	if bytes.Contains(desc, []byte("parentFileNameHint")) {
		return refuse("it is a VMDK with a parent disk; flatten it first")
	}
	desc, _, _ = bytes.Cut(desc, []byte{0})
	extents := 0
	for line := range strings.Lines(string(desc)) {
		line = strings.TrimSpace(line)
		if key, value, ok := strings.Cut(line, "="); ok {
			value = strings.Trim(strings.TrimSpace(value), `"`)
			switch strings.ToLower(strings.TrimSpace(key)) {
			case "createtype":
				if value != "monolithicSparse" && value != "streamOptimized" {
					return refuse("it is a VMDK of type %s; only monolithicSparse and streamOptimized are one file; convert it to qcow2 first", strconv.Quote(clip(value)))
				}
			case "parentcid":
				if !strings.EqualFold(value, "ffffffff") {
					return refuse("it is a VMDK with a parent disk; flatten it first")
				}
			}
		}
		m := extentLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		extents++
		if !strings.EqualFold(m[3], "SPARSE") || strings.Contains(m[4], "/") {
			return refuse("its VMDK descriptor names another file, %s", strconv.Quote(clip(m[4])))
		}
	}
	if extents != 1 {
		return refuse("its VMDK descriptor names %d extents instead of one; convert the whole disk to qcow2 first", extents)
	}
	return nil
}

func clip(s string) string {
	const most = 80
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}
