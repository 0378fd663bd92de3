// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"bytes"
	"context"
	"errors"

	"golang.org/x/crypto/ssh"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/sshkey"
)

// What a login hands on to its connection.
const (
	extKey  = "muster-key"  // wire form of the public key
	extRole = "muster-role" // role at the time of the login
)

// errDenied is all that a client is told: who guesses names learns nothing.
var errDenied = errors.New("permission denied")

// sshConfig returns the rules of a login.
func (s *Server) sshConfig(ctx context.Context) (*ssh.ServerConfig, error) {
	key, err := s.key(ctx)
	if err != nil {
		return nil, err
	}
	cfg := &ssh.ServerConfig{
		MaxAuthTries:  MaxAuthTries,
		ServerVersion: "SSH-2.0-Muster",
		PublicKeyAuthAlgorithms: []string{
			ssh.KeyAlgoED25519, ssh.KeyAlgoSKED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
			ssh.KeyAlgoSKECDSA256, ssh.KeyAlgoRSASHA256, ssh.KeyAlgoRSASHA512,
		},
		PublicKeyCallback: func(meta ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			user, err := s.holder(meta.User(), key)
			if err != nil {
				s.log.Debug("login refused", "user", meta.User(), "source", meta.RemoteAddr(), "key", ssh.FingerprintSHA256(key), "err", err)
				return nil, errDenied
			}
			// A client may try several keys; only what is returned with the one
			// that it proves to have reaches the connection.
			return &ssh.Permissions{Extensions: map[string]string{extKey: string(key.Marshal()), extRole: string(user.Spec.Role)}}, nil
		},
	}
	cfg.AddHostKey(key)
	return cfg, nil
}

// holder returns the user whom a key lets in.
func (s *Server) holder(name string, key ssh.PublicKey) (api.User, error) {
	if api.ValidName("user", name) != nil {
		return api.User{}, errors.New("not a name")
	}
	if err := sshkey.Check(key); err != nil {
		return api.User{}, err
	}
	user, ok := s.cfg.Users(name)
	switch {
	case !ok || user.Meta.Deleting():
		return user, errors.New("no such user")
	case user.Spec.Disabled:
		return user, errors.New("the user is disabled")
	case !knownRole(user.Spec.Role):
		return user, errors.New("the user has no role")
	}
	wire := key.Marshal()
	for _, line := range user.Spec.SSHKeys {
		k, err := sshkey.Parse(line)
		if err == nil && bytes.Equal(k.Marshal(), wire) {
			return user, nil
		}
	}
	return user, errors.New("not a key of the user")
}

func knownRole(r api.Role) bool {
	return r == api.RoleAdministrator || r == api.RoleOperator || r == api.RoleViewer
}

// unwelcome says why the user of a connection would not be let in any more as
// they were, or nothing.
func (s *Server) unwelcome(c *conn) string {
	user, err := s.holder(c.user, c.key)
	switch {
	case err != nil:
		return err.Error()
	case user.Meta.ID != c.userID:
		return "the user was removed"
	case user.Spec.Role != c.role:
		return "the role of the user changed; log in again"
	}
	return ""
}
