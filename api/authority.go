// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "time"

// CAPhase is where the replacement of the cluster's authority is.
type CAPhase string

// The phases. In trust the authority that signed so far still signs, while all
// nodes learn to trust the next one; in renew the new one signs and all nodes
// renew their certificates. Back is renew after it was aborted.
const (
	CATrust CAPhase = "trust"
	CARenew CAPhase = "renew"
	CABack  CAPhase = "back"
)

// CARotation is the replacement of the cluster's authority under way.
type CARotation struct {
	Phase CAPhase `json:"phase"`
	// CACert is the certificate of the authority that is trusted but does not
	// sign: the next one in phase trust, the former one later.
	CACert      string `json:"caCert"`
	SealedCAKey []byte `json:"sealedCAKey,omitempty"`
	// Bridge is the newer authority's certificate signed by the older one, by
	// which those who trust the older only can verify what the newer signs.
	Bridge    string    `json:"bridge,omitempty"`
	Actor     string    `json:"actor,omitempty"`
	StartedAt time.Time `json:"startedAt"`
}

// CertificateStatus is a node's certificate as the node itself reports it.
type CertificateStatus struct {
	// Serial number in hexadecimal.
	Serial    string    `json:"serial"`
	NotBefore time.Time `json:"notBefore"`
	NotAfter  time.Time `json:"notAfter"`
	// RenewsAt is when the node renews it by itself.
	RenewsAt time.Time `json:"renewsAt"`
	// Signer is the fingerprint of the authority that signed it, Trusts those of
	// the authorities that the node trusts, in order.
	Signer string   `json:"signer"`
	Trusts []string `json:"trusts"`
	// Message says what is wrong and what to do.
	Message string `json:"message,omitempty"`
}

// CertificateLife bounds how long node certificates may last, in seconds.
const (
	MinCertificateSeconds     = 60
	DefaultCertificateSeconds = 90 * 24 * 3600
	MaxCertificateSeconds     = 825 * 24 * 3600
)

// AuthorityStatus is the cluster's authority, or both during a rotation, and
// how far each node is.
type AuthorityStatus struct {
	Cluster string `json:"cluster"`
	// Phase of the rotation under way; empty when there is none.
	Phase     CAPhase    `json:"phase,omitempty"`
	StartedAt *time.Time `json:"startedAt,omitempty"`
	Actor     string     `json:"actor,omitempty"`
	// Authorities that are trusted, the one that signs first.
	Authorities []Authority `json:"authorities"`
	// CertificateSeconds is how long new node certificates last.
	CertificateSeconds int `json:"certificateSeconds"`
	// WaitingFor names the ready nodes that have not yet done what the phase
	// asks of them, Away the others that have not.
	WaitingFor []string `json:"waitingFor"`
	Away       []string `json:"away"`
	// Next says in words what happens next and who does it.
	Next  string            `json:"next"`
	Nodes []NodeCertificate `json:"nodes"`
}

// Authority is one that the cluster trusts.
type Authority struct {
	// Fingerprint is the SHA-256 of the certificate in hexadecimal.
	Fingerprint string    `json:"fingerprint"`
	NotBefore   time.Time `json:"notBefore"`
	NotAfter    time.Time `json:"notAfter"`
	Signs       bool      `json:"signs"`
	// Cert is its certificate, PEM.
	Cert string `json:"cert"`
}

// NodeCertificate is one node's certificate in a list.
type NodeCertificate struct {
	Node  string    `json:"node"`
	Phase NodePhase `json:"phase"`
	// Done is whether the node has done what the phase asks of it.
	Done bool `json:"done"`
	// Certificate is absent when the node has not reported any.
	Certificate *CertificateStatus `json:"certificate,omitempty"`
}

// RotateAction is a step of a rotation that an administrator takes.
type RotateAction string

// The actions.
const (
	RotateStart  RotateAction = "start"
	RotateFinish RotateAction = "finish"
	RotateAbort  RotateAction = "abort"
)

// RotateRequest asks for such a step.
type RotateRequest struct {
	Action RotateAction `json:"action" enum:"start,finish,abort"`
	// Force finishes although some nodes have not renewed, which then need a join
	// token; or starts although clients will have to get the new file first.
	Force bool `json:"force,omitempty"`
}

// AuthoritySettings are what administrators choose.
type AuthoritySettings struct {
	// CertificateSeconds is how long new node certificates last: 60 to 71280000,
	// default 7776000 (90 days).
	CertificateSeconds int `json:"certificateSeconds" minimum:"60" maximum:"71280000"`
}

// Validate checks the bounds.
func (s *AuthoritySettings) Validate() error {
	if s.CertificateSeconds < MinCertificateSeconds || s.CertificateSeconds > MaxCertificateSeconds {
		return Invalid("certificateSeconds", "is %d; give %d to %d", s.CertificateSeconds, MinCertificateSeconds, MaxCertificateSeconds)
	}
	return nil
}
