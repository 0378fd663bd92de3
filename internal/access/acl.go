// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package access

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

type unixStat = syscall.Stat_t

// POSIX access control lists as the kernel stores them (linux/posix_acl_xattr.h):
// a version, then entries of tag, permissions and id, in the order of tags and ids.
const (
	aclName    = "system.posix_acl_access"
	aclVersion = 2
	aclHeader  = 4
	aclEntry   = 8
	// maxACL bounds what is read of one list.
	maxACL = 64 << 10

	tagUserObj, tagUser, tagGroupObj, tagGroup, tagMask, tagOther = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20

	permSearch = 1
	anyID      = 1<<32 - 1
)

type entry struct {
	tag, perm uint16
	id        uint32
}

type acl []entry

// readACL returns the list of a directory; one that has none has what its mode
// says.
func readACL(dir string, mode fs.FileMode) (acl, error) {
	buf := make([]byte, maxACL)
	n, err := unix.Getxattr(dir, aclName, buf)
	if errors.Is(err, unix.ENODATA) {
		return acl{
			{tagUserObj, uint16(mode>>6) & 7, anyID}, {tagGroupObj, uint16(mode>>3) & 7, anyID}, {tagOther, uint16(mode) & 7, anyID},
		}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read its access control list: %w", err)
	}
	return decodeACL(buf[:n])
}

func decodeACL(b []byte) (acl, error) {
	if len(b) < aclHeader || (len(b)-aclHeader)%aclEntry != 0 || binary.LittleEndian.Uint32(b) != aclVersion {
		return nil, errors.New("its access control list has an unknown form")
	}
	var out acl
	for b = b[aclHeader:]; len(b) > 0; b = b[aclEntry:] {
		out = append(out, entry{binary.LittleEndian.Uint16(b), binary.LittleEndian.Uint16(b[2:]), binary.LittleEndian.Uint32(b[4:])})
	}
	return out, nil
}

func (a acl) encode() []byte {
	b := binary.LittleEndian.AppendUint32(nil, aclVersion)
	for _, e := range a {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}

// withSearch adds the right to search for a group; has: it was there.
func (a acl) withSearch(gid uint32) (out acl, has bool, err error) {
	out = slices.Clone(a)
	find := func(tag uint16, id uint32) int {
		return slices.IndexFunc(out, func(e entry) bool { return e.tag == tag && (tag != tagGroup || e.id == id) })
	}
	mask, mine := find(tagMask, 0), find(tagGroup, gid)
	if mask >= 0 && mine >= 0 && out[mask].perm&out[mine].perm&permSearch != 0 {
		return out, true, nil
	}
	if mask >= 0 && out[mask].perm&permSearch == 0 {
		// The mask holds back others as well; opening it would give it to them.
		for _, e := range out {
			if (e.tag == tagUser || e.tag == tagGroup && e.id != gid || e.tag == tagGroupObj) && e.perm&permSearch != 0 {
				return nil, false, errors.New("the mask of its access control list forbids it")
			}
		}
		out[mask].perm |= permSearch
	}
	if mask < 0 {
		// The owner's group keeps what it has: the mask must not be narrower.
		out = append(out, entry{tagMask, out[find(tagGroupObj, 0)].perm | permSearch, anyID})
	}
	if mine >= 0 {
		out[find(tagGroup, gid)].perm |= permSearch
	} else {
		out = append(out, entry{tagGroup, permSearch, gid})
	}
	slices.SortStableFunc(out, func(x, y entry) int { return cmp.Or(cmp.Compare(x.tag, y.tag), cmp.Compare(x.id, y.id)) })
	return out, false, nil
}
