// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "time"

// Cluster is the one object that describes the cluster itself. Its ID is the
// cluster's identity, which a daemon checks against its data directory.
type Cluster = Object[ClusterSpec, struct{}]

// ClusterSpec is written at init.
type ClusterSpec struct {
	// CACert is the certificate of the cluster's authority, PEM.
	CACert string `json:"caCert"`
	// SealedCAKey is the authority's private key, sealed with the cluster key
	// that every node keeps outside the database. Never shown by REST.
	SealedCAKey []byte `json:"sealedCAKey,omitempty"`
	// Life counts the recoveries from lost quorum, beginning with 1.
	Life uint64 `json:"life"`
	// Gossip are the keys of gossip; a cluster of an earlier version has none
	// until its leader makes them. Never shown by REST.
	Gossip *GossipKeys `json:"gossip,omitempty"`
	// CertificateSeconds is how long new node certificates last; 0 for the default.
	CertificateSeconds int `json:"certificateSeconds,omitempty"`
	// Rotation of the authority under way; nil when there is none.
	Rotation *CARotation `json:"rotation,omitempty"`
	// History says how long the history of the configuration is kept.
	History HistorySettings `json:"history,omitzero"`
	// RestoredFrom is set in a cluster that began as a backup of another.
	RestoredFrom *Origin `json:"restoredFrom,omitempty"`
	// Backup are the settings of the nodes' own backups.
	Backup BackupSettings `json:"backup,omitzero"`
	// FeatureLevel in force; it only rises. 0 is 1.
	FeatureLevel int `json:"featureLevel,omitempty"`
	// FeatureLevelHold keeps it as it is.
	FeatureLevelHold bool `json:"featureLevelHold,omitempty"`
	// HA is the promise to survive failures of nodes.
	HA HASettings `json:"ha,omitzero"`
}

// Token is a secret that opens the API, or that lets one node join. Only the
// SHA-256 of the secret is stored; the secret has 256 random bits, so a plain
// hash cannot be searched.
type Token = Object[TokenSpec, TokenStatus]

// TokenUse is what a token is good for.
type TokenUse string

// The uses.
const (
	TokenAPI  TokenUse = "api"
	TokenJoin TokenUse = "join"
)

// Role is what the holder of a token may do.
type Role string

// The roles: a viewer reads, an operator also changes VMs, images and volumes,
// an administrator does everything.
const (
	RoleAdministrator Role = "administrator"
	RoleOperator      Role = "operator"
	RoleViewer        Role = "viewer"
)

// TokenSpec is the definition.
type TokenSpec struct {
	Use TokenUse `json:"use,omitempty" enum:"api,join"`
	// Role of an API token.
	Role Role `json:"role,omitempty" enum:"administrator,operator,viewer"`
	// JoinRole of the node that joins with the token.
	JoinRole NodeRole `json:"joinRole,omitempty" enum:"voter,auto,witness,replica"`
	// Hash is the SHA-256 of the secret in hexadecimal; never shown by REST.
	Hash string `json:"hash,omitempty" readOnly:"true"`
	// ExpiresAt is when the token stops working; zero for never.
	ExpiresAt time.Time `json:"expiresAt,omitzero"`
	// UsedBy is the ID of the node that joined with the token, and UsedKey the
	// SHA-256 of its public key: the same node may finish an interrupted join.
	UsedBy  string `json:"usedBy,omitempty" readOnly:"true"`
	UsedKey string `json:"usedKey,omitempty" readOnly:"true"`
}

// SetDefaults implements Spec.
func (s *TokenSpec) SetDefaults() {
	if s.Use == "" {
		s.Use = TokenAPI
	}
	if s.Use == TokenAPI && s.Role == "" {
		s.Role = RoleViewer
	}
	if s.Use == TokenJoin {
		if role, err := ParseNodeRole("", s.JoinRole); err == nil {
			s.JoinRole = role
		}
	}
}

// Validate implements Spec.
func (s *TokenSpec) Validate() error {
	switch s.Use {
	case TokenAPI:
		switch s.Role {
		case RoleAdministrator, RoleOperator, RoleViewer:
		default:
			return Invalid("spec.role", "is %q; give administrator, operator or viewer", clip(string(s.Role)))
		}
	case TokenJoin:
		if _, err := ParseNodeRole("spec.joinRole", s.JoinRole); err != nil {
			return err
		}
	default:
		return Invalid("spec.use", "is %q; give api or join", clip(string(s.Use)))
	}
	return nil
}

// TokenStatus is empty in this version.
type TokenStatus struct{}

// InitRequest asks the daemon on this host to found a cluster.
type InitRequest struct {
	// Name of the cluster, a DNS label; "muster" when empty.
	Name string `json:"name,omitempty"`
}

// InitResult answers it. The token is shown once and never again.
type InitResult struct {
	Cluster   string `json:"cluster"`
	ClusterID string `json:"clusterID"`
	Node      string `json:"node"`
	Address   string `json:"address"`
	Token     string `json:"token"`
	CACert    string `json:"caCert"`
}

// JoinRequest asks the daemon on this host to join with a token.
type JoinRequest struct {
	Token string `json:"token"`
}

// JoinResult answers it.
type JoinResult struct {
	Cluster   string `json:"cluster"`
	ClusterID string `json:"clusterID"`
	Node      string `json:"node"`
	Address   string `json:"address"`
	CACert    string `json:"caCert"`
}

// JoinTokenRequest asks for a token that lets one node join.
type JoinTokenRequest struct {
	// Role of the new node: voter (default; auto is the same), witness or replica.
	Role NodeRole `json:"role,omitempty" enum:"voter,auto,witness,replica"`
	// TTLSeconds until it expires: 60 to 604800, default 3600.
	TTLSeconds int `json:"ttlSeconds,omitempty"`
}

// TransferRequest asks that a node lead the configuration database.
type TransferRequest struct {
	// Node is the name or ID of a voter that is ready; empty for the one that
	// suits best.
	Node string `json:"node,omitempty"`
}

// TransferResult answers it.
type TransferResult struct {
	Leader string `json:"leader"`
	Term   uint64 `json:"term"`
}

// JoinToken answers it. The token is shown once and works once.
type JoinToken struct {
	Token     string    `json:"token"`
	ExpiresAt time.Time `json:"expiresAt"`
}

// AdmitRequest is sent by a joining node to a member, which it knows by the
// hash in the token.
type AdmitRequest struct {
	// TokenID and Secret are parts of the join token.
	TokenID string `json:"tokenID"`
	Secret  string `json:"secret"`
	// CSR is the node's certificate request, PEM (PKCS #10).
	CSR string `json:"csr"`
	// NodeID is set by a node that is a member already and comes back after the
	// authority that it knows was replaced; ProofKey and ProofSignature then show
	// that it has the key of its last certificate.
	NodeID         string `json:"nodeID,omitempty"`
	ProofKey       []byte `json:"proofKey,omitempty"`
	ProofSignature []byte `json:"proofSignature,omitempty"`
	// Node is the wished name and Address the host:port others reach it at.
	Node    string `json:"node"`
	Address string `json:"address"`
	Version string `json:"version"`
	// FeatureLevels that the node's software supports; nil is the first alone.
	FeatureLevels *FeatureLevels `json:"featureLevels,omitempty"`
}

// AdmitResult carries what a node needs to be a member.
type AdmitResult struct {
	ClusterID  string `json:"clusterID"`
	Cluster    string `json:"cluster"`
	NodeID     string `json:"nodeID"`
	CACert     string `json:"caCert"`
	Cert       string `json:"cert"`
	ClusterKey []byte `json:"clusterKey"`
	// Authority is a copy of what the cluster object says of the authority, its
	// sealed key included, as the node keeps it.
	Authority []byte   `json:"authority,omitempty"`
	Role      NodeRole `json:"role"`
	// Life of the cluster, which the node's connections carry.
	Life uint64 `json:"life,omitempty"`
	// Peers are the members, as "id@host:port".
	Peers []string `json:"peers"`
}

// ClusterStatus is the cluster as one node sees it.
type ClusterStatus struct {
	Cluster   string `json:"cluster"`
	ClusterID string `json:"clusterID"`
	// Life counts the recoveries from lost quorum, beginning with 1.
	Life uint64 `json:"life"`
	// Node is who answers.
	Node string `json:"node"`
	// Leader is the name of the leader, empty when none is known.
	Leader string `json:"leader"`
	Term   uint64 `json:"term"`
	// Revision that this node has applied.
	Revision uint64 `json:"revision"`
	// Quorum is whether a majority answers; StaleSeconds how old this node's
	// replica may be.
	Quorum bool `json:"quorum"`
	// NoQuorum is set while this node reaches no majority.
	NoQuorum     *QuorumLoss    `json:"noQuorum,omitempty"`
	StaleSeconds float64        `json:"staleSeconds"`
	Members      []MemberStatus `json:"members"`
	// CARotation is the phase of a replacement of the authority under way.
	CARotation CAPhase `json:"caRotation,omitempty"`
	// FeatureLevel of the cluster; nil while this node does not know it yet.
	FeatureLevel *FeatureLevelStatus `json:"featureLevel,omitempty"`
	// CPUBaseline is what VMs with the CPU model cluster get; nil before the nodes
	// have told their CPUs.
	CPUBaseline *CPUBaselineStatus `json:"cpuBaseline,omitempty"`
}

// MemberStatus is one member of the configuration database.
type MemberStatus struct {
	NodeID  string    `json:"nodeID"`
	Node    string    `json:"node"`
	Address string    `json:"address"`
	Voter   bool      `json:"voter"`
	Leader  bool      `json:"leader"`
	Role    NodeRole  `json:"role,omitempty"`
	Phase   NodePhase `json:"phase,omitempty"`
	// Gossip is what the node that answers heard of this one: a hint.
	Gossip *GossipHint `json:"gossip,omitempty"`
	// CertificateEnds is when its certificate ends, as it last reported.
	CertificateEnds *time.Time `json:"certificateEnds,omitempty"`
	// Version of its software and the feature levels that it supports, as it last
	// reported.
	Version       string         `json:"version,omitempty"`
	FeatureLevels *FeatureLevels `json:"featureLevels,omitempty"`
}
