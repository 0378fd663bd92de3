// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/muster-vm/muster/internal/torture"
	"github.com/muster-vm/muster/internal/torture/lab"
)

// Limits of a watch.
const (
	watchLine  = 4 << 20
	watchRetry = 200 * time.Millisecond
)

// watcher follows one node over all its restarts.
type watcher struct {
	node int
	name string
	rest *lab.Caller

	mu     sync.Mutex
	seen   []torture.Seen
	since  uint64
	conns  int
	synced bool // the first set is complete
}

// run reads until the context ends.
func (w *watcher) run(ctx context.Context) {
	for ctx.Err() == nil {
		_ = w.connect(ctx) // the end of a connection is part of the plan
		select {
		case <-time.After(watchRetry):
		case <-ctx.Done():
		}
	}
}

func (w *watcher) connect(ctx context.Context) error {
	path := "/watch?kinds=" + torture.WatchedRule + "," + torture.WatchedEvent
	w.mu.Lock()
	since := w.since
	w.mu.Unlock()
	if since > 0 {
		path += fmt.Sprintf("&since=%d", since)
	}
	req, err := w.rest.New(ctx, w.node, lab.Request{Method: http.MethodGet, Path: path, Header: map[string]string{"Accept": "text/event-stream"}})
	if err != nil {
		return err
	}
	resp, err := w.rest.HTTP().Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("status %d", resp.StatusCode)
	}
	w.mu.Lock()
	conn := w.conns
	w.conns++
	w.mu.Unlock()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, watchLine)
	for lines.Scan() {
		data, ok := strings.CutPrefix(lines.Text(), "data: ")
		if !ok {
			continue
		}
		if err := w.note(conn, since, []byte(data)); err != nil {
			return err
		}
	}
	return lines.Err()
}

// message is one event of the API.
type message struct {
	Type, Kind, ID string
	Revision       uint64
	Object         struct {
		Meta struct {
			ID, Name string
			Labels   map[string]string
			Revision uint64
		}
		Spec struct{ TargetKind, TargetID, Target string }
	}
}

func (w *watcher) note(conn int, since uint64, data []byte) error {
	var m message
	if err := json.Unmarshal(data, &m); err != nil {
		return err
	}
	s := torture.Seen{Conn: conn, Since: since, Type: m.Type, Kind: m.Kind, ID: m.ID, Resume: m.Revision}
	if m.Type == "put" {
		s.ID, s.Revision = m.Object.Meta.ID, m.Object.Meta.Revision
		s.Target, s.Value = m.Object.Meta.Name, m.Object.Meta.Labels[ruleLabel]
		if m.Kind == torture.WatchedEvent {
			s.Target, s.Value = m.Object.Spec.Target, ""
			if m.Object.Spec.TargetKind == "raw" {
				s.Target = m.Object.Spec.TargetID
			}
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch m.Type {
	case "relist":
		w.synced, w.since = false, 0
	case "synced":
		w.synced = true
	}
	// Within a set that is coming in, only its end is a place to resume from.
	if w.synced {
		w.since = max(w.since, m.Revision)
	}
	// Objects that are not the campaign's own are of no interest.
	if m.Type == "put" && m.Kind == torture.WatchedRule && !strings.HasPrefix(s.Target, torture.RulePrefix) {
		return nil
	}
	w.seen = append(w.seen, s)
	return nil
}

// sees reports whether an object with a value was delivered.
func (w *watcher) sees(register, value string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := len(w.seen) - 1; i >= 0; i-- {
		if w.seen[i].Target == register && w.seen[i].Value == value {
			return true
		}
	}
	return false
}

func (w *watcher) all() []torture.Seen {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]torture.Seen(nil), w.seen...)
}
