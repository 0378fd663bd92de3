// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package monitor

import (
	"context"
	"fmt"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// builtinMark says that the built-in rules were made once. A user may remove
// or change them; they do not come back.
const builtinMark = configdb.Root + "monitor/builtin-rules"

// lossSettle is how long a node must be lost before its alert fires: the VMs
// are bound to other nodes within it, so that the one message names them.
const lossSettle = 3

// builtins are the rules of a new cluster.
func builtins() map[string]api.RuleSpec {
	return map[string]api.RuleSpec{
		"node-lost":     {Check: api.CheckNodeLost, Severity: api.SeverityCritical, ForSeconds: lossSettle},
		"quorum-margin": {Check: api.CheckQuorumMargin, Severity: api.SeverityCritical, ForSeconds: 10},
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
		if _, done := v.Get(builtinMark); done {
			return nil
		}
		tx.RequireTerm(term)
		tx.RequireRevision(builtinMark, 0)
		tx.Put(builtinMark, []byte("1"))
		for name, spec := range builtins() {
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
