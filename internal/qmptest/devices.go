// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package qmptest

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// devices is the hardware of a QEMU without a guest.
type devices struct {
	ids     map[string]map[string]any // devices with their properties
	nodes   map[string]string         // block nodes and their files
	sizes   map[string]any            // of nodes that were resized
	netdevs map[string]bool
	cpus    int               // that it started with
	places  int               // for CPUs
	balloon int64             // what it leaves to the guest
	ignore  bool              // the guest lets go of nothing
	refuse  map[string]string // command → what QEMU says instead of doing it
}

func newDevices(argv []string) devices {
	d := devices{balloon: 96 << 20, ids: map[string]map[string]any{}, nodes: map[string]string{}, sizes: map[string]any{}, netdevs: map[string]bool{}, refuse: map[string]string{}}
	for i := 1; i < len(argv); i++ {
		switch o := argv[i]; argv[i-1] {
		case "-device":
			if id := option(o, "id"); id != "" {
				props := map[string]any{"driver": strings.SplitN(o, ",", 2)[0]}
				for _, kv := range strings.Split(o, ",")[1:] {
					k, v, _ := strings.Cut(kv, "=")
					props[k] = v
					if n, err := strconv.ParseInt(v, 10, 64); err == nil {
						props[k] = n
					}
				}
				if n, ok := props["requested-size"]; ok {
					props["size"] = n // the guest has taken what it was asked to take
				}
				d.ids[id] = props
			}
		case "-smp":
			d.cpus, _ = strconv.Atoi(option("x,"+o, "cpus"))
			d.places, _ = strconv.Atoi(option(o, "cores"))
		case "-blockdev":
			d.nodes[option(o, "node-name")] = option(o, "filename")
		case "-netdev":
			d.netdevs[option(o, "id")] = true
		}
	}
	return d
}

// SetProperty changes a device as the guest does.
func (q *QEMU) SetProperty(id, name string, value any) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.dev.ids[id][name] = value
}

// SetBalloon is what the guest's balloon leaves to it.
func (q *QEMU) SetBalloon(bytes int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.dev.balloon = bytes
}

// Balloon is what the balloon leaves to the guest.
func (q *QEMU) Balloon() int64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.dev.balloon
}

// IgnoreUnplug makes the guest let go of no device and of no memory, or lets it do so again for
// what is asked from then on.
func (q *QEMU) IgnoreUnplug(on bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.dev.ignore = on
}

// Refuse makes QEMU answer a command with an error; "" ends that.
func (q *QEMU) Refuse(cmd, why string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if why == "" {
		delete(q.dev.refuse, cmd)
		return
	}
	q.dev.refuse[cmd] = why
}

// Devices are the IDs of the devices, in order.
func (q *QEMU) Devices() []string {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Sorted(maps.Keys(q.dev.ids))
}

// Property of a device, as the command line or a command set it last.
func (q *QEMU) Property(id, name string) any {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.dev.ids[id][name]
}

// Nodes are the names of the block nodes, in order.
func (q *QEMU) Nodes() []string {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Sorted(maps.Keys(q.dev.nodes))
}

// Size that a block node was resized to, nil if it was not.
func (q *QEMU) Size(node string) any {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.dev.sizes[node]
}

func quote(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func refusal(class, format string, args ...any) string {
	return fmt.Sprintf(`"error": {"class": %q, "desc": %s}`, class, quote(fmt.Sprintf(format, args...)))
}

// hardware carries out a command about devices under mu; "" means that it is
// none.
func (q *QEMU) hardware(cmd string, args map[string]any) (reply string) {
	const done = `"return": {}`
	d := &q.dev
	text := func(key string) string { s, _ := args[key].(string); return s }
	switch cmd {
	case "qom-list":
		list := []map[string]string{{"name": "type", "type": "string"}}
		for _, id := range slices.Sorted(maps.Keys(d.ids)) {
			list = append(list, map[string]string{"name": id, "type": "child<x>"})
		}
		return `"return": ` + quote(list)
	case "qom-get":
		if text("path") == "/machine" && text("property") == "type" {
			return `"return": "pc-q35-7.2-machine"`
		}
		props, ok := d.ids[strings.TrimPrefix(text("path"), "/machine/peripheral/")]
		if !ok {
			return refusal("DeviceNotFound", "Device '%s' not found", text("path"))
		}
		return `"return": ` + quote(props[text("property")])
	case "qom-set":
		props, ok := d.ids[strings.TrimPrefix(text("path"), "/machine/peripheral/")]
		if !ok {
			return refusal("DeviceNotFound", "Device '%s' not found", text("path"))
		}
		props[text("property")] = args["value"]
		if text("property") == "requested-size" && !d.ignore {
			props["size"] = args["value"]
		}
	case "block_resize":
		if _, ok := d.nodes[text("node-name")]; !ok {
			return refusal("GenericError", "Cannot find device='' nor node-name='%s'", text("node-name"))
		}
		d.sizes[text("node-name")] = args["size"]
	case "balloon":
		if n, _ := args["value"].(float64); !d.ignore {
			d.balloon = int64(n)
		}
	case "block_set_io_throttle":
		id := strings.TrimSuffix(strings.TrimPrefix(text("id"), "/machine/peripheral/"), "/virtio-backend")
		if d.ids[id] == nil {
			return refusal("DeviceNotFound", "Device '%s' not found", text("id"))
		}
		d.ids[id]["throttle"] = args
	case "query-hotpluggable-cpus":
		return `"return": ` + quote(d.cpuPlaces())
	case "query-named-block-nodes":
		list := []map[string]string{}
		for _, n := range slices.Sorted(maps.Keys(d.nodes)) {
			list = append(list, map[string]string{"node-name": n, "file": d.nodes[n]})
		}
		return `"return": ` + quote(list)
	case "blockdev-add":
		if _, taken := d.nodes[text("node-name")]; taken {
			return refusal("GenericError", "Duplicate nodes with node-name='%s'", text("node-name"))
		}
		d.nodes[text("node-name")] = text("filename") + d.nodes[text("file")]
		if text("driver") == "qcow2" {
			q.snap.disks = append(q.snap.disks, &disk{Node: text("node-name"), File: d.nodes[text("file")], Tags: map[string]int64{}})
		}
	case "blockdev-del":
		q.snap.disks = slices.DeleteFunc(q.snap.disks, func(o *disk) bool { return o.Node == text("node-name") })
		return d.dropNode(text("node-name"))
	case "netdev_add":
		if d.netdevs[text("id")] {
			return refusal("GenericError", "Duplicate ID '%s' for netdev", text("id"))
		}
		d.netdevs[text("id")] = true
	case "netdev_del":
		if !d.netdevs[text("id")] {
			return refusal("DeviceNotFound", "Device '%s' not found", text("id"))
		}
		delete(d.netdevs, text("id"))
	case "set_link":
		if d.ids[text("name")] == nil {
			return refusal("DeviceNotFound", "Device '%s' not found", text("name"))
		}
		d.ids[text("name")]["up"] = args["up"]
	case "device_add":
		if d.ids[text("id")] != nil {
			return refusal("GenericError", "Duplicate device ID '%s'", text("id"))
		}
		d.ids[text("id")] = maps.Clone(args)
	case "device_del":
		return q.unplug(text("id"))
	default:
		return q.media(cmd, args)
	}
	return done
}

// cpuPlaces lists the places for CPUs, the last first as QEMU does.
func (d *devices) cpuPlaces() []map[string]any {
	list := []map[string]any{}
	for n := d.places - 1; n >= 0; n-- {
		p := map[string]any{"type": "max-x86_64-cpu", "vcpus-count": 1, "props": map[string]int{"socket-id": 0, "core-id": n, "thread-id": 0}}
		for id, props := range d.ids {
			if core, ok := props["core-id"].(float64); ok && int(core) == n {
				p["qom-path"] = "/machine/peripheral/" + id
			}
		}
		if n < d.cpus {
			p["qom-path"] = fmt.Sprintf("/machine/unattached/device[%d]", n)
		}
		list = append(list, p)
	}
	return list
}

func (d *devices) dropNode(name string) string {
	if _, ok := d.nodes[name]; !ok {
		return refusal("GenericError", "Failed to find node with node-name='%s'", name)
	}
	for id, props := range d.ids {
		if props["drive"] == name {
			return refusal("GenericError", "Node %s is in use by %s", name, id)
		}
	}
	delete(d.nodes, name)
	return `"return": {}`
}

// LetGo is the guest letting go of a device late.
func (q *QEMU) LetGo(id string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.dev.ids, id)
	q.emit("DEVICE_DELETED", fmt.Sprintf(`{"device": %q, "path": "/machine/peripheral/%s"}`, id, id))
}

func (q *QEMU) unplug(id string) string {
	if q.dev.ids[id] == nil {
		return refusal("DeviceNotFound", "Device '%s' not found", id)
	}
	if !q.dev.ignore {
		delete(q.dev.ids, id)
		q.emit("DEVICE_DELETED", fmt.Sprintf(`{"device": %q, "path": "/machine/peripheral/%s"}`, id, id))
	}
	return `"return": {}`
}
