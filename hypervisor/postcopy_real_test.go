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

// dirty makes the guest change its memory without an end.
const dirty = "dd if=/dev/urandom of=/run/a bs=1M count=24; while :; do cp /run/a /run/b; done >/dev/null 2>&1 &"

// typed gives the guest's console a command; its shell says that it has begun.
func (e *env) typed(id, command string) {
	e.t.Helper()
	c, err := e.h.Console(id)
	must(e.t, err)
	must(e.t, c.Write(e.t.Context(), []byte("\n")))
	e.until("a shell", func() bool { return strings.Contains(string(c.History(1<<16)), "muster-guest shell") }, nothing)
	must(e.t, c.Write(e.t.Context(), []byte(command+"\n")))
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
	id := p.counterGuest(api.VMSpec{CPUs: 1, Power: api.PowerRunning})
	for _, name := range []string{"web1-disk0", "web1-disk1"} {
		p.other.vols.put(name, p.env.path(name))
	}
	p.wait(id, "running", running)
	n := p.count(id, "it counts", after(3))
	p.typed(id, dirty)
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

	slow := func(m *api.MigrationSpec) { m.PostCopy, m.Bandwidth = true, 20*api.MiB }
	p.migrate(id, slow)
	p.divides(id, 3)
	p.over(id, "succeeded")
	p.settled(id, "node-1")
	at = p.env
	goOn("after post-copy", n.boot)

	p.migrate(id, slow)
	p.divides(id, 4)
	p.links.sever(false)
	p.over(id, "succeeded")
	p.settled(id, "node-2")
	at = p.other
	goOn("after post-copy over a line that broke", n.boot)

	p.migrate(id, slow)
	p.divides(id, 5)
	p.other.guard.killAll() // the source's QEMU, with the memory that was left
	holed := p.vm(id).Status.PID
	p.over(id, "failed")
	p.until("started anew", func() bool { pid := p.vm(id).Status.PID; return pid != 0 && pid != holed }, nothing)
	p.settled(id, "node-1")
	at = p.env
	goOn("started anew", n.boot+1)
}
