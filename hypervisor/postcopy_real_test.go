// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"fmt"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// dirty makes the guest change its memory without an end, little at a time: before
// version 9.0 QEMU with emulated processors misses what a guest writes without a
// change of its address space after a pass over the memory has begun (docs/migration.md).
const dirty = "dd if=/dev/urandom of=/run/a bs=64k count=32; while :; do dd if=/run/a of=/run/b bs=64k && echo dirty-$((1+1)); done 2>/dev/null &"

// typed gives the guest's console a command; its shell says that it has begun.
func (e *env) typed(id, command string) {
	e.t.Helper()
	c, err := e.h.Console(id)
	must(e.t, err)
	must(e.t, c.Write(e.t.Context(), []byte("\n")))
	e.until("a shell", func() bool { return strings.Contains(string(c.History(1<<16)), "muster-guest shell") }, nothing)
	must(e.t, c.Write(e.t.Context(), []byte(command+"\n")))
}

// dirties has the guest change its memory, and waits until it does.
func (e *env) dirties(id string) {
	e.t.Helper()
	e.typed(id, dirty)
	c, err := e.h.Console(id)
	must(e.t, err)
	e.until("memory that changes", func() bool { return strings.Contains(string(c.History(1<<16)), "dirty-2") }, nothing)
}

// trickles has the end of the first pass over the memory and what follows come
// slowly. A guest that gets little of the processors is ahead of it then, too, and a
// test sees its memory divided, also one that misses the end of that pass.
func (e *env) trickles(id string) {
	e.t.Helper()
	divided := false
	e.until("the end of the first pass over the memory", func() bool {
		e.h.mu.Lock()
		in := e.h.instances[id]
		e.h.mu.Unlock()
		set := func(what string, rate api.Size) bool {
			return in.execute(e.t.Context(), "migrate-set-parameters", map[string]any{what: rate}, nil) == nil
		}
		m, err := in.queryMigrate(e.t.Context())
		if err != nil || m.RAM.Remaining == 0 {
			return false
		}
		divided = divided || set("max-postcopy-bandwidth", api.MiB/2)
		return divided && (m.RAM.Remaining <= 4<<20 || m.RAM.DirtySyncs >= 2) && set("max-bandwidth", api.MiB)
	}, nothing)
}

// divides waits until the guest runs under an epoch with memory left at its source.
func (p *pair) divides(id string, epoch uint64) {
	p.t.Helper()
	p.until("it runs there with memory left", func() bool {
		op, err := configdb.Operations.Get(p.db.Local(), id)
		vm := p.vm(id)
		return err == nil && op.Status.PostCopying && vm.Status.Epoch == epoch && vm.Status.PID != 0
	}, func() string {
		op, _ := configdb.Operations.Get(p.db.Local(), id)
		return fmt.Sprintf("%+v", op.Status)
	})
}

// One guest that changes its memory all the time moves over several connections,
// and with post-copy: undisturbed, with a broken line, and with the loss of the
// memory that was left.
func TestRealGuestThroughMultifdAndPostCopy(t *testing.T) {
	p := newPair(t, true)
	// A guest that stands still is never divided. This one goes through its memory again
	// and again, with as many changes of its page tables, so that little is missed.
	runsOn := func(api.Accelerator, int) bool { return false }
	for _, e := range []*env{p.env, p.other} {
		e.stop()
		e.halts = runsOn
		e.begin()
	}
	id := p.counterGuest(api.VMSpec{CPUs: 1, Power: api.PowerRunning})
	for _, name := range []string{"web1-disk0", "web1-disk1"} {
		p.other.vols.put(name, p.env.path(name))
	}
	p.wait(id, "running", running)
	n := p.count(id, "it counts", after(3))
	p.dirties(id)
	at := p.env
	goOn := func(what string, boot int) {
		t.Helper()
		now := at.count(id, what, func(c progress) bool { return c.counter >= n.counter+2 })
		if now.boot != boot {
			t.Fatalf("%s: boot %d, want %d", what, now.boot, boot)
		}
		n = now
	}

	p.migrate(id, over4)
	p.over(id, "succeeded")
	p.settled(id, "node-2")
	at = p.other
	goOn("over four connections", n.boot)

	slow := func(m *api.MigrationSpec) {
		m.PostCopy, m.Bandwidth, m.MaxDowntimeMillis = true, 20*api.MiB, api.MinDowntimeMillis
	}
	p.migrate(id, slow)
	at.trickles(id)
	p.divides(id, 3)
	p.over(id, "succeeded")
	p.settled(id, "node-1")
	at = p.env
	goOn("after post-copy", n.boot)

	p.migrate(id, slow)
	at.trickles(id)
	p.divides(id, 4)
	p.links.sever(false)
	p.over(id, "succeeded")
	p.settled(id, "node-2")
	at = p.other
	goOn("after post-copy over a line that broke", n.boot)

	p.migrate(id, slow)
	at.trickles(id)
	p.divides(id, 5)
	p.other.guard.killAll() // the source's QEMU, with the memory that was left
	holed := p.vm(id).Status.PID
	p.over(id, "failed")
	p.until("started anew", func() bool { pid := p.vm(id).Status.PID; return pid != 0 && pid != holed }, nothing)
	p.settled(id, "node-1")
	at = p.env
	goOn("started anew", n.boot+1)
}
