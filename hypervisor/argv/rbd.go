// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package argv

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/muster-vm/muster/internal/rbdname"
)

// What storage calls by a name of rbdname instead of a path is opened with QEMU's rbd
// driver. Its key is a secret object that QEMU reads from a file of the VM.

// SecretID is the object with a key, KeyFile the file that it is read from.
func SecretID(key string) string { return "rbd-" + key }

// KeyFile is in the run directory of the VM.
func KeyFile(dir, key string) string { return filepath.Join(dir, "rbd-"+key+".key") }

// SecretOptions are the object with a key (QAPI SecretProperties).
func SecretOptions(dir, key string) Options {
	return Options{{"qom-type", "secret"}, {"id", SecretID(key)}, {"format", "base64"}, {"file", KeyFile(dir, key)}}
}

// fileNode are the options of the block node of a file, with what only files have.
func fileNode(node, path string, ofFiles Options) Options {
	n, err := rbdname.Parse(path)
	if err != nil {
		return append(Options{{"driver", "file"}, {"node-name", node}, {"filename", path}}, ofFiles...)
	}
	o := Options{{"driver", "rbd"}, {"node-name", node}}
	for _, p := range n.List(SecretID(n.Key)) {
		o = append(o, Option{p.Key, p.Value})
	}
	return o
}

// Keys are those that a machine needs, sorted.
func (m *Machine) Keys() []string {
	var out []string
	add := func(path string) {
		if n, err := rbdname.Parse(path); err == nil && !slices.Contains(out, n.Key) {
			out = append(out, n.Key)
		}
	}
	for _, d := range m.Disks {
		add(d.Path)
	}
	for _, c := range m.CDROMs {
		add(c.Path)
	}
	if m.Firmware != nil {
		add(m.Firmware.Vars)
	}
	slices.Sort(out)
	return out
}

// secrets come before what uses them. They are beside the VM's monitor.
func (m *Machine) secrets() []string {
	var a []string
	for _, k := range m.Keys() {
		a = append(a, "-object", SecretOptions(filepath.Dir(m.QMP), k).String())
	}
	return a
}

// validFile is validPath for what may be in a pool of type rbd, too.
func validFile(what, path string) error {
	if !rbdname.Is(path) {
		return validPath(what, path)
	}
	if _, err := rbdname.Parse(path); err != nil {
		return fmt.Errorf("the %s: %w", what, err)
	}
	return nil
}

// lists makes a list of each structure whose keys are 0, 1, and so on.
func lists(in map[string]any) map[string]any {
	for k, v := range in {
		inner, ok := v.(map[string]any)
		if !ok {
			continue
		}
		lists(inner)
		list := make([]any, 0, len(inner))
		for i := range len(inner) {
			if e, ok := inner[strconv.Itoa(i)]; ok {
				list = append(list, e)
			}
		}
		if len(list) == len(inner) {
			in[k] = list
		}
	}
	return in
}
