// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// Fencer locks hosts out of one pool, so that what a host still runs can neither read
// nor write there, whatever the host itself believes. It is the storage guard: who has
// fenced a host may start that host's VMs elsewhere, as far as their disks are in this
// pool. DESIGN.md has the failure cases.
//
// All calls end by the context's deadline, or by one of their own if it has none; a
// storage cluster that does not answer is an error, never a success.
type Fencer interface {
	// Addresses are the IP addresses under which the storage cluster sees this node:
	// what must be fenced to lock this node out. Ask while the node is well, and keep
	// the answer: once it is lost, nobody else knows.
	Addresses(ctx context.Context) ([]string, error)
	// Fence locks out all that comes from addrs, now and later, and waits until the
	// storage cluster has it in force: whoever opens a volume after the return sees no
	// later write of theirs, also none that was on its way. Then it breaks the locks that fenced clients hold
	// on volumes (their IDs). With owners it also locks out the single clients, and not
	// their hosts, that hold a lock on one of the volumes or have it open for writing,
	// from wherever: for a host whose addresses are not known, or have changed. To fence
	// what is fenced already is no error, and a volume that does not exist is passed over.
	// still, unless it is nil, is called before each command that changes anything, and
	// ends the attempt with its error: who has been taken back meanwhile is let alone.
	Fence(ctx context.Context, addrs, volumes []string, owners bool, still func(context.Context) error) (Fenced, error)
	// Unfence takes back what Fence did to addrs, and waits until that is in force. A
	// QEMU that was fenced never recovers by that: it must have ended before.
	Unfence(ctx context.Context, addrs []string) error
	// Fenced reports whether all of addrs are locked out.
	Fenced(ctx context.Context, addrs []string) (bool, error)
}

// Fenced is what Fence did.
type Fenced struct {
	// Epoch of the storage cluster's map (Ceph: the OSD map) from which on the hosts
	// are locked out; it only grows.
	Epoch uint64
	// Owners are the clients that held locks on the volumes or had them open, and were
	// locked out one by one, too, as ADDRESS:PORT/NONCE, sorted. An earlier Fence may
	// have done that already.
	Owners []string
}

// Fencer returns that of a pool by name or ID, which must be known on this node; it need
// not be ready. A pool that cannot fence is refused (api.CodeUnsupported).
func (s *Service) Fencer(v *configdb.View, poolName string) (Fencer, error) {
	pool, err := configdb.Pools.Find(v, "", poolName)
	if err != nil {
		return nil, err
	}
	if d, ok := s.driver(pool).(*rbdDriver); ok {
		return rbdFencer{d}, nil
	}
	return nil, api.Errorf(api.CodeUnsupported, "pool %q is of type %s, which cannot lock out a host; only pools of type rbd can", pool.Meta.Name, pool.Spec.Type)
}

// Release frees a volume of what clients hold of it that have ended, and locks them out
// if they have not: nobody but the caller may use it now. Pools that lock nobody out
// have nothing to free.
func (s *Service) Release(ctx context.Context, v *configdb.View, project, name string) error {
	vol, err := configdb.Volumes.Find(v, project, name)
	if err != nil {
		return err
	}
	pool, err := configdb.Pools.Find(v, "", vol.Spec.Pool)
	if err != nil {
		return err
	}
	d, ok := s.driver(pool).(*rbdDriver)
	if !ok {
		return nil
	}
	return rbdFencer{d}.release(ctx, vol.Meta.ID)
}
