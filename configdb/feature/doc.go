// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package feature answers whether something that not every build knows may be
// used in this cluster: whether the cluster's feature level, which is in the
// replica, has reached the level that brings it.
//
// Guarantees: the level of a later view is never lower than that of an earlier
// one. A feature that is in force in a view is known to every node that is, or
// will be, a member.
//
// Non-guarantees: a feature that is not in force in one node's view may be in
// force in another's, which is ahead. What is decided here and commits a moment
// after the level was raised is what an older node would have written a moment
// before; each feature must bear that.
//
// A new feature is a constant, a line in Level and, if its level is new, a higher
// version.FeatureLevel. What a node does at its own level must stay right at
// all the lower ones that it supports. The package owns no goroutine.
package feature
