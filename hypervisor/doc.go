// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package hypervisor runs the VMs that are bound to this node: it starts QEMU
// through the guard, drives it over QMP, serves the serial consoles and reports
// what is.
//
// Guarantees (DESIGN.md has the reasons and the failure cases):
//   - A VM is started only under a valid lease, on a view that is at least as
//     new as the lease, when its binding names this node; the guard checks the
//     lease's session once more.
//   - A QEMU whose VM is bound elsewhere under a later epoch is killed.
//   - Running QEMUs are adopted after a restart of the daemon and never harmed
//     by it; they go on when Run ends.
//   - Every call to QEMU and to the guard has a deadline; one stuck QEMU delays
//     no other VM by more than that.
//   - While a VM has saved memory (api.SavedState) its guest does not run: it goes
//     on only after the memory was loaded and that was committed.
//   - A snapshot or revert is of all disks or of none; what was interrupted is
//     undone or finished by the next life, or kept from starting by name.
//   - Status is written only when it changed and only by the binding's owner.
//
// Non-guarantees: a reboot asked for while the daemon dies may be carried out
// twice. A guest that powers itself off while no daemon runs cannot be told
// from one whose QEMU was ended with SIGTERM.
//
// Goroutines: Run owns the workers of its loop, one for the slow look every
// ResyncInterval, one while the accelerator is being found out, one per VM that is
// being snapshotted, reverted, suspended or resumed (work.go), and per running
// VM one that follows QMP events, one reader of the QMP connection and one of
// the console. All end with Run.
//
// Limits: the constants in hypervisor.go and those of packages qmp, argv,
// console and accel.
package hypervisor
