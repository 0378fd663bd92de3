// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/agent"
	"github.com/muster-vm/muster/internal/access"
	"github.com/muster-vm/muster/internal/contain"
)

// Times and limits of the looks at guest agents.
const (
	// agentTick is how often is looked which agents are due; it asks nobody.
	agentTick = 10 * time.Second
	// agentPause is the least time between two rounds: a guest may open and close its
	// channel as often as it likes.
	agentPause = 100 * time.Millisecond
	// agentChecks is how many agents are asked at once, and again how many of those
	// that did not answer in time before: these wait for each other, not others for them.
	agentChecks = 4
	// agentBeats is how often an agent is asked within the time after which it
	// counts as silent.
	agentBeats = 4
	// agentQuick bounds the look at an agent that has answered in time so far,
	// agentLook at one that has not.
	agentQuick = 5 * time.Second
	agentLook  = 30 * time.Second
	// summaryInterval is the least time between two changes of the status for
	// what one guest says.
	summaryInterval = time.Minute
	// agentChardev is the channel's name in the argument vector, agentPort that
	// of its device.
	agentChardev = "ga0"
	agentPort    = "agent0"
)

// openAgent returns the agent of an instance, which is made with the first call
// after QEMU was attached.
func (h *Hypervisor) openAgent(in *instance) *agent.Agent {
	in.mu.Lock()
	a := in.agent
	in.mu.Unlock()
	if a != nil {
		return a
	}
	name := in.id
	if vm, err := configdb.VMs.Get(h.cfg.DB.Local(), in.id); err == nil {
		name = vm.Meta.Name
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.conn == nil {
		return nil
	}
	if in.agent == nil {
		path := h.pathsOf(in.id).agent
		in.agent = agent.New(agent.Config{
			VM: name, Log: h.log, Now: h.cfg.Now, Changed: func() { h.loop.Enqueue(in.id) },
			// The directory is the VM's: another socket there may lead to the agent of
			// another guest, who would be told this one's passwords.
			Dial: func(ctx context.Context) (net.Conn, error) { return access.Dial(ctx, path, in.ownPID()) },
		})
	}
	return in.agent
}

// portChanged takes note of QMP's VSERPORT_CHANGE (QAPI char.json): a program in
// the guest opened or closed a channel.
func (h *Hypervisor) portChanged(in *instance, data map[string]any) {
	if id, _ := data["id"].(string); id != agentPort {
		return
	}
	open, _ := data["open"].(bool)
	in.mu.Lock()
	in.portKnown, in.portNews = true, in.portNews+1
	in.mu.Unlock()
	if a := h.openAgent(in); a != nil {
		a.SetOpen(open)
		h.lookAtAgents()
	}
}

// lookAtAgents makes the next look come at once.
func (h *Hypervisor) lookAtAgents() {
	select {
	case h.agentWake <- struct{}{}:
	default:
	}
}

// watchAgents asks each agent what it knows, every agent.CheckInterval, and
// seldom those that do not answer. A guest without an agent is not asked.
func (h *Hypervisor) watchAgents(ctx context.Context) {
	lanes := newAgentLanes()
	defer lanes.work.Wait()
	t := time.NewTicker(agentTick)
	defer t.Stop()
	for {
		h.checkAgents(ctx, lanes)
		if pause(ctx, agentPause) != nil {
			return
		}
		select {
		case <-t.C:
		case <-h.agentWake:
		case <-ctx.Done():
			return
		}
	}
}

// agentLanes are the places of those who ask agents.
type agentLanes struct {
	work        sync.WaitGroup
	quick, slow chan struct{}
	left        atomic.Bool // somebody found no place
}

func newAgentLanes() *agentLanes {
	return &agentLanes{quick: make(chan struct{}, agentChecks), slow: make(chan struct{}, agentChecks)}
}

// checkAgents begins to look at the agents that are due, as far as there are places.
func (h *Hypervisor) checkAgents(ctx context.Context, lanes *agentLanes) {
	h.mu.Lock()
	all := slices.Collect(maps.Values(h.instances))
	h.mu.Unlock()
	for _, in := range all {
		if in.openConn() == nil {
			continue
		}
		a := h.openAgent(in)
		if a == nil || in.knowsPort() && !a.Due() && !in.beatDue(a) || !in.asking.CompareAndSwap(false, true) {
			continue
		}
		places, within := lanes.quick, agentQuick
		if in.slowAgent.Load() {
			places, within = lanes.slow, agentLook
		}
		select {
		case places <- struct{}{}:
		default: // its turn comes when one of the others is done
			in.asking.Store(false)
			lanes.left.Store(true)
			continue
		}
		lanes.work.Add(1)
		go func() {
			defer lanes.work.Done()
			if err := contain.Do(func() { h.checkAgent(ctx, in, a, within) }); err != nil {
				h.log.Error("a guest agent is not looked at", "vm", in.id, "err", err)
			}
			<-places
			in.asking.Store(false)
			if lanes.left.Swap(false) {
				h.lookAtAgents()
			}
		}()
	}
}

func (in *instance) knowsPort() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.portKnown
}

// checkAgent looks at one agent. After QEMU was attached it first asks whether
// there is one (QAPI query-chardev): events tell only of changes.
func (h *Hypervisor) checkAgent(ctx context.Context, in *instance, a *agent.Agent, within time.Duration) {
	if !in.knowsPort() {
		in.mu.Lock()
		news := in.portNews
		in.mu.Unlock()
		var list []struct {
			Label string `json:"label"`
			Open  bool   `json:"frontend-open"`
		}
		if err := in.command(ctx, "query-chardev", &list); err != nil {
			return // QEMU does not answer, or ends
		}
		in.mu.Lock()
		if in.portNews == news { // else the event knows better
			in.portKnown = true
			for _, c := range list {
				if c.Label == agentChardev {
					a.SetOpen(c.Open)
				}
			}
		}
		in.mu.Unlock()
	}
	began := time.Now()
	actx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	if !a.Due() {
		h.beat(actx, in, a)
		in.slowAgent.Store(time.Since(began) > agentQuick)
		return
	}
	err := a.Check(actx)
	in.slowAgent.Store(err != nil || time.Since(began) > agentQuick)
	if err != nil && ctx.Err() == nil {
		h.log.Debug("guest agent", "vm", in.id, "err", err)
	}
}

// beatDue reports whether an agent whose silence counts has to be asked.
func (in *instance) beatDue(a *agent.Agent) bool {
	limit := time.Duration(in.beat.Load())
	return limit > 0 && a.BeatDue(min(limit/agentBeats, agent.CheckInterval))
}

// beat asks the agent whether it is there. The look at the VM draws the
// conclusions.
func (h *Hypervisor) beat(ctx context.Context, in *instance, a *agent.Agent) {
	if !in.beatDue(a) {
		return
	}
	if err := a.Beat(ctx); err != nil && ctx.Err() == nil {
		h.log.Debug("guest agent", "vm", in.id, "err", err)
		h.loop.Enqueue(in.id)
	}
}

// restAgent lets its silence count from now on: the guest stood still.
func (in *instance) restAgent() {
	if a := in.knownAgent(); a != nil {
		a.Rest()
	}
}

// agentSummary writes what a guest says of itself into the status: when it
// changed, and not more often than every summaryInterval.
func (s *step) agentSummary() {
	s.in.mu.Lock()
	a := s.in.agent
	s.in.mu.Unlock()
	if a == nil {
		return
	}
	now := a.Summary()
	if now == nil || sameAgent(now, s.vm.Status.Agent) {
		return // an agent that is away for a while need not be forgotten
	}
	if wait := s.in.summaryAt.Add(summaryInterval).Sub(s.now); wait > 0 && s.vm.Status.Agent != nil {
		if s.result.After == 0 || s.result.After > wait {
			s.result.After = wait
		}
		return
	}
	s.in.summaryAt, s.vm.Status.Agent = s.now, now
}

func sameAgent(a, b *api.VMAgent) bool {
	return b != nil && a.Version == b.Version && a.Hostname == b.Hostname && a.OS == b.OS && slices.Equal(a.Addresses, b.Addresses)
}

// GuestAgent returns the agent of a VM that runs on this node.
func (h *Hypervisor) GuestAgent(vmID string) (*agent.Agent, error) {
	in, name, err := h.runningInstance(vmID, "guest agent")
	if err != nil {
		return nil, err
	}
	a := h.openAgent(in)
	if a == nil {
		return nil, api.Errorf(api.CodeRefused, "vm %s has stopped", name)
	}
	return a, nil
}

// Freeze stops the writes to a VM's file systems for at most a time, through its
// guest agent, and returns how many file systems there are. Without an agent it
// fails with api.CodeRefused or api.CodeUnsupported and nothing is frozen.
func (h *Hypervisor) Freeze(ctx context.Context, vmID string, most time.Duration) (int, error) {
	a, err := h.GuestAgent(vmID)
	if err != nil {
		return 0, err
	}
	n, _, err := a.Freeze(ctx, most)
	return n, err
}

// Thaw ends a Freeze.
func (h *Hypervisor) Thaw(ctx context.Context, vmID string) error {
	a, err := h.GuestAgent(vmID)
	if err != nil {
		return err
	}
	_, err = a.Thaw(ctx)
	return err
}
