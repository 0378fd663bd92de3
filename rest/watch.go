// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Event is one message of a watch.
type Event struct {
	// Type is put, delete, synced or relist.
	Type string   `json:"type" enum:"put,delete,synced,relist"`
	Kind api.Kind `json:"kind,omitempty"`
	// ID of a deleted object.
	ID string `json:"id,omitempty"`
	// Object as it is now, for put.
	Object any `json:"object,omitempty"`
	// Revision to resume from: everything up to it has been delivered. Of
	// changes that were made together only the last carries their revision, so
	// that no stop in between can lose one.
	Revision uint64 `json:"revision"`
}

// eventSink delivers events to one client. send fails when the client is gone
// or reads too slowly; it never queues.
type eventSink interface {
	send(ctx context.Context, e Event) error
	ping(ctx context.Context) error
}

// watcher is one watch.
type watcher struct {
	q     *request
	kinds map[api.Kind]kindReader
	sink  eventSink
	at    uint64 // everything up to here was delivered
	// pinged is when the client was last looked after.
	pinged time.Time
}

// watchKinds reads ?kinds=.
func (q *request) watchKinds() (map[api.Kind]kindReader, error) {
	out := map[api.Kind]kindReader{}
	text := q.param("kinds")
	if text == "" {
		for k, rs := range q.s.kinds {
			if q.who.may(rs.access()) {
				out[k] = rs
			}
		}
		return out, nil
	}
	for name := range strings.SplitSeq(text, ",") {
		rs := q.s.kinds[api.Kind(name)]
		if rs == nil {
			return nil, api.Invalid("kinds", "%q is not a kind; choose from %s", clip(name), strings.Join(q.s.kindNames(), ", "))
		}
		if !q.who.may(rs.access()) {
			return nil, api.Errorf(api.CodeForbidden, "watching %s needs the role %s", api.Kind(name).Plural(), roleFor(rs.access()))
		}
		out[api.Kind(name)] = rs
	}
	return out, nil
}

func (s *Server) kindNames() []string {
	var out []string
	for k := range s.kinds {
		out = append(out, string(k))
	}
	slices.Sort(out)
	return out
}

// watch answers GET /watch.
func watch(q *request) error {
	kinds, err := q.watchKinds()
	if err != nil {
		return err
	}
	since, err := q.since()
	if err != nil {
		return err
	}
	if !q.s.watches.tryAcquire() {
		return api.Errorf(api.CodeRefused, "%d watches are open on node %s; close one or ask another node", maxWatches, q.s.cfg.Node())
	}
	defer q.s.watches.release()
	w := &watcher{q: q, kinds: kinds, at: since, pinged: time.Now()}
	if !wantsWebSocket(q.r) {
		if !strings.Contains(q.r.Header.Get("Accept"), "text/event-stream") {
			return api.Invalid("Accept", "send Accept: text/event-stream, or open a WebSocket")
		}
		return w.serveSSE()
	}
	return w.serveWebSocket()
}

// since reads where to resume: ?since, or what a browser's EventSource sends.
func (q *request) since() (uint64, error) {
	name, text := "since", q.param("since")
	if id := q.r.Header.Get("Last-Event-ID"); id != "" {
		name, text = "Last-Event-ID", id
	}
	if text == "" {
		return 0, nil
	}
	rev, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, api.Invalid(name, "%q is not a revision", clip(text))
	}
	return rev, nil
}

// run delivers until the context ends or the client is gone.
func (w *watcher) run(ctx context.Context) error {
	cw, err := w.begin(ctx)
	if err != nil {
		return err
	}
	for {
		b, err := w.next(ctx, cw)
		switch {
		case errors.Is(err, configdb.ErrCompacted):
			if cw, err = w.relist(ctx); err != nil {
				return err
			}
			continue
		case err != nil:
			return err
		}
		if err := w.deliver(ctx, b); err != nil {
			return err
		}
	}
}

// begin delivers the set, or what was missed since the revision to resume
// from, and the synced mark.
func (w *watcher) begin(ctx context.Context) (*configdb.Watch, error) {
	if w.at == 0 {
		return w.list(ctx)
	}
	known, err := w.known(ctx)
	if err != nil {
		return nil, err
	}
	if !known {
		return w.relist(ctx)
	}
	cw := w.q.db.Watch(configdb.Root, w.at)
	b, err := poll(ctx, cw)
	if errors.Is(err, configdb.ErrCompacted) {
		return w.relist(ctx)
	}
	if err != nil {
		return nil, err
	}
	if err := w.deliver(ctx, b); err != nil {
		return nil, err
	}
	return cw, w.sink.send(ctx, Event{Type: "synced", Revision: w.at})
}

// known waits until this replica has the revision that the client has seen, and
// reports whether there is such a revision: if the cluster does not know it, it is
// not of this cluster's life. As long as nobody can tell, as on a node that began
// a moment ago, the client waits: what this replica has would take it back.
func (w *watcher) known(ctx context.Context) (bool, error) {
	for w.at > w.q.db.Local().Revision() {
		fresh, err := w.q.freshView(readTimeout) //nolint:contextcheck // bounded by the request's
		if err == nil {
			return w.at <= fresh.Revision(), nil
		}
		if err := w.attend(ctx); err != nil {
			return false, err
		}
		soon, cancel := context.WithTimeout(ctx, askAgain)
		_, _ = w.q.db.WaitRevision(soon, w.at) // the loop looks
		cancel()
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
	}
	return true, nil
}

// poll returns the changes that are there already, perhaps none.
func poll(ctx context.Context, cw *configdb.Watch) (configdb.Batch, error) {
	over, cancel := context.WithCancel(ctx)
	cancel()
	b, err := cw.Next(over)
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	return b, err
}

// relist tells the client to forget what it has, and begins anew.
func (w *watcher) relist(ctx context.Context) (*configdb.Watch, error) {
	if err := w.sink.send(ctx, Event{Type: "relist"}); err != nil {
		return nil, err
	}
	w.at = 0
	return w.list(ctx)
}

// identifiers returns all objects and the revision at which these are all.
func (w *watcher) identifiers() ([]idRevision, uint64) {
	v := w.q.db.Local()
	var all []idRevision
	for _, rs := range w.kinds {
		all = append(all, rs.ids(v)...)
	}
	return all, v.Revision()
}

// list delivers the whole set in order of revision. It holds identifiers only;
// objects are read and encoded one by one, as the client takes them. One that
// changed meanwhile is sent as it is now and, with its revision, once more; the
// deletion of one that is gone follows by itself.
func (w *watcher) list(ctx context.Context) (*configdb.Watch, error) {
	all, begun := w.identifiers()
	slices.SortStableFunc(all, func(a, b idRevision) int {
		switch {
		case a.revision != b.revision:
			return compare(a.revision, b.revision)
		case a.kind != b.kind:
			return strings.Compare(string(a.kind), string(b.kind))
		}
		return strings.Compare(a.id, b.id)
	})
	for i, it := range all {
		resume := it.revision
		if i+1 < len(all) && all[i+1].revision == it.revision {
			resume--
		}
		if err := w.put(ctx, it.kind, it.id, resume); err != nil {
			return nil, err
		}
	}
	w.at = begun
	return w.q.db.Watch(configdb.Root, w.at), w.sink.send(ctx, Event{Type: "synced", Revision: w.at})
}

func compare(a, b uint64) int {
	if a < b {
		return -1
	}
	return 1
}

// put sends an object if it is there; if not, its deletion follows by itself. It
// keeps no view while the client takes the object: that would keep all that was
// replaced since.
func (w *watcher) put(ctx context.Context, kind api.Kind, id string, resume uint64) error {
	o, err := w.kinds[kind].object(w.q.db.Local(), id)
	if err == nil {
		return w.sink.send(ctx, Event{Type: "put", Kind: kind, Object: o, Revision: resume})
	}
	if api.CodeOf(err) != api.CodeNotFound {
		// One value that cannot be read must not end the watch.
		w.q.s.log.Error("object left out of a watch", "kind", kind, "id", id, "err", err)
	}
	return nil
}

// touch is one object that a batch changed.
type touch struct {
	kind     api.Kind
	id       string
	deleted  bool
	revision uint64 // 0 for a deletion, whose exact revision is not known
	resume   uint64
}

// deliver sends a batch.
func (w *watcher) deliver(ctx context.Context, b configdb.Batch) error {
	touched := w.touches(b)
	resumePoints(touched, w.at, b.Revision)
	return w.tell(ctx, touched, b.Revision)
}

// tell sends what a batch touched. The batch itself, which holds the values, is
// over by then: the client may take long.
func (w *watcher) tell(ctx context.Context, touched []touch, upTo uint64) error {
	for _, t := range touched {
		var err error
		if t.deleted {
			err = w.sink.send(ctx, Event{Type: "delete", Kind: t.kind, ID: t.id, Revision: t.resume})
		} else {
			err = w.put(ctx, t.kind, t.id, t.resume)
		}
		if err != nil {
			return err
		}
	}
	w.at = max(w.at, upTo)
	return nil
}

// touches maps the changed keys to objects, each once, where it changed last.
func (w *watcher) touches(b configdb.Batch) []touch {
	type key struct {
		kind api.Kind
		id   string
	}
	last := map[key]int{}
	var out []touch
	for _, c := range b.Changes {
		for kind, rs := range w.kinds {
			id, deletes, ok := rs.idOf(c.Key)
			if !ok {
				continue
			}
			t := touch{kind: kind, id: id, revision: c.Revision}
			if c.Deleted {
				t.revision = 0
				t.deleted = deletes
			}
			k := key{kind, id}
			if i, seen := last[k]; seen {
				t.deleted = t.deleted || out[i].deleted
				out[i].id = ""
			}
			last[k] = len(out)
			out = append(out, t)
		}
	}
	return slices.DeleteFunc(out, func(t touch) bool { return t.id == "" })
}

// resumePoints gives each event the highest revision up to which everything
// has been delivered once it is. The events are in the order of their
// revisions, of which those of deletions are not known.
func resumePoints(list []touch, before, end uint64) {
	bound := end
	for i := len(list) - 1; i >= 0; i-- {
		list[i].resume = max(before, bound)
		from := list[i].revision
		if from == 0 { // not earlier than the change before it
			from = before + 1
			for j := i - 1; j >= 0; j-- {
				if list[j].revision > 0 {
					from = list[j].revision
					break
				}
			}
		}
		bound = min(bound, from-1)
	}
}
