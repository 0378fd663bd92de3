// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package configdb

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"github.com/muster-vm/muster/api"
)

// The keys of the product. Everything below Root belongs to it.
const (
	Root = "muster/"
	// SpecRoot has the metadata and wishes of all objects, by kind and ID.
	SpecRoot   = Root + "spec/"
	statusRoot = Root + "status/"
	nameRoot   = Root + "name/"
	refRoot    = Root + "ref/"
)

// Table is the typed facade over the keys of one kind. It is a value without
// state; all methods may be called from any goroutine.
type Table[S, T any] struct{ Kind api.Kind }

// The tables of this version.
var (
	Clusters    = Table[api.ClusterSpec, struct{}]{api.KindCluster}
	Nodes       = Table[api.NodeSpec, api.NodeStatus]{api.KindNode}
	VMs         = Table[api.VMSpec, api.VMStatus]{api.KindVM}
	Bindings    = Table[api.BindingSpec, struct{}]{api.KindBinding}
	Operations  = Table[api.OperationSpec, api.OperationStatus]{api.KindOperation}
	Arrivals    = Table[api.ArrivalSpec, api.ArrivalStatus]{api.KindArrival}
	Evacuations = Table[api.EvacuationSpec, api.EvacuationStatus]{api.KindEvacuation}
	Drills      = Table[api.DrillSpec, api.DrillStatus]{api.KindDrill}
	Reboots     = Table[api.RebootSpec, api.RebootStatus]{api.KindReboot}

	RollingReboots = Table[api.RollingRebootSpec, api.RollingRebootStatus]{api.KindRollingReboot}

	Images     = Table[api.ImageSpec, api.ImageStatus]{api.KindImage}
	Volumes    = Table[api.VolumeSpec, api.VolumeStatus]{api.KindVolume}
	Pools      = Table[api.PoolSpec, api.PoolStatus]{api.KindPool}
	PoolStates = Table[api.PoolStateSpec, api.PoolStateStatus]{api.KindPoolState}
	Tasks      = Table[api.TaskSpec, api.TaskStatus]{api.KindTask}
	Tokens     = Table[api.TokenSpec, api.TokenStatus]{api.KindToken}

	NodeFacts    = Table[api.NodeFactsSpec, api.NodeFactsStatus]{api.KindNodeFacts}
	CPUBaselines = Table[api.CPUBaselineSpec, struct{}]{api.KindCPUBaseline}
	Snapshots    = Table[api.SnapshotSpec, api.SnapshotStatus]{api.KindSnapshot}
	SavedStates  = Table[api.SavedStateSpec, api.SavedStateStatus]{api.KindSavedState}

	Networks     = Table[api.NetworkSpec, api.NetworkStatus]{api.KindNetwork}
	SwitchStates = Table[api.SwitchStateSpec, api.SwitchStateStatus]{api.KindSwitchState}
	Uplinks      = Table[api.UplinkSpec, api.UplinkStatus]{api.KindUplink}
	IPPools      = Table[api.IPPoolSpec, api.IPPoolStatus]{api.KindIPPool}
	Events       = Table[api.EventSpec, struct{}]{api.KindEvent}
	Rules        = Table[api.RuleSpec, struct{}]{api.KindRule}
	Alerts       = Table[api.AlertSpec, api.AlertStatus]{api.KindAlert}
	Receivers    = Table[api.ReceiverSpec, api.ReceiverStatus]{api.KindReceiver}
	Users        = Table[api.UserSpec, api.UserStatus]{api.KindUser}
	PowerDevices = Table[api.PowerDeviceSpec, struct{}]{api.KindPowerDevice}
	PowerActions = Table[api.PowerActionSpec, api.PowerActionStatus]{api.KindPowerAction}

	Failovers     = Table[api.FailoverSpec, api.FailoverStatus]{api.KindFailover}
	FailoverMoves = Table[api.FailoverMoveSpec, api.FailoverMoveStatus]{api.KindFailoverMove}
)

// LaterLifeKey exists if a node was recovered into a later life of the cluster
// than the one that this database is of: it runs its VMs under that.
func LaterLifeKey(nodeID string) string { return Root + "laterlife/" + nodeID }

// SpecPrefix and StatusPrefix are what to watch for changes of a kind.
func (t Table[S, T]) SpecPrefix() string { return SpecRoot + string(t.Kind) + "/" }

// StatusPrefix is the prefix of the kind's status keys.
func (t Table[S, T]) StatusPrefix() string { return statusRoot + string(t.Kind) + "/" }

// SpecKey is the key of an object's metadata and spec.
func (t Table[S, T]) SpecKey(id string) string { return t.SpecPrefix() + id }

// StatusKey is the key of an object's status.
func (t Table[S, T]) StatusKey(id string) string { return t.StatusPrefix() + id }

// NameKey is the claim key that makes a name unique; its value is the ID.
func (t Table[S, T]) NameKey(project, name string) string {
	return nameRoot + string(t.Kind) + "/" + project + "/" + name
}

// RefPrefix is the prefix of the claims of other objects on this one; while
// one exists the object cannot be deleted.
func (t Table[S, T]) RefPrefix(id string) string {
	return refRoot + string(t.Kind) + "/" + id + "/"
}

// IDOf returns the ID in a spec or status key of this kind.
func (t Table[S, T]) IDOf(key string) (string, bool) {
	if id, ok := strings.CutPrefix(key, t.SpecPrefix()); ok {
		return id, true
	}
	return strings.CutPrefix(key, t.StatusPrefix())
}

// Get returns the object with an ID.
func (t Table[S, T]) Get(v *View, id string) (api.Object[S, T], error) {
	var o api.Object[S, T]
	spec, ok := v.Get(t.SpecKey(id))
	if !ok {
		return o, api.Errorf(api.CodeNotFound, "%s %q does not exist", t.Kind, id)
	}
	status, _ := v.Get(t.StatusKey(id))
	return t.decode(spec, status)
}

func (t Table[S, T]) decode(spec, status Entry) (api.Object[S, T], error) {
	var o api.Object[S, T]
	if _, err := o.Decode(spec.Value, status.Value); err != nil {
		return o, fmt.Errorf("%s: %w", spec.Key, err)
	}
	o.Meta.Revision, o.Meta.StatusRevision = spec.Revision, status.Revision
	return o, nil
}

// Find returns the object with an ID, or with a name in a project. The ID comes
// first, so that nobody can hide an object behind a name that looks like its ID.
func (t Table[S, T]) Find(v *View, project, nameOrID string) (api.Object[S, T], error) {
	if project == "" {
		project = api.DefaultProject
	}
	if api.IsID(nameOrID) {
		if _, ok := v.Get(t.SpecKey(nameOrID)); ok {
			return t.Get(v, nameOrID)
		}
	}
	if claim, ok := v.Get(t.NameKey(project, nameOrID)); ok {
		return t.Get(v, string(claim.Value))
	}
	return api.Object[S, T]{}, api.Errorf(api.CodeNotFound, "%s %q does not exist in project %s", t.Kind, nameOrID, project)
}

// List returns all objects in order of creation. An object that cannot be
// decoded is reported and left out, so that one bad value hides no other.
func (t Table[S, T]) List(v *View) ([]api.Object[S, T], error) {
	var out []api.Object[S, T]
	var errs []error
	for e := range v.Scan(t.SpecPrefix(), "") {
		id, _ := t.IDOf(e.Key)
		status, _ := v.Get(t.StatusKey(id))
		o, err := t.decode(e, status)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out = append(out, o)
	}
	return out, errors.Join(errs...)
}

// Create adds an object and claims its name. The object must have been
// prepared (defaults, validation).
func (t Table[S, T]) Create(tx *Txn, o *api.Object[S, T]) error { return t.Recreate(tx, o, 0) }

// Recreate is Create for an object that there was before, under its old ID.
// after is the revision of the newest record of its history.
func (t Table[S, T]) Recreate(tx *Txn, o *api.Object[S, T], after uint64) error {
	o.Meta.Kind = t.Kind
	if o.Meta.Generation == 0 {
		o.Meta.Generation = 1
	}
	name := t.NameKey(o.Meta.Project, o.Meta.Name)
	tx.RequireRevision(name, 0)
	tx.RequireRevision(t.SpecKey(o.Meta.ID), 0)
	tx.Put(name, []byte(o.Meta.ID))
	return t.put(tx, o, after)
}

// CreateUnnamed adds an object whose name is its ID and needs no claim.
func (t Table[S, T]) CreateUnnamed(tx *Txn, o *api.Object[S, T]) error {
	o.Meta.Kind = t.Kind
	tx.RequireRevision(t.SpecKey(o.Meta.ID), 0)
	return t.put(tx, o, 0)
}

// UpdateSpec writes metadata and spec; it conflicts if they changed since o
// was read. The generation rises if the spec did change.
func (t Table[S, T]) UpdateSpec(v *View, tx *Txn, o *api.Object[S, T]) error {
	old, ok := v.Get(t.SpecKey(o.Meta.ID))
	if !ok {
		return api.Errorf(api.CodeNotFound, "%s %q does not exist", t.Kind, o.Meta.Name)
	}
	var before api.Object[S, T]
	stored, err := before.RewriteSpec(old.Value)
	if err != nil {
		return fmt.Errorf("%s %q: %w", t.Kind, o.Meta.Name, err)
	}
	if _, err := before.Decode(old.Value, nil); err != nil {
		return err
	}
	if o.Meta.Name != before.Meta.Name || o.Meta.Project != before.Meta.Project {
		// The claim of the old name would stay, and deletion would take away
		// the claim of whoever has the new one.
		return api.Invalid("meta.name", "of %s %q in project %s cannot be changed; create another object", t.Kind, before.Meta.Name, before.Meta.Project)
	}
	o.Meta.Kind = t.Kind
	o.Meta.Generation = before.Meta.Generation
	before.Meta = o.Meta
	specBefore, err := before.EncodeSpec()
	if err != nil {
		return err
	}
	now, err := o.EncodeSpec()
	if err != nil {
		return err
	}
	if bytes.Equal(stored.Known, now) {
		return nil // nothing to write
	}
	if !bytes.Equal(specBefore, now) {
		o.Meta.Generation++
		if now, err = o.EncodeSpec(); err != nil {
			return err
		}
	}
	if now, err = stored.By(now); err != nil {
		return fmt.Errorf("%s %q: %w", t.Kind, o.Meta.Name, err)
	}
	tx.RequireRevision(t.SpecKey(o.Meta.ID), o.Meta.Revision)
	tx.Put(t.SpecKey(o.Meta.ID), now)
	tx.remember(t.Kind, &o.Meta, HistoryUpdate, o.Meta.Revision, now)
	tx.onCommit(func(rev uint64) { o.Meta.Revision = rev })
	return nil
}

// UpdateStatus writes the status if it differs from the stored one; it
// conflicts if the status changed since o was read or the object is gone.
func (t Table[S, T]) UpdateStatus(v *View, tx *Txn, o *api.Object[S, T]) error {
	b, err := o.EncodeStatus()
	if err != nil {
		return err
	}
	key := t.StatusKey(o.Meta.ID)
	old, ok := v.Get(key)
	if ok && bytes.Equal(old.Value, b) {
		return nil
	}
	if ok {
		stored, err := o.RewriteStatus(old.Value)
		if err == nil && bytes.Equal(stored.Known, b) {
			return nil
		}
		if err == nil {
			b, err = stored.By(b)
		}
		if err != nil {
			return fmt.Errorf("status of %s %q: %w", t.Kind, o.Meta.Name, err)
		}
	}
	tx.RequireRevision(key, o.Meta.StatusRevision)
	tx.RequireExists(t.SpecKey(o.Meta.ID))
	tx.Put(key, b)
	tx.onCommit(func(rev uint64) { o.Meta.StatusRevision = rev })
	return nil
}

// Delete removes an object that nothing refers to, with its name.
func (t Table[S, T]) Delete(tx *Txn, o *api.Object[S, T]) {
	tx.RequireRevision(t.SpecKey(o.Meta.ID), o.Meta.Revision)
	tx.RequireEmpty(t.RefPrefix(o.Meta.ID))
	tx.Delete(t.NameKey(o.Meta.Project, o.Meta.Name))
	tx.Delete(t.SpecKey(o.Meta.ID))
	tx.Delete(t.StatusKey(o.Meta.ID))
	tx.remember(t.Kind, &o.Meta, HistoryDelete, o.Meta.Revision, nil)
}

// DeleteUnnamed removes an object that has no name claim.
func (t Table[S, T]) DeleteUnnamed(tx *Txn, o *api.Object[S, T]) {
	tx.RequireRevision(t.SpecKey(o.Meta.ID), o.Meta.Revision)
	tx.Delete(t.SpecKey(o.Meta.ID))
	tx.Delete(t.StatusKey(o.Meta.ID))
}

// Refer records that the object by (its kind and ID) needs the object with id
// and requires that it exists and is not being deleted at specRevision.
func (t Table[S, T]) Refer(tx *Txn, id string, byKind api.Kind, byID string) {
	tx.RequireExists(t.SpecKey(id))
	tx.Put(t.RefPrefix(id)+string(byKind)+"/"+byID, nil)
}

// Release takes such a record back.
func (t Table[S, T]) Release(tx *Txn, id string, byKind api.Kind, byID string) {
	tx.Delete(t.RefPrefix(id) + string(byKind) + "/" + byID)
}

// Referrers returns "kind/id" of what refers to an object.
func (t Table[S, T]) Referrers(v *View, id string) []string {
	var out []string
	for e := range v.Scan(t.RefPrefix(id), "") {
		out = append(out, strings.TrimPrefix(e.Key, t.RefPrefix(id)))
	}
	return out
}

func (t Table[S, T]) put(tx *Txn, o *api.Object[S, T], after uint64) error {
	spec, err := o.EncodeSpec()
	if err != nil {
		return err
	}
	status, err := o.EncodeStatus()
	if err != nil {
		return err
	}
	tx.Put(t.SpecKey(o.Meta.ID), spec)
	tx.Put(t.StatusKey(o.Meta.ID), status)
	tx.remember(t.Kind, &o.Meta, HistoryCreate, after, spec)
	tx.onCommit(func(rev uint64) { o.Meta.Revision, o.Meta.StatusRevision = rev, rev })
	return nil
}
