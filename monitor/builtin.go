// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"context"
	"fmt"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// builtinMark says which of the built-in rules were made once: all up to a
// generation. A user may remove or change them; they do not come back.
const builtinMark = configdb.Root + "monitor/builtin-rules"

// builtinGeneration is that of this build. The second brought quorumLost and drill.
const (
	builtinGeneration = "2"
	quorumLost        = "quorum-lost"
)

// lossPatience is how long a node must have lost its quorum before it says so:
// elections and the restart of a switch are over in less.
const lossPatience = 60

// lossSettle is how long a node must be lost before its alert fires: the VMs
// are bound to other nodes within it, so that the one message names them.
const lossSettle = 3

// builtins are the rules of a new cluster.
func builtins() map[string]api.RuleSpec {
	return map[string]api.RuleSpec{
		"node-lost":     {Check: api.CheckNodeLost, Severity: api.SeverityCritical, ForSeconds: lossSettle},
		"quorum-margin": {Check: api.CheckQuorumMargin, Severity: api.SeverityCritical, ForSeconds: 10},
		quorumLost:      {Check: api.CheckQuorumLost, Severity: api.SeverityCritical, ForSeconds: lossPatience},
		"vm-failed":     {Check: api.CheckVMFailed, Severity: api.SeverityWarning},
		"vm-recovered":  {Check: api.CheckVMRecovered, Severity: api.SeverityInfo},
		"pool-full":     {Check: api.CheckPoolFull, Severity: api.SeverityWarning, ForSeconds: 60},
		"clock-skew":    {Check: api.CheckClockSkew, Severity: api.SeverityWarning, ForSeconds: 60},
		"certificate":   {Check: api.CheckCertificate, Severity: api.SeverityWarning},
		"drill":         {Check: api.CheckDrill, Severity: api.SeverityWarning},
		"backup":        {Check: api.CheckBackup, Severity: api.SeverityWarning},
	}
}

// createBuiltins makes the built-in rules once in the life of a cluster.
func (s *Service) createBuiltins(ctx context.Context, term uint64) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	_, err := configdb.Transact(ctx, s.db, Actor, writeAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		mark, made := v.Get(builtinMark)
		if made && string(mark.Value) >= builtinGeneration {
			return nil
		}
		tx.RequireTerm(term)
		tx.RequireRevision(builtinMark, mark.Revision)
		tx.Put(builtinMark, []byte(builtinGeneration))
		for name, spec := range builtins() {
			if made && name != quorumLost && name != string(api.CheckDrill) {
				continue // of the first generation
			}
			if _, taken := v.Get(configdb.Rules.NameKey(api.DefaultProject, name)); taken {
				continue
			}
			r := api.Rule{Meta: api.NewMeta(api.KindRule, "", name), Spec: spec}
			r.Meta.CreatedAt = s.now().UTC()
			if err := r.Prepare(); err != nil {
				return err
			}
			if err := configdb.Rules.Create(tx, &r); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("create the built-in rules: %w", err)
	}
	return nil
}
