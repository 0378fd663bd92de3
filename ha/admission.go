// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"fmt"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/ha/plan"
)

// startSets is how many sets of nodes are looked at before a start: fewer than
// in the outlook, because somebody waits.
const startSets = 64

// Admit judges a change that makes a VM run: before and after are the state
// without it and with it. If the change breaks the promise, or makes more VMs fail
// to fit where it is broken already, Admit returns a warning, or, as the settings
// say, an error with code refused.
//
// It is about capacity, and decides nothing that safety depends on: what it cannot
// find out it lets pass with a warning.
func (o *Outlook) Admit(before, after *configdb.View) (warning string, err error) {
	settings := Settings(before)
	if settings.Admission == api.AdmissionOff {
		return "", nil
	}
	then, err := o.survive(after, settings.Failures)
	if err != nil {
		return "not known whether failures of nodes would be survived: " + err.Error(), nil
	}
	if then.survival.Refused() == 0 {
		return "", nil
	}
	now, err := o.survive(before, settings.Failures)
	if err != nil {
		return "not known whether failures of nodes are survived: " + err.Error(), nil
	}
	if then.survival.Refused() <= now.survival.Refused() {
		return "", nil
	}
	what := "the promise that the loss of a node is survived"
	if settings.Failures > 1 {
		what = fmt.Sprintf("the promise that the loss of %d nodes together is survived", settings.Failures)
	}
	text := "this breaks " + what + ": " + then.missing()
	if settings.Admission == api.AdmissionWarn {
		return text, nil
	}
	return "", api.Errorf(api.CodeRefused, "%s; stop other VMs or add a node, or lower the promise: muster ha set", text)
}

// survive is the part of a report that the promise is made of, about capacity
// alone: a quorum is not what a start takes.
func (o *Outlook) survive(v *configdb.View, failures int) (*report, error) {
	state, err := plan.Read(v)
	if err != nil {
		o.log.Warn("admission leaves out what cannot be read", "err", err)
	}
	fleet, err := o.placer.Load(state)
	if err != nil {
		return nil, err
	}
	return &report{state: state, survival: plan.Survive(state, fleet, nil, failures, startSets, nil)}, nil
}
