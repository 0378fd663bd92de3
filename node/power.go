// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/internal/power"
)

// powerLabel is what the password of a power device is sealed for.
func powerLabel(deviceID string) string { return "powerdevice/" + deviceID }

// switches reports whether a device is one of the node's that are used.
func switches(d *api.PowerDevice, nodeID string) bool {
	return d.Spec.NodeID == nodeID && !d.Spec.Disabled
}

// powerTargets returns the devices of a node in their order, with their
// passwords.
func (m *member) powerTargets(v *configdb.View, nodeID string) ([]power.Target, error) {
	list, err := configdb.PowerDevices.List(v)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(list, func(a, b api.PowerDevice) int {
		return cmp.Or(a.Spec.Order-b.Spec.Order, cmp.Compare(a.Meta.Name, b.Meta.Name))
	})
	var out []power.Target
	for i := range list {
		d := &list[i]
		if !switches(d, nodeID) {
			continue
		}
		password, err := (sealer{m.info.clusterKey}).Open(powerLabel(d.Meta.ID), d.Spec.SealedPassword)
		if err != nil {
			return nil, api.Errorf(api.CodeInternal, "the password of power device %s cannot be opened: %w; set it again", d.Meta.Name, err)
		}
		out = append(out, power.Target{Name: d.Meta.Name, Spec: d.Spec, Password: string(password)})
	}
	return out, nil
}

// checkPower asks all devices of a node at once.
func (m *member) checkPower(ctx context.Context, n api.Node) (api.PowerReport, error) {
	r := api.PowerReport{Checks: []api.PowerCheck{}}
	targets, err := m.powerTargets(m.store.Local(), n.Meta.ID)
	if err != nil {
		return r, err
	}
	if len(targets) == 0 {
		return r, noPowerDevice(n.Meta.Name)
	}
	r.Checks = make([]api.PowerCheck, len(targets))
	var wg sync.WaitGroup
	for i := range targets {
		wg.Go(func() {
			err := contain.Call(func() error {
				r.Checks[i] = power.Check(ctx, &targets[i], n.Status.SystemUUID)
				return nil
			})
			if err != nil {
				r.Checks[i] = api.PowerCheck{Device: targets[i].Name, Driver: targets[i].Spec.Driver, Identity: api.IdentityUnknown, Message: err.Error()}
			}
		})
	}
	wg.Wait()
	return r, nil
}

func noPowerDevice(node string) error {
	return api.Errorf(api.CodeRefused, "node %s has no power device; add one with: muster node power add %s NAME --driver ipmi --address HOST --user USER --password-file FILE", node, node)
}

// doPower carries out what a person asked for and keeps the record. It is
// written before the first command, so that there is none without.
func (m *member) doPower(ctx context.Context, n api.Node, a api.PowerAction) (api.PowerAction, error) {
	targets, err := m.powerTargets(m.store.Local(), n.Meta.ID)
	if err != nil {
		return a, err
	}
	if len(targets) == 0 {
		return a, noPowerDevice(n.Meta.Name)
	}
	_, err = configdb.Transact(ctx, m.store, a.Spec.Actor, 4, func(v *configdb.View, tx *configdb.Txn) error {
		made := a.Clone()
		return configdb.PutPowerAction(v, tx, &made)
	})
	if err != nil {
		return a, fmt.Errorf("nothing was switched, because the record of it cannot be kept: %w", err)
	}
	var r power.Result
	switch a.Spec.Action {
	case api.PowerOff:
		r = power.SwitchOff(ctx, targets, nil)
	case api.PowerOn:
		r = power.SwitchOn(ctx, targets)
	default:
		r = power.Cycle(ctx, targets)
	}
	phase, message := api.PowerActionConfirmed, "read back from the device"
	if !r.Done {
		phase, message = api.PowerActionFailed, r.Err.Error()
	}
	wctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeDeadline)
	defer cancel()
	_, err = configdb.Transact(wctx, m.store, a.Spec.Actor, 4, func(v *configdb.View, tx *configdb.Txn) error {
		now, err := configdb.PowerActions.Get(v, a.Meta.ID)
		if err != nil {
			return err
		}
		api.EndPowerAction(&now, phase, message, r.Steps, time.Now())
		a = now
		return configdb.PowerActions.UpdateStatus(v, tx, &now)
	})
	if err != nil {
		m.log.Error("the record of a power action was not completed", "node", n.Meta.Name, "action", a.Spec.Action, "phase", phase, "message", message, "err", err)
		api.EndPowerAction(&a, phase, message, r.Steps, time.Now())
	}
	m.log.Info("power action", "node", n.Meta.Name, "action", a.Spec.Action, "actor", a.Spec.Actor, "phase", phase, "message", message)
	return a, nil
}

// fencer is what speaks to power devices as ha sees it.
type fencer struct{ m *member }

// Can implements ha.Fencer.
func (f fencer) Can(v *configdb.View, nodeID string) bool {
	all, _ := configdb.PowerDevices.List(v) // one that cannot be read is no device that could be used
	return slices.ContainsFunc(all, func(d api.PowerDevice) bool { return switches(&d, nodeID) })
}

// Off implements ha.Fencer.
func (f fencer) Off(ctx context.Context, nodeID string, before func(context.Context) error) ([]api.PowerStep, error) {
	targets, err := f.m.powerTargets(f.m.store.Local(), nodeID)
	if err != nil {
		return nil, err
	}
	r := power.SwitchOff(ctx, targets, before)
	if !r.Done && r.Err == nil {
		r.Err = errors.New("not confirmed")
	}
	return r.Steps, r.Err
}

// stopWithin bounds how long a daemon that is told to end says so: a disk may take a
// second for one write, and who has not said it may be switched off.
const stopWithin = 3 * time.Second

// sayStopping tells the others that this node's silence is in order. It matters
// only where somebody would switch the node off.
func (m *member) sayStopping() {
	if !(fencer{m}).Can(m.store.Local(), m.info.NodeID) {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopWithin)
	defer cancel()
	m.facts.stopping.Store(true)
	if err := m.facts.write(ctx); err != nil {
		m.log.Warn("the others do not know that this daemon stops in order, and may switch this host off", "err", err)
	}
}

// powerOf is what speaks to power devices as rest sees it.
type powerOf struct{ d *Daemon }

// SealPassword implements rest.Power.
func (o powerOf) SealPassword(deviceID, password string) ([]byte, error) {
	m := o.d.current()
	if m == nil {
		return nil, notMember()
	}
	return (sealer{m.info.clusterKey}).Seal(powerLabel(deviceID), []byte(password))
}

// Check implements rest.Power.
func (o powerOf) Check(ctx context.Context, n api.Node) (api.PowerReport, error) {
	m := o.d.current()
	if m == nil {
		return api.PowerReport{}, notMember()
	}
	return m.checkPower(ctx, n)
}

// Do implements rest.Power.
func (o powerOf) Do(ctx context.Context, n api.Node, a api.PowerAction) (api.PowerAction, error) {
	m := o.d.current()
	if m == nil {
		return a, notMember()
	}
	return m.doPower(ctx, n, a)
}
