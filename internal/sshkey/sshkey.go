// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package sshkey

import (
	"bytes"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"unicode"

	"golang.org/x/crypto/ssh"
)

// MinRSABits is the shortest RSA key that is accepted (NIST SP 800-57: 112
// bits of security); MaxRSABits bounds the work that a login can cost.
const (
	MinRSABits = 2048
	MaxRSABits = 16384
)

// Types are the key types that are accepted.
func Types() []string {
	return []string{
		ssh.KeyAlgoED25519, ssh.KeyAlgoSKED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
		ssh.KeyAlgoSKECDSA256, ssh.KeyAlgoRSA,
	}
}

// Key is one public key.
type Key struct {
	ssh.PublicKey
	Comment string
}

// Parse reads one line in the form of authorized_keys: type, key and a comment.
// Options are refused, since none of them would be obeyed.
func Parse(line string) (Key, error) {
	line = strings.TrimSpace(line)
	if strings.ContainsFunc(line, func(r rune) bool { return unicode.IsControl(r) && r != '\t' }) {
		return Key{}, errors.New("holds control characters; give one line as in a .pub file")
	}
	if strings.Contains(line, "PRIVATE KEY") {
		return Key{}, errors.New("is a private key, which must never leave your computer; give the content of the .pub file")
	}
	pub, comment, options, rest, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil {
		return Key{}, errors.New("is no public key; give one line as in a .pub file: TYPE KEY COMMENT")
	}
	if len(options) > 0 {
		return Key{}, errors.New("has options in front of the key, which are not supported; leave them out")
	}
	if len(bytes.TrimSpace(rest)) > 0 {
		return Key{}, errors.New("holds more than one key; give one line for each")
	}
	return Key{PublicKey: pub, Comment: comment}, Check(pub)
}

// Check refuses keys that are too weak or of a kind that is not supported.
func Check(pub ssh.PublicKey) error {
	switch {
	case pub.Type() == ssh.InsecureKeyAlgoDSA: //nolint:staticcheck // named to be refused
		return errors.New("is a DSA key, which is too weak; make another: ssh-keygen -t ed25519")
	case !supported(pub.Type()):
		return fmt.Errorf("has the type %s, which is not supported; make another: ssh-keygen -t ed25519", pub.Type())
	case pub.Type() != ssh.KeyAlgoRSA:
		return nil
	}
	crypto, ok := pub.(ssh.CryptoPublicKey)
	if !ok {
		return errors.New("is an RSA key that cannot be examined")
	}
	key, ok := crypto.CryptoPublicKey().(*rsa.PublicKey)
	if !ok {
		return errors.New("is an RSA key that cannot be examined")
	}
	if bits := key.N.BitLen(); bits < MinRSABits || bits > MaxRSABits {
		return fmt.Errorf("is an RSA key of %d bits; %d to %d are accepted; make another: ssh-keygen -t ed25519", bits, MinRSABits, MaxRSABits)
	}
	return nil
}

func supported(keyType string) bool {
	for _, t := range Types() {
		if t == keyType {
			return true
		}
	}
	return false
}

// Line returns the key as it is stored: type, key and comment.
func (k Key) Line() string {
	line := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(k.PublicKey)))
	if k.Comment != "" {
		line += " " + k.Comment
	}
	return line
}

// Hash is a text that stands for the key in the names of claims: the SHA-256
// of its wire form in hexadecimal digits.
func (k Key) Hash() string {
	sum := sha256.Sum256(k.Marshal())
	return hex.EncodeToString(sum[:])
}

// Fingerprint as ssh-keygen -l prints it.
func (k Key) Fingerprint() string { return ssh.FingerprintSHA256(k.PublicKey) }
