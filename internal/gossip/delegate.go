// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package gossip

import (
	"fmt"
	"log"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// delegate is what memberlist calls. It may hold its locks meanwhile, so nothing
// here may call it back or wait.
type delegate struct{ s *Service }

var (
	_ memberlist.Delegate      = (*delegate)(nil)
	_ memberlist.EventDelegate = (*delegate)(nil)
	_ memberlist.AliveDelegate = (*delegate)(nil)
)

// NotifyAlive implements memberlist.AliveDelegate: it is asked before a node is
// believed to live, however the word came.
func (d *delegate) NotifyAlive(n *memberlist.Node) error {
	if n.Name == d.s.cfg.NodeID || d.s.table.member(n.Name) {
		return nil
	}
	return errNoMember
}

// NotifyJoin implements memberlist.EventDelegate.
func (d *delegate) NotifyJoin(n *memberlist.Node) { d.s.table.joined(n.Name) }

// NotifyLeave implements memberlist.EventDelegate.
func (d *delegate) NotifyLeave(n *memberlist.Node) { d.s.table.gone(n.Name) }

// NotifyUpdate implements memberlist.EventDelegate.
func (d *delegate) NotifyUpdate(*memberlist.Node) {}

// NodeMeta implements memberlist.Delegate. Summaries travel by themselves: they
// change often, and are smaller without memberlist's own fields.
func (d *delegate) NodeMeta(int) []byte { return nil }

// NotifyMsg implements memberlist.Delegate. b is used again by the caller.
func (d *delegate) NotifyMsg(b []byte) { d.s.contained(func() { d.record(b) }) }

func (d *delegate) record(b []byte) {
	r, err := decodeRecord(append([]byte(nil), b...))
	if err == nil {
		var news bool
		if news, err = d.s.hear(r, 0); news {
			d.s.pass(r)
		}
	}
	if err != nil {
		d.s.cfg.Log.Debug("summary not understood", "err", err)
	}
}

// GetBroadcasts implements memberlist.Delegate.
func (d *delegate) GetBroadcasts(overhead, limit int) [][]byte {
	return d.s.out.take(overhead, limit)
}

// LocalState implements memberlist.Delegate.
func (d *delegate) LocalState(bool) []byte { return encodeState(d.s.table.state()) }

// MergeRemoteState implements memberlist.Delegate.
func (d *delegate) MergeRemoteState(b []byte, _ bool) { d.s.contained(func() { d.state(b) }) }

func (d *delegate) state(b []byte) {
	list, err := decodeState(append([]byte(nil), b...))
	if err != nil {
		d.s.cfg.Log.Debug("summaries not understood", "err", err)
		return
	}
	for _, a := range list {
		if _, err := d.s.hear(a.record, a.age); err != nil {
			d.s.cfg.Log.Debug("summary not understood", "node", a.id, "err", err)
		}
	}
}

// lostUDPEvery is how often the same node's lost packets are worth a warning.
const lostUDPEvery = 10 * time.Minute

// logWriter turns memberlist's lines into records. It says nothing that a person
// must know, with one exception: what a firewall does to the packets.
type logWriter struct {
	log   *slog.Logger
	table *table

	mu     sync.Mutex
	warned map[string]time.Time
}

func newLogger(l *slog.Logger, t *table) *log.Logger {
	return log.New(&logWriter{log: l, table: t, warned: map[string]time.Time{}}, "", 0)
}

// Write implements io.Writer with one line.
func (w *logWriter) Write(b []byte) (int, error) {
	line := strings.TrimSpace(string(b))
	if _, rest, ok := strings.Cut(line, "Was able to connect to "); ok {
		id, _, _ := strings.Cut(rest, " ")
		w.warnUDP(id)
	}
	w.log.Debug("memberlist", "line", line)
	return len(b), nil
}

func (w *logWriter) warnUDP(id string) {
	address, _, ok := w.table.where(id)
	if !ok {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if at := w.warned[id]; !at.IsZero() && time.Since(at) < lostUDPEvery {
		return
	}
	w.warned[id] = time.Now()
	w.log.Warn(fmt.Sprintf("node answers by TCP but not by UDP; open UDP port %s for it too", portOf(address)), "node", id, "address", address)
}

func portOf(address string) string { return address[strings.LastIndexByte(address, ':')+1:] }
