// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// MethodRenew is the call by which a node asks the leader for its lease.
const MethodRenew = "ha.renew"

// Leader is what ha needs to know of the leadership of this node.
type Leader interface {
	// Leadership returns the current one, if this node leads.
	Leadership() (configdb.Leadership, bool)
	// Confirm returns nil if a majority confirmed the leadership of that term
	// in a round trip begun after the call.
	Confirm(ctx context.Context, term uint64) error
	// LastConfirmed returns when, at the latest, an earlier leader was confirmed, or
	// voters said that nobody leads.
	LastConfirmed(ctx context.Context, term uint64) (configdb.Confirmed, error)
}

type renewRequest struct {
	NodeID string `json:"nodeID"`
}

type renewAnswer struct {
	Term     uint64 `json:"term"`
	Revision uint64 `json:"revision"`
}

// refusal is an answer that asks the node to try again later.
type refusal struct{ text string }

func (r refusal) Error() string   { return r.text }
func (r refusal) RPCCode() string { return "lease_refused" }

// grantor is the leader's side of the leases. Its memory belongs to one term.
type grantor struct {
	db     configdb.DB
	leader Leader
	now    func() time.Duration

	mu      sync.Mutex
	term    uint64
	since   time.Duration
	earlier time.Duration            // an earlier leader has granted nothing later; since, until the voters have said more
	former  string                   // the node that led then, if it is known
	looked  time.Duration            // when this leader last looked for silent nodes
	slept   bool                     // it did not for a while
	granted map[string]time.Duration // by node ID
	heard   map[string]time.Duration // when it last asked, whatever it was answered
	wired   map[string]time.Duration // when it last asked over the network
	noted   map[string]time.Duration // when it was last granted a lease through a pool
	barred  map[string]bool          // being declared lost: no grants
	fenced  map[string]bool          // being switched off: no grants
	locking map[string]time.Duration // locked out of pools: when it is next looked at, 0 while it goes on
	words   map[string]string        // what was said of that last
	readmit func(nodeID string)      // tells the service that a lost node is back
}

// enter makes sure that the memory is of this term, and refuses an earlier one:
// a request that was held up since then must not wipe what is remembered now,
// above all not the bar of a node that is being declared lost. The beginning is
// taken as late as now, which only makes the leader wait longer.
func (g *grantor) enter(term uint64) bool {
	if term > g.term {
		g.term, g.since = term, g.now()
		g.earlier, g.former, g.looked, g.slept = g.since, "", g.since, false
		g.forget()
	}
	return term == g.term
}

// forget makes the memory empty.
func (g *grantor) forget() {
	g.granted, g.heard, g.wired, g.noted = map[string]time.Duration{}, map[string]time.Duration{}, map[string]time.Duration{}, map[string]time.Duration{}
	g.barred, g.fenced = map[string]bool{}, map[string]bool{}
	g.locking, g.words = map[string]time.Duration{}, map[string]string{}
}

// renew answers one request; see DESIGN.md for the order of the steps.
func (g *grantor) renew(ctx context.Context, nodeID string) (renewAnswer, error) {
	a, granted, err := g.renewAll(ctx, []string{nodeID})
	if len(granted) == 0 {
		return renewAnswer{}, err
	}
	return a, nil
}

// renewAll answers the requests of some nodes with one confirmation. It returns the one
// answer, to whom it is, and why it is not to the others.
func (g *grantor) renewAll(ctx context.Context, ids []string) (a renewAnswer, granted []string, err error) {
	l, ok := g.leader.Leadership()
	if !ok {
		return renewAnswer{}, nil, refusal{"this node is not the leader"}
	}
	var fit []string
	for _, id := range ids {
		g.hear(l.Term, id)
		if why := g.admissible(l.Term, id); why != nil {
			err = why
			continue
		}
		fit = append(fit, id)
	}
	if len(fit) == 0 {
		return renewAnswer{}, nil, err
	}
	if err := g.leader.Confirm(ctx, l.Term); err != nil {
		return renewAnswer{}, nil, refusal{"leadership is not confirmed: " + err.Error()}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	a.Term = l.Term
	for _, id := range fit {
		v, why := g.check(l.Term, id)
		if why != nil {
			err = why
			continue
		}
		g.granted[id] = g.now()
		a.Revision = v.Revision()
		granted = append(granted, id)
	}
	return a, granted, err
}

func (g *grantor) admissible(term uint64, nodeID string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	_, err := g.check(term, nodeID)
	return err
}

// check is called with the lock held.
func (g *grantor) check(term uint64, nodeID string) (*configdb.View, error) {
	if !g.enter(term) {
		return nil, refusal{"the leadership of that request is over"}
	}
	if g.barred[nodeID] {
		return nil, refusal{"the node is being declared lost"}
	}
	if g.fenced[nodeID] {
		return nil, refusal{"the node is being switched off"}
	}
	v := g.db.Local()
	n, err := configdb.Nodes.Get(v, nodeID)
	if err != nil {
		return nil, refusal{"the node is not a member: " + err.Error()}
	}
	if n.Status.Phase == api.NodeLost || n.Status.Fencing != "" { // a mark of an earlier leader: it lives
		if g.readmit != nil {
			g.readmit(nodeID)
		}
		return nil, refusal{"the node was declared lost, or was to be switched off, and is being readmitted"}
	}
	return v, nil
}

// begin makes the memory that of a term, before anybody asks for silence.
func (g *grantor) begin(term uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.enter(term)
}

// credit notes what the voters remember of the leader of before, heard now. If they do not
// name it they know less than they might: one of them began anew, or nobody led.
func (g *grantor) credit(term uint64, c configdb.Confirmed) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.enter(term) || c.By == "" {
		return
	}
	at := g.now() - (c.Ago - c.Ago*driftPerMille/1000)
	g.earlier = min(g.since, max(at, g.since-maxCredit))
	g.former = c.By
}

// overdue returns the nodes whose every possible lease has ended, and bars
// them from grants until settle. A node is looked at only if it is ready.
func (g *grantor) overdue(term uint64, ready []string) []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.enter(term) {
		return nil
	}
	var out []string
	for _, id := range ready {
		last := max(g.earlier, g.granted[id])
		if !g.barred[id] && g.now()-last > LostAfter {
			g.barred[id] = true
			out = append(out, id)
		}
	}
	return out
}

// welcome counts a node that is about to be readmitted as if it had just been
// granted a lease: its silence from before would else make it overdue at once,
// before its next request can come. Counting later only makes the leader wait.
func (g *grantor) welcome(term uint64, nodeID string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.enter(term) {
		g.granted[nodeID] = g.now()
	}
}

// settle lifts the bar once the outcome of the declaration is known and
// applied on this node.
func (g *grantor) settle(term uint64, nodeID string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.term == term {
		delete(g.barred, nodeID)
	}
}

// silence returns how long ago the node's last lease was granted, at most the
// age of this leadership.
func (g *grantor) silence(nodeID string) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.now() - max(g.since, g.granted[nodeID])
}

// leaseless returns how long the node has had no new lease, of no leader, and what that
// counts from.
func (g *grantor) leaseless(nodeID string) (time.Duration, api.SilenceSince) {
	g.mu.Lock()
	defer g.mu.Unlock()
	last, since := g.granted[nodeID], api.SinceGrant
	if g.earlier >= last {
		last, since = g.earlier, api.SinceEarlier
		if g.earlier == g.since {
			since = api.SinceLeadership
		}
	}
	return g.now() - last, since
}

// onWire notes that a node was heard over the network.
func (g *grantor) onWire(nodeID string) {
	if l, ok := g.leader.Leadership(); ok {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.enter(l.Term) {
			g.wired[nodeID] = g.now()
		}
	}
}

// renewByNotes answers questions that came through pools.
func (g *grantor) renewByNotes(ctx context.Context, ids []string) (renewAnswer, []string, error) {
	a, granted, err := g.renewAll(ctx, ids)
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, id := range granted {
		if g.term == a.Term {
			g.noted[id] = g.now()
		}
	}
	return a, granted, err
}

// offWire returns how long nothing was heard of a node over the network, at most the
// age of this leadership, whether its lease was granted through a pool since, and whether
// the network was ever heard of in this term.
func (g *grantor) offWire(term uint64, nodeID string) (quiet time.Duration, noted, wired bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.enter(term) {
		return 0, false, false
	}
	at, wired := g.wired[nodeID]
	last := max(g.since, at)
	return g.now() - last, g.noted[nodeID] > last, wired
}

// serve is the handler of MethodRenew. caller is the node that proved its
// identity; a node can renew only its own lease.
func (g *grantor) serve(ctx context.Context, caller string, request []byte) ([]byte, error) {
	var r renewRequest
	if err := json.Unmarshal(request, &r); err != nil {
		return nil, fmt.Errorf("malformed request: %w", err)
	}
	if r.NodeID != caller {
		return nil, errors.New("a node can renew only its own lease")
	}
	g.onWire(r.NodeID)
	a, err := g.renew(ctx, r.NodeID)
	if err != nil {
		return nil, err
	}
	return json.Marshal(a)
}
