// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package cephtest gives tests a small real Ceph (scripts/ceph-test), which ends with
// the test that started it.
//
// It takes some 25 s to come up: share one between the checks of a package. Packages
// whose tests run at the same time need addresses of their own.
package cephtest
