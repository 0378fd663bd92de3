// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package lab is the hosts of a fault campaign: network namespaces joined by a
// bridge, with a small disk each; their daemons, which are started again when
// they end; and a client that asks once and says what came of it. The namespaces
// are made and removed by scripts/torture.
//
// A Daemon owns a goroutine while its process lives. The other types own none.
package lab
