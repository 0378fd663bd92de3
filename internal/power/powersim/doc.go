// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package powersim has controllers of hosts for tests, which speak the real
// protocols: IPMI v2.0 over UDP, and Redfish over HTTPS. They can be told to
// misbehave as real ones do.
//
// The IPMI side is the reference BMC of the IPMI library; ipmitool is used to
// prove that it is one. Each simulator owns one goroutine, and one for each
// request; Close ends them.
package powersim
