// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package qmptest is a QEMU without a guest for unit tests: it listens on the
// sockets that an argument vector names, speaks enough QMP to be started,
// paused, reset and switched off, and does on the test's word what a real QEMU
// does rarely: hang, ignore the power button, panic, die.
//
// Goroutines: one acceptor per socket and one reader per connection, all ended
// by Exit. It is imported by tests only.
package qmptest

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"
)

// QEMU is one process that is none.
type QEMU struct {
	// IgnorePowerButton is a guest that is still booting. Set it before use.
	IgnorePowerButton bool
	// Major is of the version that it says, 10 unless set before use.
	Major int
	// Exited is called once with exit code and signal.
	Exited func(code, signal int)
	// Running, if set, is told when the guest begins and ends to run. It must not
	// call q.
	Running func(on bool)

	mu        sync.Mutex
	mig       migration
	hold      chan struct{}
	stall     bool
	uncleared int // answers that name an earlier transfer
	multifd   bool
	passes    int
	channels  int // of multifd
	on        map[string]func()
	state     string
	hang      bool
	ended     bool
	commands  []string
	dev       devices
	trap      trap
	qmp       map[net.Conn]struct{}
	serial    map[net.Conn]struct{}
	listen    []net.Listener
	snap      snapshots
}

// Start listens on the sockets in argv (chardevs qmp0 and serial0).
func Start(argv []string, exited func(code, signal int)) (*QEMU, error) {
	q := &QEMU{Exited: exited, state: "running", dev: newDevices(argv), qmp: map[net.Conn]struct{}{}, serial: map[net.Conn]struct{}{}}
	q.readDisks(argv)
	for i, a := range argv {
		if a == "-S" {
			q.state = "prelaunch"
		}
		if a == "-incoming" {
			q.state = "inmigrate"
		}
		if i == 0 || argv[i-1] != "-chardev" {
			continue
		}
		path := option(a, "path")
		var err error
		switch option(a, "id") {
		case "qmp0":
			err = q.serve(path, q.monitor)
		case "serial0":
			err = q.serve(path, q.console)
		}
		if err != nil {
			q.Exit(1, 0)
			return nil, err
		}
	}
	return q, nil
}

func option(s, name string) string {
	for _, kv := range strings.Split(s, ",") {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			return v
		}
	}
	return ""
}

func (q *QEMU) serve(path string, f func(net.Conn)) error {
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	q.listen = append(q.listen, l)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go f(c)
		}
	}()
	return nil
}

// State returns QEMU's run state; SetState changes it, as a disk error does.
func (q *QEMU) State() string {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.state
}

// SetState changes the run state without an event.
func (q *QEMU) SetState(s string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.setState(s)
}

// Watch calls f when the guest begins and ends to run, and now if it runs. f must
// not call q.
func (q *QEMU) Watch(f func(on bool)) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.Running = f
	if q.state == "running" && !q.ended {
		f(true)
	}
}

func (q *QEMU) setState(s string) {
	if q.Running != nil && (s == "running") != (q.state == "running") {
		q.Running(s == "running")
	}
	q.state = s
}

// Hang makes QEMU read and answer nothing until Hang(false).
func (q *QEMU) Hang(on bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.hang = on
}

// Count returns how often a command was executed.
func (q *QEMU) Count(cmd string) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := 0
	for _, c := range q.commands {
		if c == cmd {
			n++
		}
	}
	return n
}

// Emit sends an event to every client.
func (q *QEMU) Emit(event, data string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.emit(event, data)
}

func (q *QEMU) emit(event, data string) {
	now := time.Now()
	for c := range q.qmp {
		fmt.Fprintf(c, `{"timestamp": {"seconds": %d, "microseconds": 0}, "event": %q, "data": %s}`+"\r\n", now.Unix(), event, data)
	}
}

// Print writes to the serial console.
func (q *QEMU) Print(s string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for c := range q.serial {
		fmt.Fprint(c, s)
	}
}

// PowerOff is the guest switching itself off.
func (q *QEMU) PowerOff() {
	q.Emit("SHUTDOWN", `{"guest": true, "reason": "guest-shutdown"}`)
	q.Exit(0, 0)
}

// Exit ends QEMU as a process ends: all its sockets close.
func (q *QEMU) Exit(code, signal int) {
	q.mu.Lock()
	if q.ended {
		q.mu.Unlock()
		return
	}
	q.ended = true
	if q.Running != nil && q.state == "running" {
		q.Running(false)
	}
	if q.mig.conn != nil {
		_ = q.mig.conn.Close()
	}
	for _, l := range q.listen {
		_ = l.Close()
	}
	for c := range q.qmp {
		_ = c.Close()
	}
	for c := range q.serial {
		_ = c.Close()
	}
	q.mu.Unlock()
	if q.Exited != nil {
		q.Exited(code, signal)
	}
}

// join adds a client unless QEMU has ended.
func (q *QEMU) join(set map[net.Conn]struct{}, c net.Conn) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.ended {
		_ = c.Close()
		return false
	}
	set[c] = struct{}{}
	return true
}

func (q *QEMU) console(c net.Conn) {
	if !q.join(q.serial, c) {
		return
	}
	echo := bufio.NewReader(c)
	for {
		b, err := echo.ReadByte()
		if err != nil {
			return
		}
		q.Print(string(b))
	}
}

func (q *QEMU) monitor(c net.Conn) {
	q.mu.Lock()
	hang := q.hang
	q.mu.Unlock()
	if !q.join(q.qmp, c) || hang {
		return
	}
	fmt.Fprintf(c, `{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": %d}, "package": "fake"}, "capabilities": []}}`+"\r\n", cmp.Or(q.Major, 10))
	for s := bufio.NewScanner(c); s.Scan(); {
		var cmd struct {
			Execute string          `json:"execute"`
			ID      json.RawMessage `json:"id"`
			Args    json.RawMessage `json:"arguments"`
		}
		if json.Unmarshal(s.Bytes(), &cmd) != nil {
			return
		}
		q.mu.Lock()
		if q.hang {
			q.mu.Unlock()
			continue
		}
		q.commands = append(q.commands, cmd.Execute)
		q.happened(cmd.Execute)
		if q.ended {
			q.mu.Unlock()
			return
		}
		if q.sprung(cmd.Execute, c) {
			q.mu.Unlock()
			return
		}
		ret, after := q.carryOut(cmd.Execute, cmd.Args)
		fmt.Fprintf(c, `{%s, "id": %s}`+"\r\n", ret, cmd.ID)
		q.mu.Unlock()
		if after != nil {
			after()
		}
	}
}

// carryOut has a command done by the part that knows it, under mu.
func (q *QEMU) carryOut(cmd string, args json.RawMessage) (reply string, after func()) {
	if why, ok := q.dev.refuse[cmd]; ok {
		return refusal("GenericError", "%s", why), nil
	}
	if reply, known := q.executeJob(cmd, args); known {
		return reply, nil
	}
	if reply, after, known := q.migrateCommand(cmd, args); known {
		return reply, after
	}
	var named map[string]any
	_ = json.Unmarshal(args, &named) // a command without arguments has none
	if reply := q.hardware(cmd, named); reply != "" {
		return reply, nil
	}
	return q.execute(cmd)
}

// execute carries out a command under mu.
func (q *QEMU) execute(cmd string) (reply string, after func()) {
	const done = `"return": {}`
	switch cmd {
	case "qmp_capabilities":
	case "query-status":
		return fmt.Sprintf(`"return": {"status": %q, "singlestep": false, "running": %v}`, q.state, q.state == "running"), nil
	case "query-kvm":
		return `"return": {"enabled": false, "present": true}`, nil
	case "query-balloon":
		return fmt.Sprintf(`"return": {"actual": %d}`, q.dev.balloon), nil
	case "query-blockstats":
		return `"return": [{"qdev": "/machine/a", "stats": {"rd_bytes": 1000, "wr_bytes": 20, "rd_operations": 3}}, {"stats": {"rd_bytes": 5, "wr_bytes": 7}}]`, nil
	case "stop":
		q.setState("paused")
		q.emit("STOP", "{}")
	case "cont":
		if q.state == "finish-migrate" {
			return refusal("GenericError", "Migration is not finalized yet"), nil
		}
		q.setState("running")
		q.emit("RESUME", "{}")
	case "system_reset":
		if q.state == "watchdog" {
			q.setState("prelaunch")
		}
		q.emit("RESET", `{"guest": false, "reason": "host-qmp-system-reset"}`)
	case "system_powerdown":
		q.emit("POWERDOWN", "{}")
		if !q.IgnorePowerButton {
			return done, func() { go q.PowerOff() }
		}
	case "quit":
		q.emit("SHUTDOWN", `{"guest": false, "reason": "host-qmp-quit"}`)
		return done, func() { go q.Exit(0, 0) }
	default:
		return fmt.Sprintf(`"error": {"class": "CommandNotFound", "desc": "The command %s has not been found"}`, cmd), nil
	}
	return done, nil
}
