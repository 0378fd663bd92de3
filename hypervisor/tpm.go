// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/hypervisor/argv"
)

// A VM's TPM is a process of swtpm beside its QEMU. The guard runs it under the
// VM's epoch and protection, so that it ends with the lease as QEMU does and
// outlives the daemon as QEMU does. One serves one life of QEMU: it ends when
// QEMU lets go of it, and a VM is said to be stopped when both are gone.

const (
	// tpmPrefix makes the guard's name of a VM's TPM from the VM's ID.
	tpmPrefix = "tpm-"
	// TPMDeadline is how long swtpm may take to open its socket.
	TPMDeadline = 3 * time.Second
	tpmPoll     = 10 * time.Millisecond
	// ConditionTPM is not OK when a running VM has lost its TPM.
	ConditionTPM = "TPM"
	// swtpmProgram is the package and the program.
	swtpmProgram = "swtpm"
)

// isTPM reports whether a name of the guard's is that of a TPM, and of which VM.
func isTPM(name string) (vm string, ok bool) { return strings.CutPrefix(name, tpmPrefix) }

// startTPM begins the VM's TPM before its QEMU. If it cannot, the status says
// why, and ok is false.
func (s *step) startTPM(ctx context.Context, m *argv.Machine, r StartRequest) (ok bool, err error) {
	if m.TPM == "" {
		return true, nil
	}
	state, _, err := s.h.cfg.Volumes.Resolve(s.v, s.vm.Meta.Project, s.vm.Spec.TPM.Volume)
	if err != nil {
		s.wait(api.VMStarting, "waiting for the state of the TPM: "+err.Error())
		return false, nil
	}
	program, err := exec.LookPath(swtpmProgram)
	if err != nil {
		s.wait(api.VMFailed, "its TPM needs the program swtpm, which this node does not have; install the package swtpm")
		return false, nil
	}
	if strings.ContainsAny(state, ",\x00\n") {
		s.fail(fmt.Sprintf("swtpm cannot take the path %q of its state, because of its comma or control character; use another pool", state))
		return false, nil
	}
	if err := s.h.endTPM(ctx, s.vm.Meta.ID); err != nil {
		return false, err
	}
	if err := os.Remove(m.TPM); err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, fmt.Errorf("remove the old socket of the TPM of vm %s: %w", s.vm.Meta.Name, err)
	}
	p := s.h.pathsOf(s.vm.Meta.ID)
	r.VM, r.LogPath = tpmPrefix+r.VM, p.tpmLog
	r.Argv = []string{
		program, "socket", "--tpm2", "--tpmstate", "backend-uri=file://" + state + ",mode=0600",
		"--ctrl", "type=unixio,path=" + m.TPM + ",mode=0600", "--terminate",
	}
	gctx, cancel := context.WithTimeout(ctx, GuardDeadline)
	defer cancel()
	s.h.procs.invalidate()
	_, err = s.h.cfg.Guard.Start(gctx, r)
	s.h.procs.invalidate()
	if err != nil {
		s.report(api.VMStarting, fmt.Sprintf("its TPM was not started: %v", err))
		s.backOff()
		return false, nil
	}
	if err := s.awaitTPM(ctx, m.TPM); err != nil {
		s.fail(fmt.Sprintf("%v%s", err, tail(p.tpmLog, 0)))
		return false, s.h.endTPM(ctx, s.vm.Meta.ID)
	}
	return true, nil
}

// awaitTPM waits until swtpm has opened its socket; nothing tells that.
func (s *step) awaitTPM(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, TPMDeadline)
	defer cancel()
	for {
		if _, err := os.Stat(socket); err == nil {
			return nil
		}
		select {
		case <-time.After(tpmPoll):
		case <-ctx.Done():
			return fmt.Errorf("swtpm, the TPM of vm %s, did not open its socket within %v", s.vm.Meta.Name, TPMDeadline)
		}
	}
}

// endTPM ends what is left of a VM's TPM.
func (h *Hypervisor) endTPM(ctx context.Context, vm string) error {
	if _, err := h.procs.get(ctx); err != nil {
		return err
	}
	p, ok := h.procs.tpm(vm)
	if !ok {
		return nil
	}
	if p.State != ProcessExited {
		if err := h.kill(ctx, tpmPrefix+vm); err != nil {
			return fmt.Errorf("end the TPM of vm %s: %w", vm, err)
		}
	}
	return h.forget(ctx, tpmPrefix+vm)
}

// checkTPM reports a running VM whose TPM has ended: QEMU cannot be given
// another one.
func (s *step) checkTPM() {
	hw := s.vm.Status.Hardware
	if hw == nil || hw.TPM == nil {
		return
	}
	if p, ok := s.h.procs.tpm(s.vm.Meta.ID); ok && p.State == ProcessRunning {
		return
	}
	s.problem(ConditionTPM, fmt.Sprintf("swtpm, the VM's TPM, has ended%s; the guest has no TPM until the VM is stopped and started: muster vm stop %s, muster vm start %s",
		tail(s.h.pathsOf(s.vm.Meta.ID).tpmLog, 0), s.vm.Meta.Name, s.vm.Meta.Name))
}
