// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package qmptest

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// disk is a qcow2 blockdev of the argument vector with its internal snapshots.
type disk struct {
	Node string
	File string
	Tags map[string]int64 // size of the memory
}

// job is one of QEMU's background jobs.
type job struct {
	ID, Type, Error string
	concluded       bool
	finish          func()
}

// snapshots is the part of the state that jobs and transactions change.
type snapshots struct {
	disks   []*disk
	jobs    []*job
	hold    bool
	failJob map[string]string
	failCmd map[string]string
	loaded  []string // tags, in order
}

// vmStateSize is the size of every guest's memory.
const vmStateSize = 455731

// readDisks finds the disks in an argument vector.
func (q *QEMU) readDisks(argv []string) {
	files := map[string]string{}
	for i, a := range argv {
		if i == 0 || argv[i-1] != "-blockdev" {
			continue
		}
		switch option(a, "driver") {
		case "file":
			files[option(a, "node-name")] = option(a, "filename")
		case "qcow2":
			q.snap.disks = append(q.snap.disks, &disk{Node: option(a, "node-name"), File: files[option(a, "file")], Tags: map[string]int64{}})
		}
	}
}

// FailJob makes the next job of a type end with an error, after half of its work.
func (q *QEMU) FailJob(typ, text string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.snap.failJob == nil {
		q.snap.failJob = map[string]string{}
	}
	q.snap.failJob[typ] = text
}

// FailCommand makes the next command of a name fail.
func (q *QEMU) FailCommand(cmd, text string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.snap.failCmd == nil {
		q.snap.failCmd = map[string]string{}
	}
	q.snap.failCmd[cmd] = text
}

// HoldJobs makes jobs go on until HoldJobs(false).
func (q *QEMU) HoldJobs(on bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.snap.hold = on
	for _, j := range q.snap.jobs {
		if !on && !j.concluded && j.finish != nil {
			j.finish()
		}
	}
}

// Tags returns the internal snapshots of every disk, by node.
func (q *QEMU) Tags() map[string][]string {
	q.mu.Lock()
	defer q.mu.Unlock()
	out := map[string][]string{}
	for _, d := range q.snap.disks {
		out[d.Node] = slices.Sorted(maps.Keys(d.Tags))
	}
	return out
}

// Tag puts an internal snapshot into every disk, as an earlier QEMU left it.
func (q *QEMU) Tag(name string, memory int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i, d := range q.snap.disks {
		d.Tags[name] = 0
		if i == 0 {
			d.Tags[name] = memory
		}
	}
}

// JobTypes returns the types of the jobs that are not dismissed.
func (q *QEMU) JobTypes() []string {
	q.mu.Lock()
	defer q.mu.Unlock()
	var out []string
	for _, j := range q.snap.jobs {
		out = append(out, j.Type)
	}
	return out
}

// Loaded returns the tags that were loaded, in order.
func (q *QEMU) Loaded() []string {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Clone(q.snap.loaded)
}

type jobArgs struct {
	ID      string   `json:"job-id"`
	Tag     string   `json:"tag"`
	VMState string   `json:"vmstate"`
	Devices []string `json:"devices"`
	Dismiss string   `json:"id"`
	Actions []struct {
		Type string `json:"type"`
		Data struct {
			Device, Name string
		} `json:"data"`
	} `json:"actions"`
}

// executeJob carries out what is about jobs and snapshots, under mu.
func (q *QEMU) executeJob(cmd string, raw json.RawMessage) (reply string, known bool) {
	var a jobArgs
	_ = json.Unmarshal(raw, &a) // a command without arguments has none
	if text, fails := q.snap.failCmd[cmd]; fails {
		delete(q.snap.failCmd, cmd)
		return jobRefusal(text), true
	}
	switch cmd {
	case "query-block":
		return q.queryBlock(), true
	case "query-jobs":
		var out []map[string]any
		for _, j := range q.snap.jobs {
			m := map[string]any{"id": j.ID, "type": j.Type, "status": "running", "current-progress": 1, "total-progress": 1}
			if j.Type == mirrorJob {
				m["status"] = "ready"
			}
			if j.concluded {
				m["status"] = "concluded"
				if j.Error != "" {
					m["error"] = j.Error
				}
			}
			out = append(out, m)
		}
		return returns(out), true
	case "job-dismiss":
		q.snap.jobs = slices.DeleteFunc(q.snap.jobs, func(j *job) bool { return j.ID == a.Dismiss })
		return `"return": {}`, true
	case "transaction":
		return q.transaction(a), true
	case "snapshot-save", "snapshot-load", "snapshot-delete":
		q.beginJob(cmd, a)
		return `"return": {}`, true
	}
	return "", false
}

func jobRefusal(text string) string {
	return fmt.Sprintf(`"error": {"class": "GenericError", "desc": %q}`, text)
}

func returns(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return jobRefusal(err.Error())
	}
	if string(b) == "null" {
		b = []byte("[]")
	}
	return `"return": ` + string(b)
}

func (q *QEMU) queryBlock() string {
	var out []map[string]any
	for _, d := range q.snap.disks {
		var tags []map[string]any
		for _, name := range slices.Sorted(maps.Keys(d.Tags)) {
			tags = append(tags, map[string]any{"name": name, "vm-state-size": d.Tags[name]})
		}
		out = append(out, map[string]any{"device": "", "inserted": map[string]any{
			"node-name": d.Node, "file": d.File, "drv": "qcow2", "image": map[string]any{"snapshots": tags},
		}})
	}
	return returns(append(out, q.dev.trays()...))
}

func (q *QEMU) transaction(a jobArgs) string {
	for _, act := range a.Actions {
		if act.Type != "blockdev-snapshot-internal-sync" || q.disk(act.Data.Device) == nil {
			return jobRefusal("unknown action or device")
		}
	}
	for _, act := range a.Actions {
		q.disk(act.Data.Device).Tags[act.Data.Name] = 0
	}
	return `"return": {}`
}

func (q *QEMU) disk(node string) *disk {
	for _, d := range q.snap.disks {
		if d.Node == node {
			return d
		}
	}
	return nil
}

func (q *QEMU) beginJob(typ string, a jobArgs) {
	j := &job{ID: a.ID, Type: typ}
	j.finish = func() {
		j.concluded = true
		j.Error = q.snap.failJob[typ]
		delete(q.snap.failJob, typ)
		q.jobWork(j, a)
		q.emit("JOB_STATUS_CHANGE", fmt.Sprintf(`{"id": %q, "status": "concluded"}`, j.ID))
	}
	q.snap.jobs = append(q.snap.jobs, j)
	if !q.snap.hold {
		j.finish()
	}
}

// jobWork does what the job does to all disks, or to the first only if it fails.
func (q *QEMU) jobWork(j *job, a jobArgs) {
	for i, node := range a.Devices {
		d := q.disk(node)
		if d == nil {
			j.Error = "device " + node + " does not exist"
			return
		}
		_, has := d.Tags[a.Tag]
		switch {
		case i > 0 && j.Error != "":
			return
		case j.Type == "snapshot-save" && has:
			j.Error = "Snapshot '" + a.Tag + "' already exists in one or more devices"
			return
		case j.Type == "snapshot-load" && !has:
			j.Error = "Snapshot '" + a.Tag + "' does not exist in one or more devices"
			return
		case j.Type == "snapshot-save":
			d.Tags[a.Tag] = 0
			if node == a.VMState {
				d.Tags[a.Tag] = vmStateSize
			}
		case j.Type == "snapshot-delete":
			delete(d.Tags, a.Tag)
		}
	}
	if j.Type == "snapshot-load" && j.Error == "" {
		q.snap.loaded = append(q.snap.loaded, strings.Clone(a.Tag))
	}
}
