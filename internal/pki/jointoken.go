// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package pki

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// joinPrefix begins every join token; the digit is its format.
const joinPrefix = "muster-join1."

// JoinToken is what a joining node must know: whom to ask, how to recognise
// the cluster, and a secret that works once.
type JoinToken struct {
	ClusterID string `json:"c"`
	CAHash    string `json:"h"`
	// OtherCAHash is set while the authority is being replaced: by either one
	// the cluster may be known.
	OtherCAHash string    `json:"g,omitempty"`
	TokenID     string    `json:"i"`
	Secret      string    `json:"s"`
	Addresses   []string  `json:"a"`
	ExpiresAt   time.Time `json:"e"`
}

// Encode returns the token as one word.
func (t *JoinToken) Encode() (string, error) {
	b, err := json.Marshal(t)
	if err != nil {
		return "", fmt.Errorf("encode join token: %w", err)
	}
	return joinPrefix + base64.RawURLEncoding.EncodeToString(b), nil
}

// ErrBadJoinToken is returned for a word that is no join token.
var ErrBadJoinToken = errors.New("this is not a join token; make one with: muster cluster token create")

// ParseJoinToken reads the word again.
func ParseJoinToken(s string) (*JoinToken, error) {
	enc, ok := strings.CutPrefix(strings.TrimSpace(s), joinPrefix)
	if !ok || len(enc) > 8192 {
		return nil, ErrBadJoinToken
	}
	b, err := base64.RawURLEncoding.DecodeString(enc)
	if err != nil {
		return nil, ErrBadJoinToken
	}
	var t JoinToken
	if err := json.Unmarshal(b, &t); err != nil {
		return nil, ErrBadJoinToken
	}
	if t.ClusterID == "" || t.CAHash == "" || t.TokenID == "" || t.Secret == "" || len(t.Addresses) == 0 {
		return nil, ErrBadJoinToken
	}
	return &t, nil
}
