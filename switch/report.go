// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package vswitch

import (
	"context"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// write stores what was found out, if it is news.
func (p *pass) write(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, WriteDeadline)
	defer cancel()
	v := p.s.cfg.DB.Local()
	tx := &configdb.Txn{Actor: actor}
	if _, err := configdb.Nodes.Get(v, p.s.cfg.NodeID); err != nil {
		return nil // not yet a member, or none any more: nobody to report for
	}
	if len(p.report.Problems) == 0 {
		p.report.Problems = nil
	}
	st, err := configdb.SwitchStates.Get(v, p.s.cfg.NodeID)
	switch {
	case err != nil && api.CodeOf(err) == api.CodeNotFound:
		st = api.SwitchState{Meta: api.NewMeta(api.KindSwitchState, "", p.s.cfg.NodeName), Spec: api.SwitchStateSpec{NodeID: p.s.cfg.NodeID}}
		st.Meta.ID, st.Status = p.s.cfg.NodeID, p.report
		tx.RequireExists(configdb.Nodes.SpecKey(p.s.cfg.NodeID))
		err = configdb.SwitchStates.CreateUnnamed(tx, &st)
	case err == nil:
		st = st.Clone()
		st.Status = p.report
		err = configdb.SwitchStates.UpdateStatus(v, tx, &st)
	}
	if err != nil {
		return err
	}
	if up := p.w.uplink; up != nil {
		if p.state == nil {
			p.uplink = api.UplinkStatus{ObservedGeneration: up.Meta.Generation, Message: p.report.Reason}
		}
		o := up.Clone()
		o.Status = p.uplink
		if err := configdb.Uplinks.UpdateStatus(v, tx, &o); err != nil {
			return err
		}
	}
	if tx.Empty() {
		return nil
	}
	if _, err := p.s.cfg.DB.Txn(ctx, tx); err != nil {
		return err
	}
	p.s.notify()
	return nil
}

// notify wakes those who wait for the switch.
func (s *Switch) notify() {
	if s.cfg.Notify != nil {
		s.cfg.Notify()
	}
}
