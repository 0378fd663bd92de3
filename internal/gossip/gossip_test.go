// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package gossip

import (
	"fmt"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
)

func TestMembersSeeEachOtherAndTheirLoad(t *testing.T) {
	f := newFlock(t, 3)
	for i, m := range f.nodes {
		m.load.Store(uint64(i + 7))
	}
	f.up()
	for _, m := range f.nodes {
		for _, o := range f.nodes {
			f.eventually(15*time.Second, "the load of "+o.id+" is known at "+m.id, func() error {
				p := m.peer(o)
				if !p.Known || p.Summary.VMs != o.load.Load() || p.Summary.Version != "0.1" || p.Summary.CPUPercent != 1.5 {
					return fmt.Errorf("it is %+v", p)
				}
				if p.SummaryAge < 0 || p.SummaryAge > 15*time.Second {
					return fmt.Errorf("its age is %v", p.SummaryAge)
				}
				return nil
			})
		}
		if p := m.peer(m); !p.Self || p.State != api.GossipAlive {
			t.Errorf("%s of itself: %+v", m.id, p)
		}
	}
	// A newer summary replaces the older one.
	f.nodes[0].load.Store(99)
	f.eventually(2*summaryInterval+2*time.Second, "the newer load of node-1 is known", func() error {
		if got := f.nodes[2].peer(f.nodes[0]).Summary.VMs; got != 99 {
			return fmt.Errorf("it is %d", got)
		}
		return nil
	})
}
