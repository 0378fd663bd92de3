// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "fmt"

// FeatureLevels are the levels of a cluster in which a node's software can work.
type FeatureLevels struct {
	Min int `json:"min"`
	Max int `json:"max"`
}

// Include reports whether a level is one of them.
func (l FeatureLevels) Include(level int) bool { return l.Min <= level && level <= l.Max }

// String is "1" or "1-2".
func (l FeatureLevels) String() string {
	if l.Min == l.Max {
		return fmt.Sprint(l.Max)
	}
	return fmt.Sprintf("%d-%d", l.Min, l.Max)
}

// Supports returns the levels that a node reports. The software of one that
// reports none is older than the levels: it supports the first.
func (s *NodeStatus) Supports() FeatureLevels {
	if s.FeatureLevels == nil {
		return FeatureLevels{Min: 1, Max: 1}
	}
	return *s.FeatureLevels
}

// Level returns the feature level in force. A cluster that does not say it was
// founded before there were any.
func (s *ClusterSpec) Level() int { return max(1, s.FeatureLevel) }

// FeatureLevelStatus is the cluster's feature level and what holds it back.
type FeatureLevelStatus struct {
	// Level in force.
	Level int `json:"level"`
	// Highest that any node supports. Is it more than the one in force, Waits says
	// why that was not raised.
	Highest int  `json:"highest"`
	Hold    bool `json:"hold,omitempty"`
	// Waits are the reasons why the level is not raised, such as "m3: supports 1".
	Waits []string `json:"waits,omitempty"`
}
