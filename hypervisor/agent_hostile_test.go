// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"net"
	"os"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/hypervisor/qmp"
)

// The directory with the agent's socket is the VM's user's. A QEMU that was taken
// over may put a link there to the socket of another VM, whose guest would then be
// told this one's commands and passwords.
func TestAgentIsAskedOnlyBehindTheVMsOwnQEMU(t *testing.T) {
	e := newEnv(t, false)
	in := &instance{id: api.NewID(), conn: qmp.New(nil)}
	in.isOf(1, testUsers.First) // not the process that listens below
	must(t, os.MkdirAll(e.h.pathsOf(in.id).dir, 0o700))
	ln, err := net.Listen("unix", e.h.pathsOf(in.id).agent)
	must(t, err)
	defer ln.Close()
	said := make(chan string, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b := make([]byte, 256)
		n, _ := c.Read(b) // the end is as good
		said <- string(b[:n])
	}()
	a := e.h.openAgent(in)
	defer a.Close()
	a.SetOpen(true)
	if err := a.Check(t.Context()); err == nil || !strings.Contains(err.Error(), "listens there") {
		t.Errorf("a foreign socket was spoken to: %v", err)
	}
	if got := <-said; got != "" {
		t.Errorf("it was told %q", got)
	}
}
