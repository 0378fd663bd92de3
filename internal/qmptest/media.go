// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package qmptest

import (
	"maps"
	"slices"
	"strings"
)

// LockTray makes the guest keep the tray of a drive closed, or lets it open it
// again when it is asked.
func (q *QEMU) LockTray(id string, on bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.dev.ids[id]["locked"] = on
}

// MoveTray is the guest opening or closing the tray of a drive.
func (q *QEMU) MoveTray(id string, open bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.moveTray(id, open)
}

func (q *QEMU) moveTray(id string, open bool) {
	if q.dev.ids[id]["open"] == open {
		return
	}
	q.dev.ids[id]["open"] = open
	q.emit("DEVICE_TRAY_MOVED", quote(map[string]any{"device": "", "id": id, "tray-open": open}))
}

// isDrive tells CD-ROM drives.
func isDrive(props map[string]any) bool {
	driver, _ := props["driver"].(string)
	return driver == "ide-cd" || driver == "scsi-cd"
}

// trays lists the drives as query-block does.
func (d *devices) trays() []map[string]any {
	var out []map[string]any
	for _, id := range slices.Sorted(maps.Keys(d.ids)) {
		props := d.ids[id]
		if !isDrive(props) {
			continue
		}
		m := map[string]any{"device": "", "qdev": id, "removable": true, "locked": props["locked"] == true, "tray_open": props["open"] == true}
		if node, ok := props["drive"].(string); ok {
			m["inserted"] = map[string]any{"node-name": node, "file": d.nodes[node], "drv": "raw", "image": map[string]any{}}
		}
		out = append(out, m)
	}
	return out
}

// media carries out a command about a drive, under mu; "" means that it is none.
func (q *QEMU) media(cmd string, args map[string]any) string {
	if !strings.HasPrefix(cmd, "blockdev-") || !slices.Contains([]string{"open-tray", "close-tray", "remove-medium", "insert-medium"}, cmd[len("blockdev-"):]) {
		return ""
	}
	id, _ := args["id"].(string)
	props := q.dev.ids[id]
	if props == nil || !isDrive(props) {
		return refusal("DeviceNotFound", "Device '%s' not found", id)
	}
	_, full := props["drive"]
	switch cmd {
	case "blockdev-open-tray":
		if props["locked"] == true && args["force"] != true {
			break // the guest is asked, and does nothing
		}
		q.moveTray(id, true)
	case "blockdev-close-tray":
		q.moveTray(id, false)
	case "blockdev-remove-medium":
		if props["open"] != true {
			return refusal("GenericError", "Tray of device '%s' is not open", id)
		}
		delete(props, "drive")
	case "blockdev-insert-medium":
		node, _ := args["node-name"].(string)
		switch {
		case props["open"] != true:
			return refusal("GenericError", "Tray of device '%s' is not open", id)
		case full:
			return refusal("GenericError", "There already is a medium in device '%s'", id)
		}
		if _, ok := q.dev.nodes[node]; !ok {
			return refusal("GenericError", "Node '%s' not found", node)
		}
		props["drive"] = node
	}
	return `"return": {}`
}
