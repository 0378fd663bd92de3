// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package etcd runs three etcd servers and drives them with etcd's own client
// library over gRPC.
package etcd
