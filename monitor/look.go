// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// markRoot holds what was last told of each object. An event is written in the
// transaction that moves the mark on, under the condition that the mark is
// still the one that was read: so it is written once, whoever leads.
const markRoot = configdb.Root + "monitor/seen/"

func markKey(kind api.Kind, id string) string { return markRoot + string(kind) + "/" + id }

// nodeMark is what was last told of a node.
type nodeMark struct {
	Name   string        `json:"name"`
	Phase  api.NodePhase `json:"phase,omitempty"`
	LostAt time.Time     `json:"lostAt,omitzero"`
	BootID string        `json:"bootID,omitempty"`
	// Out are the pools that it is locked out of, sorted, with commas.
	Out string `json:"out,omitempty"`
	// CutOff: it is heard by notes in pools alone.
	CutOff bool `json:"cutOff,omitempty"`
}

// vmMark is what was last told of a VM.
type vmMark struct {
	Name      string      `json:"name"`
	Phase     api.VMPhase `json:"phase,omitempty"`
	NodeID    string      `json:"nodeID,omitempty"`
	Node      string      `json:"node,omitempty"`
	Epoch     uint64      `json:"epoch,omitempty"`
	StartedAt time.Time   `json:"startedAt,omitzero"`
	Crashes   uint32      `json:"crashes,omitempty"`
	CrashedAt time.Time   `json:"crashedAt,omitzero"`

	MovedFrom   string    `json:"movedFrom,omitempty"`
	MovedFromID string    `json:"movedFromID,omitempty"`
	MovedLoss   time.Time `json:"movedLoss,omitzero"`
	Recovering  bool      `json:"recovering,omitempty"`
}

// look brings the events and facts of one object up to date. id is "kind/ID".
func (s *Service) look(ctx context.Context, term uint64, id string) error {
	kind, id, _ := strings.Cut(id, "/")
	if api.Kind(kind) == api.KindNode {
		return s.lookNode(ctx, term, id)
	}
	return s.lookVM(ctx, term, id)
}

// record is the mark of an object, as of one view.
type record[M comparable] struct {
	id, key  string // of the object; of the mark
	gone     bool   // the object
	known    bool   // there is a mark
	mark     M
	revision uint64 // of the mark
}

func readRecord[M comparable](v *configdb.View, kind api.Kind, id string) (record[M], error) {
	r := record[M]{id: id, key: markKey(kind, id)}
	e, ok := v.Get(r.key)
	if !ok {
		return r, nil
	}
	if err := json.Unmarshal(e.Value, &r.mark); err != nil {
		return r, fmt.Errorf("decode %s: %w", r.key, err)
	}
	r.known, r.revision = true, e.Revision
	return r, nil
}

// step tells what happened to an object since its mark was written. advance
// moves the mark to what the object is now and returns the events; farewell is
// the event of one that is gone.
func step[M comparable](ctx context.Context, s *Service, term uint64, r *record[M], advance func(now time.Time) []api.Event, farewell func() api.Event) error {
	if r.gone {
		if !r.known {
			return nil
		}
		return s.tellOf(ctx, term, r.key, r.revision, nil, []api.Event{farewell()})
	}
	was := r.mark
	events := advance(s.now())
	if r.known && r.mark == was {
		return nil
	}
	return s.tellOf(ctx, term, r.key, r.revision, r.mark, events)
}

// tellOf commits events with the mark that says that they were written. A nil
// mark removes it.
func (s *Service) tellOf(ctx context.Context, term uint64, key string, revision uint64, mark any, events []api.Event) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	tx := &configdb.Txn{Actor: Actor}
	tx.RequireTerm(term)
	tx.RequireRevision(key, revision)
	if mark == nil {
		tx.Delete(key)
	} else {
		b, err := json.Marshal(mark)
		if err != nil {
			return err
		}
		tx.Put(key, b)
	}
	for i := range events {
		if err := configdb.PutEvent(tx, &events[i]); err != nil {
			return err
		}
	}
	_, err := s.db.Txn(ctx, tx)
	return err
}

// nodeLook is a node with its mark, as of one view.
type nodeLook struct {
	record[nodeMark]
	node api.Node
}

func readNode(v *configdb.View, id string) (*nodeLook, error) {
	r, err := readRecord[nodeMark](v, api.KindNode, id)
	if err != nil {
		return nil, err
	}
	l := &nodeLook{record: r}
	l.node, err = configdb.Nodes.Get(v, id)
	l.gone = api.CodeOf(err) == api.CodeNotFound
	return l, api.IgnoreNotFound(err)
}

func (s *Service) lookNode(ctx context.Context, term uint64, id string) error {
	l, err := readNode(s.db.Local(), id)
	if err != nil {
		return err
	}
	err = step(ctx, s, term, &l.record, l.advance, func() api.Event {
		return api.NewEvent("node.removed", api.SeverityInfo, api.KindNode, api.Meta{ID: id, Name: l.mark.Name}, "node "+l.mark.Name+" was removed from the cluster", s.now())
	})
	if err == nil {
		s.knowNode(l)
		s.kicked()
	}
	return err
}

// advance moves the mark to what the node is now, and says what happened.
func (l *nodeLook) advance(now time.Time) []api.Event {
	was, st := l.mark, &l.node.Status
	out, why := outOf(st)
	next := nodeMark{Name: l.node.Meta.Name, Phase: st.Phase, BootID: st.BootID, Out: strings.Join(out, ","), CutOff: st.CutOff != nil}
	if st.LostAt != nil {
		next.LostAt = st.LostAt.UTC()
	}
	l.mark = next
	var events []api.Event
	add := func(typ string, sev api.Severity, format string, args ...any) {
		e := api.NewEvent(typ, sev, api.KindNode, l.node.Meta, fmt.Sprintf(format, args...), now)
		e.Spec.Node = l.node.Meta.Name
		events = append(events, e)
	}
	name := l.node.Meta.Name
	lostAnew := !next.LostAt.IsZero() && !next.LostAt.Equal(was.LostAt)
	if lostAnew {
		add("node.lost", api.SeverityCritical, "node %s was declared lost: %s", name, first(st.Message, "no lease was renewed"))
	}
	switch {
	case next.Phase == api.NodeReady && (was.Phase == api.NodeLost || lostAnew):
		add("node.ready", api.SeverityInfo, "node %s is back", name)
	case next.Phase == api.NodeReady && was.Phase != api.NodeReady:
		add("node.ready", api.SeverityInfo, "node %s is ready", name)
	case next.Phase == api.NodeLeaving && was.Phase != api.NodeLeaving:
		add("node.leaving", api.SeverityInfo, "node %s is leaving the cluster", name)
	}
	if was.BootID != "" && next.BootID != "" && was.BootID != next.BootID {
		add("node.restarted", api.SeverityInfo, "the daemon of node %s was started anew (version %s)", name, first(st.Version, "unknown"))
	}
	switch {
	case next.CutOff && !was.CutOff:
		what := "it hears some of the other nodes"
		if st.CutOff.Isolated {
			what = "it hears no other node"
		}
		add("node.cut-off", api.SeverityCritical, "the network does not reach node %s (%s); its VMs run on, since its lease goes on by notes in pools", name, what)
	case was.CutOff && !next.CutOff && next.Phase == api.NodeReady:
		add("node.connected", api.SeverityInfo, "the network reaches node %s again", name)
	}
	before := strings.Split(was.Out, ",")
	for _, pool := range out {
		if !slices.Contains(before, pool) {
			add("node.locked-out", api.SeverityCritical, "node %s is locked out of pool %s (%s); its VMs with a storage guard are restarted elsewhere", name, pool, why[pool])
		}
	}
	for _, pool := range before {
		if pool != "" && !slices.Contains(out, pool) {
			add("node.let-in", api.SeverityInfo, "node %s is not locked out of pool %s any more", name, pool)
		}
	}
	return events
}

// outOf are the pools that a node is certainly locked out of, sorted, and why.
func outOf(st *api.NodeStatus) (pools []string, why map[string]string) {
	why = map[string]string{}
	for i := range st.StorageFences {
		if f := &st.StorageFences[i]; f.InForceAt != nil {
			pools, why[f.Pool] = append(pools, f.Pool), f.Reason
		}
	}
	slices.Sort(pools)
	return pools, why
}

func first(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
