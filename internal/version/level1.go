// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build muster_level1

package version

// FeatureLevel counts what a cluster can only use once every node knows it.
const FeatureLevel = 1
