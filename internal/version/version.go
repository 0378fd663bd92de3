// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package version holds the version of this build and the feature level of its
// code. It has no other content, so that every program can say what it is.
package version

// Version is set by the linker: -ldflags "-X …/internal/version.Version=v".
// It is a variable only for that; nothing assigns it at run time.
var Version = "0.1.0-dev"

// FeatureLevel counts what a cluster can only use once every node knows it. A
// node tells the others its own by gossip.
const FeatureLevel = 1
