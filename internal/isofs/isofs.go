// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package isofs writes small read-only file systems for CD-ROMs: ISO 9660
// (ECMA-119) with the Joliet extension, which Linux, the BSDs and Windows read
// with names as they were given.
//
// Guarantees: equal input gives equal bytes; there is no clock, no randomness and
// no I/O. What does not fit the format is refused.
//
// Non-guarantees and limits: no Rock Ridge, boot record or attributes; a
// directory's records and a path table fit into one sector each, which is some
// 30 names; all files together have at most MaxBytes. Readers without Joliet see
// the names in upper case and shortened.
package isofs

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"path"
	"slices"
	"strings"
	"unicode/utf16"
)

const (
	sector = 2048
	// MaxBytes of content in one image.
	MaxBytes = 16 << 20
	// maxName is the longest name in Joliet, in UTF-16 units.
	maxName = 64
	// maxLabel is the longest label in Joliet.
	maxLabel = 16
	// The first sectors are the system's; then come the descriptors.
	primaryAt    = 16
	jolietAt     = 17
	terminatorAt = 18
	tablesAt     = 19 // little and big endian, of both trees
	dirsAt       = 23
)

// File is one file. Directories are made as their files need them.
type File struct {
	// Path is relative, with slashes.
	Path string
	Data []byte
}

type node struct {
	name     string // as given; empty for the root
	short    string // among those without Joliet
	data     []byte
	dir      bool
	children []*node
	parent   *node
	number   int    // of a directory in the path tables, from 1
	at       uint32 // sector of the content; of a directory in the primary tree
	joliet   uint32 // sector of a directory in the Joliet tree
}

// Image returns the bytes of a file system.
func Image(label string, files []File) ([]byte, error) {
	if label == "" || len(utf16.Encode([]rune(label))) > maxLabel || strings.ContainsFunc(label, func(r rune) bool { return r < ' ' || r > '~' }) {
		return nil, fmt.Errorf("label %q of a CD-ROM is not 1 to %d printable characters", label, maxLabel)
	}
	root := &node{dir: true}
	root.parent = root
	total := 0
	for _, f := range files {
		if total += len(f.Data); total > MaxBytes {
			return nil, fmt.Errorf("the files of a CD-ROM have more than %d bytes", MaxBytes)
		}
		if err := root.add(f); err != nil {
			return nil, err
		}
	}
	dirs := number(root)
	next := uint32(dirsAt)
	for _, d := range dirs {
		d.at, d.joliet = next, next+uint32(len(dirs))
		next++
	}
	next += uint32(len(dirs))
	var all []*node
	for _, d := range dirs {
		for _, c := range d.children {
			if !c.dir {
				c.at = next
				next += uint32(max(1, (len(c.data)+sector-1)/sector))
				all = append(all, c)
			}
		}
	}
	b := make([]byte, int(next)*sector)
	for _, joliet := range []bool{false, true} {
		if err := writeTree(b, label, dirs, next, joliet); err != nil {
			return nil, err
		}
	}
	copy(b[terminatorAt*sector:], "\xffCD001\x01")
	for _, f := range all {
		copy(b[int(f.at)*sector:], f.data)
	}
	return b, nil
}

// add puts a file into the tree.
func (n *node) add(f File) error {
	if f.Path == "" || path.Clean("/"+f.Path) != "/"+f.Path {
		return fmt.Errorf("%q is no path of a file on a CD-ROM", f.Path)
	}
	parts := strings.Split(f.Path, "/")
	at := n
	for i, name := range parts {
		if len(utf16.Encode([]rune(name))) > maxName || strings.ContainsAny(name, "*:;?\\\x00") {
			return fmt.Errorf("%q is no name of a file on a CD-ROM", name)
		}
		k := slices.IndexFunc(at.children, func(c *node) bool { return c.name == name })
		last := i == len(parts)-1
		switch {
		case k >= 0 && (last || !at.children[k].dir):
			return fmt.Errorf("%q is on a CD-ROM twice", f.Path)
		case k >= 0:
			at = at.children[k]
			continue
		}
		c := &node{name: name, dir: !last, parent: at}
		if last {
			c.data = f.Data
		}
		at.children = append(at.children, c)
		at = c
	}
	return nil
}

// number gives the directories their places in the path tables, parents first,
// and every node its short name.
func number(root *node) []*node {
	dirs := []*node{root}
	for i := 0; i < len(dirs); i++ {
		d := dirs[i]
		d.number = i + 1
		slices.SortFunc(d.children, func(a, b *node) int { return cmp.Compare(a.name, b.name) })
		for k, c := range d.children {
			c.short = fmt.Sprintf("%s%02d", strings.Map(shortChar, c.name[:min(len(c.name), 6)]), k)
			if !c.dir {
				c.short += ".;1"
			}
			if c.dir {
				dirs = append(dirs, c)
			}
		}
	}
	return dirs
}

func shortChar(r rune) rune {
	switch {
	case r >= 'a' && r <= 'z':
		return r - 'a' + 'A'
	case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
		return r
	}
	return '_'
}

// identifier is a name as one of the trees has it.
func (n *node) identifier(joliet bool) []byte {
	if !joliet {
		return []byte(n.short)
	}
	return ucs2(n.name)
}

func ucs2(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.BigEndian.AppendUint16(b, u)
	}
	return b
}

func (n *node) sector(joliet bool) uint32 {
	if joliet && n.dir {
		return n.joliet
	}
	return n.at
}

func (n *node) size() uint32 {
	if n.dir {
		return sector
	}
	return uint32(len(n.data))
}

// both writes a number in little, then big endian (ECMA-119 7.3.3).
func both(b []byte, v uint32) {
	binary.LittleEndian.PutUint32(b, v)
	binary.BigEndian.PutUint32(b[4:], v)
}

func both16(b []byte, v uint16) {
	binary.LittleEndian.PutUint16(b, v)
	binary.BigEndian.PutUint16(b[2:], v)
}

// epoch is the time of everything: 1 January 2000, 0:00 UTC (ECMA-119 9.1.5).
var epoch = [7]byte{100, 1, 1, 0, 0, 0, 0}

const longEpoch = "2000010100000000\x00"

// record is a directory record (ECMA-119 9.1).
func record(n *node, id []byte, joliet bool) []byte {
	size := 33 + len(id)
	size += size % 2
	b := make([]byte, size)
	b[0] = byte(size)
	both(b[2:], n.sector(joliet))
	both(b[10:], n.size())
	copy(b[18:], epoch[:])
	if n.dir {
		b[25] = 2
	}
	both16(b[28:], 1)
	b[32] = byte(len(id))
	copy(b[33:], id)
	return b
}

// writeTree writes the descriptor, the path tables and the directories of one of
// the two trees.
func writeTree(b []byte, label string, dirs []*node, sectors uint32, joliet bool) error {
	at, tables := primaryAt, tablesAt
	if joliet {
		at, tables = jolietAt, tablesAt+2
	}
	size, err := pathTables(b, dirs, tables, joliet)
	if err != nil {
		return err
	}
	descriptor(b[at*sector:(at+1)*sector], label, dirs[0], sectors, uint32(size), uint32(tables), joliet)
	for _, d := range dirs {
		out := append(record(d, []byte{0}, joliet), record(d.parent, []byte{1}, joliet)...)
		children := slices.Clone(d.children)
		slices.SortFunc(children, func(a, c *node) int { return slices.Compare(a.identifier(joliet), c.identifier(joliet)) })
		for _, c := range children {
			out = append(out, record(c, c.identifier(joliet), joliet)...)
		}
		if len(out) > sector {
			return fmt.Errorf("directory %q of a CD-ROM has too many names", d.name)
		}
		copy(b[int(d.sector(joliet))*sector:], out)
	}
	return nil
}

// pathTables writes both path tables (ECMA-119 9.4) and returns their size.
func pathTables(b []byte, dirs []*node, at int, joliet bool) (int, error) {
	var little, big []byte
	for _, d := range dirs {
		id := d.identifier(joliet)
		if d.name == "" {
			id = []byte{0}
		}
		head := []byte{byte(len(id)), 0}
		little = append(little, head...)
		little = binary.LittleEndian.AppendUint32(little, d.sector(joliet))
		little = binary.LittleEndian.AppendUint16(little, uint16(d.parent.number))
		big = append(big, head...)
		big = binary.BigEndian.AppendUint32(big, d.sector(joliet))
		big = binary.BigEndian.AppendUint16(big, uint16(d.parent.number))
		if len(id)%2 == 1 {
			id = append(slices.Clone(id), 0)
		}
		little, big = append(little, id...), append(big, id...)
	}
	if len(little) > sector {
		return 0, fmt.Errorf("a CD-ROM has too many directories")
	}
	copy(b[at*sector:], little)
	copy(b[(at+1)*sector:], big)
	return len(little), nil
}

// descriptor writes a volume descriptor (ECMA-119 8.4, 8.5; Joliet 1.0).
func descriptor(b []byte, label string, root *node, sectors, tableSize, tables uint32, joliet bool) {
	text := func(from, to int, s string) {
		field := b[from:to]
		if !joliet {
			for i := range field {
				field[i] = ' '
			}
			copy(field, s)
			return
		}
		for i := 0; i+1 < len(field); i += 2 {
			field[i], field[i+1] = 0, ' '
		}
		copy(field, ucs2(s))
	}
	b[0] = 1
	if joliet {
		b[0] = 2
		copy(b[88:], "%/E") // UCS-2 level 3
	}
	copy(b[1:], "CD001\x01")
	text(8, 40, "")
	text(40, 72, label)
	both(b[80:], sectors)
	both16(b[120:], 1)
	both16(b[124:], 1)
	both16(b[128:], sector)
	both(b[132:], tableSize)
	binary.LittleEndian.PutUint32(b[140:], tables)
	binary.BigEndian.PutUint32(b[148:], tables+1)
	copy(b[156:190], record(root, []byte{0}, joliet))
	text(190, 318, "")
	text(318, 446, "")
	text(446, 574, "")
	text(574, 702, "MUSTER")
	text(702, 739, "")
	text(739, 776, "")
	text(776, 813, "")
	for i := range 4 {
		copy(b[813+17*i:], longEpoch)
	}
	for i := 813 + 17*2; i < 813+17*3-1; i++ {
		b[i] = '0' // never expires
	}
	b[881] = 1
}
