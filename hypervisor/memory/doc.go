// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package memory decides how much memory each VM of one node may use when they
// want more than the node has. Every VM that may be squeezed says between which
// bounds; the balloon in the guest takes what the decision leaves out.
//
// [Decide] is a pure function of what is known of the node and its VMs, so that
// its promises can be tested: a target is never below a VM's minimum and never
// above its maximum; the sum of the targets fits the node whenever the minimums
// do; with unchanged input the targets come to rest and stay.
package memory
