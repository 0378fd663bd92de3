// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/ha"
)

func (m *member) newOutlook() *ha.Outlook {
	return ha.NewOutlook(ha.OutlookConfig{DB: m.store, Placer: recoveryPlacer{}, Voters: m.voters, Node: m.info.Node, Log: m.log.With("module", "ha")})
}

// voters are the members that vote, as ha sees them.
func (m *member) voters() ([]ha.Voter, error) {
	members, err := m.store.Members()
	if err != nil {
		return nil, err
	}
	leader, _, _ := m.store.Leader()
	var out []ha.Voter
	for _, mb := range members {
		if mb.Voter {
			out = append(out, ha.Voter{NodeID: mb.NodeID, Leader: mb.NodeID == leader})
		}
	}
	return out, nil
}

// haOf is the outlook of this node as rest sees it.
type haOf struct{ d *Daemon }

// Status implements rest.HA.
func (o haOf) Status(ctx context.Context) (*api.HAStatus, error) {
	m := o.d.current()
	if m == nil {
		return nil, notMember()
	}
	return m.outlook.Status(ctx)
}

// Simulate implements rest.HA.
func (o haOf) Simulate(ctx context.Context, kill []string) (*api.HALoss, error) {
	m := o.d.current()
	if m == nil {
		return nil, notMember()
	}
	return m.outlook.Simulate(ctx, kill)
}

// Admit implements rest.HA.
func (o haOf) Admit(before, after *configdb.View) (string, error) {
	m := o.d.current()
	if m == nil {
		return "", notMember()
	}
	return m.outlook.Admit(before, after)
}

// Promise implements rest.HA.
func (o haOf) Promise() (api.HAAdmission, time.Duration, bool) {
	m := o.d.current()
	if m == nil {
		return api.HAAdmission{}, 0, false
	}
	return m.outlook.Promise()
}
