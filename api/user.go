// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "strings"

// User is a person who logs in to the console shell with a key.
type User = Object[UserSpec, UserStatus]

// UserStatus is what the cluster observes: nothing yet.
type UserStatus struct{}

// Limits of a user.
const (
	MaxSSHKeys      = 16
	MaxSSHKeyLength = 16 << 10
)

// UserSpec is the definition.
type UserSpec struct {
	Role Role `json:"role,omitempty" enum:"administrator,operator,viewer"`
	// SSHKeys are public keys in the form of authorized_keys, without options;
	// at most 16.
	SSHKeys  []string `json:"sshKeys,omitempty" maxItems:"16"`
	FullName string   `json:"fullName,omitempty" maxLength:"200"`
	Disabled bool     `json:"disabled,omitempty"`
}

// SetDefaults implements Spec.
func (s *UserSpec) SetDefaults() {
	if s.Role == "" {
		s.Role = RoleViewer
	}
}

// Validate implements Spec. Whether a key can be parsed is checked where keys
// are understood.
func (s *UserSpec) Validate() error {
	switch s.Role {
	case RoleAdministrator, RoleOperator, RoleViewer:
	default:
		return Invalid("spec.role", "is %q; give administrator, operator or viewer", clip(string(s.Role)))
	}
	if len(s.SSHKeys) > MaxSSHKeys {
		return Invalid("spec.sshKeys", "has %d keys; at most %d are allowed", len(s.SSHKeys), MaxSSHKeys)
	}
	for _, k := range s.SSHKeys {
		if len(k) > MaxSSHKeyLength || strings.ContainsAny(k, "\r\n") {
			return Invalid("spec.sshKeys", "a key must be one line of at most %d characters", MaxSSHKeyLength)
		}
	}
	return nil
}
