// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"fmt"
	"strings"
	"time"
)

// QuorumLoss is what a node knows while it reaches no majority of the voters.
type QuorumLoss struct {
	// Since is when the node last asked a leader that answered for a majority: what
	// it shows is from then. If it heard none in this life of its daemon (Unheard),
	// it is when the daemon was started.
	Since   time.Time `json:"since"`
	Unheard bool      `json:"unheard,omitempty"`
	// Voters of the cluster, and how many of them a quorum takes. Reachable are
	// those that this node hears by gossip, itself included: a hint.
	Voters    int `json:"voters"`
	Needed    int `json:"needed"`
	Reachable int `json:"reachable"`
	// Missing are the voters that it does not hear.
	Missing []MissingVoter `json:"missing"`
	// LeaseHeld: the node still has its lease (the last seconds of it, or by its
	// note in a shared pool), so that its protected VMs run.
	LeaseHeld bool `json:"leaseHeld"`
	// Guests are the VMs that ran on this node, as it knows.
	Guests []LostGuest `json:"guests"`
	// Banner says it in one line; Next is what to do, in this order.
	Banner string   `json:"banner"`
	Next   []string `json:"next"`
}

// MissingVoter is a voter that a node without quorum does not hear.
type MissingVoter struct {
	Node    string   `json:"node"`
	Address string   `json:"address"`
	Role    NodeRole `json:"role,omitempty"`
	// State is what gossip says of it.
	State GossipState `json:"state" enum:"unknown,alive,suspect,dead,left"`
}

// LostOutcome is what becomes of a VM on a node without quorum.
type LostOutcome string

// The outcomes.
const (
	// LostRunsOn: nothing ends it.
	LostRunsOn LostOutcome = "runs-on"
	// LostWithLease: the guard ends it when the lease of the node ends.
	LostWithLease LostOutcome = "ends-with-lease"
	// LostEnded: the lease is over, the guard has ended it.
	LostEnded LostOutcome = "ended"
)

// LostGuest is one VM of a node without quorum.
type LostGuest struct {
	VM      string      `json:"vm"`
	Project string      `json:"project"`
	Outcome LostOutcome `json:"outcome" enum:"runs-on,ends-with-lease,ended"`
	Why     string      `json:"why"`
}

// Judge says what becomes of a VM that runs under a binding while its node has no
// quorum.
func (g *LostGuest) Judge(b *BindingSpec, leaseHeld bool) {
	switch {
	case !b.Protected:
		g.Outcome, g.Why = LostRunsOn, "not protected (--ha none)"
	case len(b.Guarding()) > 0:
		g.Outcome, g.Why = LostRunsOn, "its storage guard locks this node out before it starts elsewhere"
	case leaseHeld:
		g.Outcome, g.Why = LostWithLease, "protected (--ha restart): another node may start it afterwards"
	default:
		g.Outcome, g.Why = LostEnded, "protected (--ha restart), and the lease of this node is over"
	}
}

// Describe fills in Banner and Next, for a node of a name, role and data directory. What it says
// changes only when the loss itself does.
func (l *QuorumLoss) Describe(node string, role NodeRole, dataDir string) {
	var names, addresses []string
	for _, m := range l.Missing {
		names = append(names, m.Node)
		addresses = append(addresses, fmt.Sprintf("%s (%s)", m.Node, m.Address))
	}
	who := fmt.Sprintf("%d of %d voters reachable, %d needed", l.Reachable, l.Voters, l.Needed)
	if len(names) > 0 {
		who += ", missing " + strings.Join(names, ", ")
	}
	l.Banner = fmt.Sprintf("no quorum at node %s since %s: %s; what is shown is that old, changes and starts are refused; see: muster cluster status", node, l.Since.UTC().Format("2006-01-02 15:04:05 UTC"), who)
	if l.Reachable >= l.Needed {
		l.Next = []string{"enough voters are reachable: wait for the election of a leader; if none comes, see the daemon's log on each of them"}
		return
	}
	l.Next = []string{fmt.Sprintf("start %d of the missing voters, or repair the network to them: %s", l.Needed-l.Reachable, strings.Join(addresses, ", "))}
	if role == RoleWitness {
		l.Next = append(l.Next, "only if they are lost for good: this node is a witness and can run no VM; take what it has with: muster cluster backup --stale FILE, and restore it on another host")
		return
	}
	l.Next = append(l.Next, fmt.Sprintf("only if they are lost for good, and every other host is switched off: on %s, muster cluster recover --data-dir %s; it shows what it costs (what other nodes acknowledged after this node's log ends is lost; the VMs of other nodes are bound to this one, stopped) and asks before it does anything", node, dataDir))
}
