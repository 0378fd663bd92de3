// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package version holds the version of this build and the feature levels that
// its code supports. It has no other content, so that every program can say what
// it is.
//
// With the build tag muster_level1 the build is one of feature level 1, as those
// were that came before the levels: tests run it beside the present one.
package version

// Version is set by the linker: -ldflags "-X …/internal/version.Version=v".
// It is a variable only for that; nothing assigns it at run time.
var Version = "0.1.0-dev"

// MinFeatureLevel and FeatureLevel are the lowest and the highest level of a
// cluster in which this build can be a node. What each level brings is in
// configdb/feature.
const MinFeatureLevel = 1
