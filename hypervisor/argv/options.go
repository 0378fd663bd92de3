// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package argv

import (
	"fmt"
	"strconv"
	"strings"
)

// Options are the properties of a device or a backend, in order. The same list
// becomes an argument of the command line and the object of a QMP command, so
// that what is plugged in later does not differ from what was there at the
// start. A value is a string, a bool or an int.
type Options []Option

// Option is one property; a dot in the key makes an object within the object, or a list
// if what follows are numbers from 0 on.
type Option struct {
	Key   string
	Value any
}

// String is the form of the command line: the first value without its key, as
// "virtio-blk-pci,id=vd1".
func (o Options) String() string {
	var b strings.Builder
	block := o.blockdev()
	for i, p := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		if i > 0 || block {
			b.WriteString(p.Key + "=")
		}
		switch v := p.Value.(type) {
		case bool:
			b.WriteString(map[bool]string{true: "on", false: "off"}[v])
		case int:
			b.WriteString(strconv.Itoa(v))
		default:
			b.WriteString(escape(fmt.Sprint(v)))
		}
	}
	return b.String()
}

// blockdev tells the options of a block node, whose driver keeps its key.
func (o Options) blockdev() bool {
	for _, p := range o {
		if p.Key == "node-name" {
			return true
		}
	}
	return false
}

// Object is the form of QMP.
func (o Options) Object() map[string]any {
	out := map[string]any{}
	for _, p := range o {
		at, key := out, p.Key
		for {
			head, rest, dotted := strings.Cut(key, ".")
			if !dotted {
				break
			}
			inner, ok := at[head].(map[string]any)
			if !ok {
				inner = map[string]any{}
				at[head] = inner
			}
			at, key = inner, rest
		}
		at[key] = p.Value
	}
	return lists(out)
}
