// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"fmt"
	"hash/fnv"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/ha/plan"
)

// Limits of the outlook.
const (
	// outlookPause is the shortest time between two looks, outlookShare how many
	// times as long as a look the pause after it is: looks take at most one part
	// in outlookShare+1 of a core, however often the state changes.
	outlookPause = time.Second
	outlookShare = 19
	// maxRefused is how many VMs the promise names.
	maxRefused = 50
)

// Outlook says what would happen if nodes died: what the recovery would do, by
// the same plan. Each node has its own, of its own replica.
type Outlook struct {
	db     configdb.DB
	placer Placer
	voters func() ([]Voter, error)
	node   string
	log    *slog.Logger
	now    func() time.Time

	mu   sync.Mutex // held while it is computed
	last *report
	news chan struct{} // holds a token while there is a report that was not told of
}

// Voter is a member of the configuration database that votes.
type Voter struct {
	NodeID string
	Leader bool
}

// OutlookConfig describes an outlook.
type OutlookConfig struct {
	DB     configdb.DB
	Placer Placer
	// Voters are those of the configuration database.
	Voters func() ([]Voter, error)
	// Node is the name of this one.
	Node string
	Log  *slog.Logger
	Now  func() time.Time // nil: time.Now
}

// NewOutlook returns an outlook that computes nothing until it is asked, or Run.
func NewOutlook(c OutlookConfig) *Outlook {
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Outlook{db: c.DB, placer: c.Placer, voters: c.Voters, node: c.Node, log: c.Log, now: c.Now, news: make(chan struct{}, 1)}
}

// report is one look.
type report struct {
	print    uint64 // of the state that it is true for
	settings api.HASettings
	state    *plan.State
	fleet    plan.Fleet
	voters   []Voter
	singles  map[string]*plan.Plan // by the node that dies
	lost     *plan.Plan            // nil: no VM is on a lost node
	survival *plan.Survival
	at       time.Time
	took     time.Duration
}

func (r *report) voterIDs() (out []string) {
	for _, v := range r.voters {
		out = append(out, v.NodeID)
	}
	return out
}

// Settings are the promises in force.
func Settings(v *configdb.View) api.HASettings {
	var out api.HASettings
	if all, err := configdb.Clusters.List(v); err == nil && len(all) == 1 {
		out = all[0].Spec.HA
	}
	out.SetDefaults()
	return out
}

// relevant are the keys that a plan depends on.
func relevant() []string {
	return []string{
		configdb.Clusters.SpecPrefix(), configdb.Nodes.SpecPrefix(), configdb.Nodes.StatusPrefix(), configdb.Bindings.SpecPrefix(),
		configdb.VMs.SpecPrefix(), configdb.VMs.StatusPrefix(), configdb.Volumes.SpecPrefix(), configdb.Images.SpecPrefix(), configdb.Pools.SpecPrefix(),
		configdb.PoolStates.StatusPrefix(), configdb.SwitchStates.StatusPrefix(), configdb.NodeFacts.StatusPrefix(), configdb.CPUBaselines.SpecPrefix(),
	}
}

// printOf tells states apart in which a plan may differ.
func printOf(v *configdb.View, voters []Voter) uint64 {
	h := fnv.New64a()
	var b [8]byte
	put := func(n uint64) {
		for i := range b {
			b[i] = byte(n >> (8 * i))
		}
		_, _ = h.Write(b[:])
	}
	for _, prefix := range relevant() {
		n := uint64(0)
		for e := range v.Scan(prefix, "") {
			put(e.Revision)
			n++
		}
		put(n)
	}
	for _, m := range voters {
		_, _ = h.Write([]byte(m.NodeID))
		if m.Leader {
			put(1)
		}
	}
	return h.Sum64()
}

// look returns a report that is true for the view, computed now if the last one
// is not.
func (o *Outlook) look(v *configdb.View) (*report, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	voters, err := o.voters()
	if err != nil {
		return nil, err
	}
	print := printOf(v, voters)
	if o.last != nil && o.last.print == print {
		return o.last, nil
	}
	r, err := o.compute(v, voters)
	if err != nil {
		return nil, err
	}
	r.print = print
	o.last = r
	select {
	case o.news <- struct{}{}:
	default:
	}
	return r, nil
}

func (o *Outlook) compute(v *configdb.View, voters []Voter) (*report, error) {
	began := o.now()
	state, err := plan.Read(v)
	if err != nil {
		o.log.Warn("the outlook leaves out what cannot be read", "err", err)
	}
	r := &report{settings: Settings(v), state: state, voters: voters, singles: map[string]*plan.Plan{}, at: began}
	if r.fleet, err = o.placer.Load(state); err != nil {
		return nil, err
	}
	ids := r.voterIDs()
	if state.AnyGone() {
		r.lost = plan.Make(state, r.fleet.Fork(), plan.Options{Voters: ids})
	}
	known := map[string]*plan.Plan{}
	for _, n := range state.Alive() {
		p := plan.Make(state, r.fleet.Fork(), plan.Options{Kill: []string{n.Meta.ID}, Voters: ids})
		r.singles[n.Meta.ID] = p
		if p.Quorum.Kept {
			known[n.Meta.ID] = p
		}
	}
	r.survival = plan.Survive(state, r.fleet, ids, r.settings.Failures, plan.MaxSets, known)
	r.took = o.now().Sub(began)
	return r, nil
}

// Simulate says what would happen if these nodes, by name or ID, died together.
func (o *Outlook) Simulate(ctx context.Context, kill []string) (*api.HALoss, error) {
	v, err := o.db.View(ctx)
	if err != nil {
		return nil, err
	}
	voters, err := o.voters()
	if err != nil {
		return nil, err
	}
	state, err := plan.Read(v)
	if err != nil {
		o.log.Warn("the simulation leaves out what cannot be read", "err", err)
	}
	ids, err := nodesToKill(state, kill)
	if err != nil {
		return nil, err
	}
	fleet, err := o.placer.Load(state)
	if err != nil {
		return nil, err
	}
	r := report{voters: voters}
	return plan.Make(state, fleet, plan.Options{Kill: ids, Voters: r.voterIDs()}).Loss(state), nil
}

// nodesToKill checks what is to be simulated.
func nodesToKill(state *plan.State, names []string) ([]string, error) {
	if len(names) == 0 {
		return nil, api.Invalid("kill", "names no node; give one or more")
	}
	var out []string
	for i, name := range names {
		field := fmt.Sprintf("kill[%d]", i)
		n, err := state.Find(name)
		if err != nil {
			return nil, &api.Error{Code: api.CodeNotFound, Field: field, Detail: fmt.Sprintf("node %q does not exist; muster node ls lists them", name)}
		}
		switch {
		case slices.Contains(out, n.Meta.ID):
			return nil, api.Invalid(field, "names node %s again; give each node once", n.Meta.Name)
		case n.Status.Phase == api.NodeLost:
			return nil, api.Invalid(field, "names node %s, which is lost already; what becomes of its VMs is in every plan", n.Meta.Name)
		}
		out = append(out, n.Meta.ID)
	}
	return out, nil
}

// Status is what would happen now if each node died, and whether the promise can
// be kept.
func (o *Outlook) Status(ctx context.Context) (*api.HAStatus, error) {
	v, err := o.db.View(ctx)
	if err != nil {
		v = o.db.Local() // without a quorum it is all the more worth knowing
	}
	r, err := o.look(v)
	if err != nil {
		return nil, err
	}
	s := r.state
	out := &api.HAStatus{
		Node: o.node, Revision: s.View.Revision(), ComputedAt: r.at.UTC(), Seconds: r.took.Seconds(), Nodes: []api.HANode{},
		Admission: r.admission(), Quorum: plan.Quorum(s, r.voterIDs()), IfQuorumLost: s.IfQuorumLost(),
	}
	votes, leads := map[string]bool{}, ""
	for _, m := range r.voters {
		votes[m.NodeID] = true
		if m.Leader {
			leads = m.NodeID
		}
	}
	if r.lost != nil {
		out.Lost = r.lost.Loss(s)
	}
	protected, unprotected := s.Running()
	for _, n := range s.Nodes {
		id := n.Meta.ID
		node := api.HANode{
			Node: n.Meta.Name, Role: n.Spec.Role, Phase: n.Status.Phase, GuardLevel: n.Status.GuardLevel, Voter: votes[id], Leader: leads == id,
			Protected: protected[id], Unprotected: unprotected[id],
		}
		if p := r.singles[id]; p != nil {
			node.Loss = p.Loss(s)
		}
		if n.Spec.Role == api.RoleWitness && votes[id] {
			out.Witness = n.Meta.Name
		}
		out.Nodes = append(out.Nodes, node)
	}
	slices.SortFunc(out.Nodes, func(a, b api.HANode) int { return strings.Compare(a.Node, b.Node) })
	return out, nil
}

// admission is the promise as people see it.
func (r *report) admission() api.HAAdmission {
	sv := r.survival
	out := api.HAAdmission{HASettings: r.settings, Kept: sv.Kept(), Sets: sv.Sets, OfAll: sv.OfAll}
	var why []string
	if !sv.Quorum.Kept {
		why = append(why, fmt.Sprintf("if %s, %d of %d voters are left and %d are needed, so nothing restarts; add nodes that vote, or a witness",
			die(sv.Failures), sv.Quorum.Left, sv.Quorum.Voters, sv.Quorum.Needed))
	}
	if n := sv.Refused(); n > 0 {
		out.Worst = r.state.Names(sv.Worst.Killed)
		out.RefusedVMs = n
		out.Refused = sv.Worst.RefusedSteps(maxRefused)
		why = append(why, r.missing())
	}
	out.Message = strings.Join(why, "; ")
	return out
}

// missing says which VMs would not restart in the worst case.
func (r *report) missing() string {
	worst := r.survival.Worst
	return fmt.Sprintf("if %s died, %d protected VMs would not restart: %s",
		strings.Join(r.state.Names(worst.Killed), " and "), worst.Refused(), names(worst.RefusedSteps(maxNames+1)))
}

func die(n int) string {
	if n == 1 {
		return "one voter dies"
	}
	return fmt.Sprintf("%d voters die together", n)
}

// maxNames is how many VMs a message names.
const maxNames = 8

func names(steps []api.HAStep) string {
	var out []string
	for i, s := range steps {
		if i == maxNames {
			out = append(out, "…")
			break
		}
		out = append(out, s.VM)
	}
	return strings.Join(out, ", ")
}

// Run keeps the outlook up to date until the context ends.
func (o *Outlook) Run(ctx context.Context) error {
	seen := uint64(0)
	for {
		v := o.db.Local()
		pause := outlookPause
		if v.Revision() != seen {
			seen = v.Revision()
			began := o.now()
			if _, err := o.look(v); err != nil && ctx.Err() == nil {
				o.log.Warn("no outlook on failures", "err", err)
			}
			pause = max(pause, outlookShare*o.now().Sub(began))
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
		if _, err := o.db.WaitRevision(ctx, seen+1); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("follow the state: %w", err)
		}
	}
}

// Promise is the promise as it was found last, and false before that.
func (o *Outlook) Promise() (api.HAAdmission, time.Duration, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.last == nil {
		return api.HAAdmission{}, 0, false
	}
	return o.last.admission(), o.last.took, true
}
