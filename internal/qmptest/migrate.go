// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package qmptest

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
)

// migration is the part of the fake that sends or receives a guest. What is sent
// is one line, "memory", while the guest runs and one, "last", after that. With
// the capability multifd there are more connections, as QEMU 7.2 has them.
type migration struct {
	status   string
	err      string
	conn     net.Conn
	ln       net.Listener
	released chan struct{} // closed when the transfer may come to its switch
	goOn     chan struct{} // closed by migrate-continue
	cancel   bool
	was      string // run state before
	stall    bool   // it waits for the other end in the switch
	post     postCopy
}

// What the connections of a migration begin with if there are several.
const (
	mainMagic    = "QEVM"
	channelMagic = "\x11\x22\x33\x44"
)

// setMultifd keeps what matters of migrate-set-capabilities and
// migrate-set-parameters.
func (q *QEMU) setMultifd(args json.RawMessage) {
	var a struct {
		Capabilities []struct {
			Capability string
			State      bool
		}
		Channels int `json:"multifd-channels"`
	}
	_ = json.Unmarshal(args, &a)
	for _, c := range a.Capabilities {
		if c.Capability == "multifd" {
			q.multifd = c.State
		}
	}
	if a.Channels > 0 {
		q.channels = a.Channels
	}
}

// Channels is how many connections beside the main one QEMU was told to use.
func (q *QEMU) Channels() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.multifd {
		return 0
	}
	return q.channels
}

// BreakMirrors ends the copies of disks with an error.
func (q *QEMU) BreakMirrors(text string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, j := range q.snap.jobs {
		if j.Type == mirrorJob {
			j.concluded, j.Error = true, text
		}
	}
}

// mirrorJob is the type of the jobs that copy disks.
const mirrorJob = "mirror"

// mirrorCommand carries out the commands of copies of disks, under mu.
func (q *QEMU) mirrorCommand(cmd string, args json.RawMessage) (reply string, known bool) {
	var a struct {
		JobID  string `json:"job-id"`
		Device string
	}
	_ = json.Unmarshal(args, &a)
	switch cmd {
	case "nbd-server-start", "nbd-server-stop", "block-export-add":
	case "blockdev-mirror":
		q.snap.jobs = append(q.snap.jobs, &job{ID: a.JobID, Type: mirrorJob})
	case "block-job-cancel":
		i := slices.IndexFunc(q.snap.jobs, func(j *job) bool { return j.ID == a.Device })
		if i < 0 {
			return jobRefusal("Block job '" + a.Device + "' not found"), true
		}
		q.snap.jobs[i].concluded = true
	default:
		return "", false
	}
	return `"return": {}`, true
}

// Hold keeps a migration that begins later from its switch until Release.
func (q *QEMU) Hold() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.hold = make(chan struct{})
}

// Release lets a held migration go on.
func (q *QEMU) Release() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.hold != nil {
		close(q.hold)
		q.hold = nil
	}
}

// StallSwitch makes the next migration hang in its switch, as QEMU does that cannot
// write to the other end: it answers nothing until its stream is broken.
func (q *QEMU) StallSwitch() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.stall = true
}

// KeepTransfer makes QEMU say so many times that an earlier transfer is not cleared away.
// Told to send in spite of that it refuses, and takes itself to be sending for ever.
func (q *QEMU) KeepTransfer(times int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.uncleared = times
}

// Migration returns QEMU's migration status.
func (q *QEMU) Migration() string {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.mig.status
}

// OnSent calls f, once, when the source has sent everything, before it says that it has. f
// must not call q.
func (q *QEMU) OnSent(f func()) { q.On(sentAll, f) }

// sentAll is no command of QEMU's.
const sentAll = "(sent)"

// On calls f, once, when a command arrives, before it is carried out. f must not
// call q.
func (q *QEMU) On(cmd string, f func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.on == nil {
		q.on = map[string]func(){}
	}
	q.on[cmd] = f
}

// happened calls, under mu, what On or OnSent has asked for.
func (q *QEMU) happened(what string) {
	if f := q.on[what]; f != nil {
		delete(q.on, what)
		f()
	}
}

func (q *QEMU) setMigration(status string) {
	q.mig.status = status
	q.emit("MIGRATION", fmt.Sprintf(`{"status": %q}`, status))
}

// migrateCommand carries out the commands of migration, under mu.
func (q *QEMU) migrateCommand(cmd string, args json.RawMessage) (reply string, after func(), known bool) {
	const done = `"return": {}`
	var a struct {
		URI    string
		Resume bool
	}
	_ = json.Unmarshal(args, &a)
	path := strings.TrimPrefix(a.URI, "unix:")
	switch cmd {
	case "announce-self":
	case "migrate-set-capabilities", "migrate-set-parameters":
		q.setMultifd(args)
	case "query-migrate":
		return q.migrateInfo(), nil, true
	case "query-yank":
		if q.uncleared > 0 {
			q.uncleared--
			return `"return": [{"type": "migration"}]`, nil, true
		}
		return `"return": []`, nil, true
	case "migrate-incoming":
		if q.mig.ln != nil {
			return jobRefusal("The incoming migration has already been started"), nil, true
		}
		ln, err := net.Listen("unix", path)
		if err != nil {
			return jobRefusal(err.Error()), nil, true
		}
		q.mig.ln = ln
		q.listen = append(q.listen, ln)
		go q.receive(ln)
	case "migrate-start-postcopy":
		return q.startPostCopy(), nil, true
	case "migrate-recover":
		return q.recoverPostCopy(path), nil, true
	case "migrate":
		if a.Resume {
			return q.resumePostCopy(path), nil, true
		}
		if q.uncleared > 0 {
			q.mig.status = "setup"
			return jobRefusal("duplicate yank instance"), nil, true
		}
		q.mig = migration{status: "setup", released: q.hold, goOn: make(chan struct{}), was: q.state, stall: q.stall, post: newPostCopy()}
		return done, func() { go q.send(path) }, true
	case "migrate_cancel":
		switch q.mig.status {
		case "setup", "active", "pre-switchover", "device":
			q.mig.cancel = true
			q.setMigration("cancelling")
			if q.mig.conn != nil {
				_ = q.mig.conn.Close()
			}
			select {
			case <-q.mig.goOn:
			default:
				close(q.mig.goOn)
			}
		}
	case "migrate-continue":
		if q.mig.status != "pre-switchover" {
			return jobRefusal("Migration not in expected state: " + q.mig.status), nil, true
		}
		q.setMigration("device")
		close(q.mig.goOn)
	default:
		reply, known = q.mirrorCommand(cmd, args)
		return reply, nil, known
	}
	return done, nil, true
}

func (q *QEMU) migrateInfo() string {
	if q.mig.status == "" {
		if q.mig.ln != nil {
			return `"return": {"socket-address": [{"type": "unix", "path": "x"}]}`
		}
		return `"return": {}`
	}
	return fmt.Sprintf(`"return": {"status": %q, "error-desc": %q, "total-time": 120, "downtime": 12, "ram": {"total": 1000, "remaining": 500, "transferred": 500, "page-size": 4096, "dirty-sync-count": %d}}`, q.mig.status, q.mig.err, q.passes)
}

// send plays the source until the end of its migration.
func (q *QEMU) send(path string) {
	channels := q.Channels()
	c, err := net.Dial("unix", path)
	gone := make(chan struct{}) // the other end hung up
	hung := sync.OnceFunc(func() { close(gone) })
	begin := "memory\n"
	for range channels {
		var ch net.Conn
		if err == nil {
			ch, err = net.Dial("unix", path)
		}
		if err == nil { // they speak before the main one does
			begin = mainMagic + "memory\n"
			_, err = io.WriteString(ch, channelMagic)
			go func() { _, _ = io.Copy(io.Discard, ch); hung() }()
			defer ch.Close()
		}
	}
	q.mu.Lock()
	if err == nil {
		q.mig.conn = c
		_, err = io.WriteString(c, begin)
	}
	released, goOn, post := q.mig.released, q.mig.goOn, q.mig.post.wanted
	if err == nil && !q.mig.cancel {
		q.setMigration("active")
	}
	q.mu.Unlock()
	if err == nil {
		go func() { _, _ = io.Copy(io.Discard, c); hung() }()
		if released != nil {
			select {
			case <-released:
			case <-post:
			case <-gone:
				err = io.ErrUnexpectedEOF
			}
		}
	}
	q.mu.Lock()
	if err == nil && !q.mig.cancel && !q.ended {
		q.setState("finish-migrate")
		q.emit("STOP", "{}")
		q.setMigration("pre-switchover")
		q.mu.Unlock()
		<-goOn
		q.mu.Lock()
		if q.mig.stall && !q.mig.cancel {
			q.hang = true
			q.mu.Unlock()
			<-gone
			q.mu.Lock()
			q.hang, err = false, io.ErrUnexpectedEOF
		}
	}
	last, divided := "last\n", false
	select {
	case <-post:
		last, divided = "devices\n", true
	default:
	}
	if err == nil && !q.mig.cancel {
		select {
		case <-gone: // a real one finds out by writing
			err = io.ErrUnexpectedEOF
		default:
			_, err = io.WriteString(c, last)
			q.happened(sentAll)
		}
	}
	if divided && err == nil && !q.mig.cancel && !q.ended {
		q.sendRest(c, gone)
		q.mu.Unlock()
		return
	}
	if c != nil {
		_ = c.Close()
	}
	q.finishSend(err)
	q.mu.Unlock()
}

// finishSend ends a migration as QEMU does: a guest that ran goes on by itself
// after a failure.
func (q *QEMU) finishSend(err error) {
	switch {
	case q.ended:
		return
	case q.mig.cancel:
		q.setState(q.mig.was)
		q.setMigration("cancelled")
	case err != nil:
		q.mig.err = err.Error()
		q.setState(q.mig.was)
		q.setMigration("failed")
	default:
		q.setState("postmigrate")
		q.setMigration("completed")
		return
	}
	if q.state == "running" {
		q.emit("RESUME", "{}")
	}
}

// receive plays the target. A stream that ends early ends QEMU.
func (q *QEMU) receive(ln net.Listener) {
	c, err := ln.Accept()
	if err != nil {
		return
	}
	want := "memory\n"
	if n := q.Channels(); n > 0 {
		want = mainMagic + want // the first that comes is the main one
		for range n {
			ch, aerr := ln.Accept()
			magic := make([]byte, len(channelMagic))
			if aerr == nil {
				defer ch.Close()
				_, aerr = io.ReadFull(ch, magic)
			}
			if aerr != nil || string(magic) != channelMagic {
				_ = c.Close()
				q.Exit(1, 0)
				return
			}
		}
	}
	r := bufio.NewReader(c)
	begin, err := r.ReadString('\n')
	last, lerr := r.ReadString('\n')
	if err == nil && lerr == nil && begin == want && last == "devices\n" {
		q.receiveRest(c, r)
		return
	}
	_ = c.Close()
	if err != nil || lerr != nil || begin != want || last != "last\n" {
		q.Exit(1, 0)
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.ended {
		return
	}
	q.setState("paused")
	q.setMigration("completed")
}
