// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "time"

// ConditionBackup is the condition of a node whose own backups fail.
const ConditionBackup = "Backup"

// BackupSettings say how often every node keeps a backup of the configuration
// database in its own data directory.
type BackupSettings struct {
	// EveryMinutes lie between two backups: 1 to 44640 (31 days), default 1440.
	EveryMinutes int `json:"everyMinutes,omitempty" minimum:"1" maximum:"44640"`
	// Keep is how many backups a node keeps: 1 to 1000, default 7.
	Keep int `json:"keep,omitempty" minimum:"1" maximum:"1000"`
	// Disabled: no node makes backups by itself.
	Disabled bool `json:"disabled,omitempty"`
}

// Limits and defaults of BackupSettings.
const (
	MaxBackupMinutes     = 44640
	DefaultBackupMinutes = 1440
	MaxBackupKeep        = 1000
	DefaultBackupKeep    = 7
)

// SetDefaults implements Spec.
func (s *BackupSettings) SetDefaults() {
	if s.EveryMinutes == 0 {
		s.EveryMinutes = DefaultBackupMinutes
	}
	if s.Keep == 0 {
		s.Keep = DefaultBackupKeep
	}
}

// Validate implements Spec.
func (s *BackupSettings) Validate() error {
	if s.EveryMinutes < 1 || s.EveryMinutes > MaxBackupMinutes {
		return Invalid("backup.everyMinutes", "is %d; give 1 to %d", s.EveryMinutes, MaxBackupMinutes)
	}
	if s.Keep < 1 || s.Keep > MaxBackupKeep {
		return Invalid("backup.keep", "is %d; give 1 to %d", s.Keep, MaxBackupKeep)
	}
	return nil
}

// Every is the time between two backups.
func (s *BackupSettings) Every() time.Duration { return time.Duration(s.EveryMinutes) * time.Minute }

// ClusterSettings are what administrators set for the cluster as a whole.
type ClusterSettings struct {
	Backup BackupSettings `json:"backup"`
	// FeatureLevelHold keeps the feature level as it is, though all nodes support
	// a higher one: what was not raised can go back to the older software.
	FeatureLevelHold bool `json:"featureLevelHold"`
	// HA is the promise to survive failures of nodes.
	HA HASettings `json:"ha"`
}

// Settings returns the settings in force.
func (s *ClusterSpec) Settings() ClusterSettings {
	out := ClusterSettings{Backup: s.Backup, FeatureLevelHold: s.FeatureLevelHold, HA: s.HA}
	out.Backup.SetDefaults()
	out.HA.SetDefaults()
	return out
}

// Origin says which backup a cluster was restored from.
type Origin struct {
	ClusterID string    `json:"clusterID"`
	Cluster   string    `json:"cluster"`
	Life      uint64    `json:"life"`
	Revision  uint64    `json:"revision"`
	Time      time.Time `json:"time"`
}

// BackupRequest asks for a backup.
type BackupRequest struct {
	// Passphrase, if given, has 12 to 1024 bytes: the backup then holds the
	// cluster key, sealed with it.
	Passphrase string `json:"passphrase,omitempty"`
}

// LocalBackups are the backups that one node keeps in its data directory.
type LocalBackups struct {
	Node string `json:"node"`
	// Directory on the node.
	Directory string        `json:"directory"`
	Items     []LocalBackup `json:"items"`
	// NextAt is when the next one is due; it is left out if nothing changed.
	NextAt *time.Time `json:"nextAt,omitempty"`
	// LastError says why the last one failed, empty when it did not.
	LastError string `json:"lastError,omitempty"`
}

// LocalBackup is one of them.
type LocalBackup struct {
	File    string    `json:"file"`
	Size    int64     `json:"size"`
	Time    time.Time `json:"time,omitzero"`
	Cluster string    `json:"cluster,omitempty"`
	// ClusterID tells clusters of one name apart.
	ClusterID string `json:"clusterID,omitempty"`
	Life      uint64 `json:"life,omitempty"`
	Revision  uint64 `json:"revision,omitempty"`
	// Error says why the file is no backup.
	Error string `json:"error,omitempty"`
}

// RestoreRequest asks the daemon on this host to found a cluster from a backup.
type RestoreRequest struct {
	// File is the absolute path of the backup on this host.
	File string `json:"file"`
	// ClusterKey is the key of the cluster that the backup is of; or Passphrase
	// opens the one in the backup.
	ClusterKey []byte `json:"clusterKey,omitempty"`
	Passphrase string `json:"passphrase,omitempty"`
	// Name of the new cluster; that of the old one when empty.
	Name string `json:"name,omitempty"`
	// SwitchedOff names nodes of the old cluster whose hosts are switched off
	// for good. If all that could run VMs are, the VMs are bound to this host, stopped.
	SwitchedOff []string `json:"switchedOff,omitempty"`
	// KeepTokens keeps the API tokens of the backup, also those that were
	// deleted after it was made.
	KeepTokens bool `json:"keepTokens,omitempty"`
}

// RestoreResult answers it. The token is shown once and never again.
type RestoreResult struct {
	InitResult
	From Origin `json:"from"`
	// TakenOver counts the VMs that are bound to this host, stopped: all, once all hosts
	// that could run them are said to be off.
	TakenOver int `json:"takenOver"`
	// Waiting names the nodes of the old cluster whose VMs wait for the word
	// that their host is switched off, with the number of VMs.
	Waiting map[string]int `json:"waiting,omitempty"`
}

// RecoveryPlan is what a node that lost its quorum knows, for the person who
// decides whether to recover the cluster from it.
type RecoveryPlan struct {
	Cluster   string `json:"cluster"`
	ClusterID string `json:"clusterID"`
	Node      string `json:"node"`
	// Life that the cluster is in; a recovery begins the next.
	Life     uint64 `json:"life"`
	Revision uint64 `json:"revision"`
	// LastIndex and LastTerm of this node's log. Of two nodes the one with the
	// higher term, or the same term and the higher index, has the newer log.
	LastIndex uint64 `json:"lastIndex"`
	LastTerm  uint64 `json:"lastTerm"`
	// WrittenAt is the time of the newest change that this node has.
	WrittenAt time.Time `json:"writtenAt,omitzero"`
	// LeaderHeardAt is when this node last heard a leader, if it did since its
	// daemon was started at StartedAt.
	LeaderHeardAt *time.Time       `json:"leaderHeardAt,omitempty"`
	StartedAt     time.Time        `json:"startedAt"`
	Others        []RecoveryMember `json:"others"`
	// Refused says why the cluster must not be recovered from this node now;
	// empty when it may.
	Refused string `json:"refused,omitempty"`
}

// RecoveryMember is another member as this node sees it.
type RecoveryMember struct {
	NodeID  string    `json:"nodeID"`
	Node    string    `json:"node"`
	Address string    `json:"address"`
	Role    NodeRole  `json:"role,omitempty"`
	Phase   NodePhase `json:"phase,omitempty"`
	Voter   bool      `json:"voter"`
	// VMs that are bound to it.
	VMs int `json:"vms"`
	// Answers is whether it answers now, with the end of its log.
	Answers   bool   `json:"answers"`
	LastIndex uint64 `json:"lastIndex,omitempty"`
	LastTerm  uint64 `json:"lastTerm,omitempty"`
	// Newer: its log is newer than this node's.
	Newer bool `json:"newer,omitempty"`
	// LastSeen is when this node last heard from it, if it did since its daemon
	// was started.
	LastSeen *time.Time `json:"lastSeen,omitempty"`
	// Error says why it does not answer.
	Error string `json:"error,omitempty"`
}

// RecoveryRequest is the word of the administrator.
type RecoveryRequest struct {
	// Cluster repeats the cluster's name.
	Cluster string `json:"cluster"`
	// SwitchedOff names every other node: none of them runs, or will run again
	// with what it has.
	SwitchedOff []string `json:"switchedOff"`
}

// RecoveryResult says what was begun. The daemon starts anew and finishes it.
type RecoveryResult struct {
	Cluster string `json:"cluster"`
	Node    string `json:"node"`
	// Life that begins.
	Life uint64 `json:"life"`
	// Removed names the nodes that are no members any more, TakenOver the VMs
	// that are bound to this node, stopped.
	Removed   []string `json:"removed"`
	TakenOver []string `json:"takenOver,omitempty"`
}
