// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package notify

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/textproto"
	"net/url"
	"strings"
	"unicode"

	"github.com/muster-vm/muster/api"
)

// authFailed is how the errors of go-mail about a refused login begin.
const authFailed = "SMTP AUTH failed"

// minHidden is the shortest part of a webhook's path or query that is taken for
// a secret.
const minHidden = 8

// secrets are what no error may hold: errors are stored, shown and logged. The
// addresses of many chat services are secrets themselves.
func (r *Receiver) secrets() []string {
	out := []string{r.Secret}
	if u, err := url.Parse(r.Spec.Address); err == nil && r.Spec.Type == api.ReceiverWebhook {
		parts := strings.Split(u.Path, "/")
		for _, values := range u.Query() {
			parts = append(parts, values...)
		}
		for _, p := range parts {
			if len(p) >= minHidden {
				out = append(out, p)
			}
		}
	}
	return out
}

// plainError is an error as text that may be stored. What the other side said
// is left out if it repeats a secret, in whatever usual form: it may be hostile.
func (r *Receiver) plainError(err error) string {
	text := err.Error()
	var reply *textproto.Error
	if errors.As(err, &reply) && strings.Contains(text, authFailed) {
		// The server has just been told the password: not a word of its answer.
		return fmt.Sprintf("the mail server refused user %s with that password (code %d)", line(r.Spec.User, maxSubject), reply.Code)
	}
	var address *url.Error
	if errors.As(err, &address) { // it begins with the whole URL
		text = host(r.Spec.Address) + ": " + address.Err.Error()
	}
	for _, secret := range r.secrets() {
		if !repeats(text, secret) {
			continue
		}
		text = "the answer repeats the secret and is not shown"
		if reply != nil {
			text = fmt.Sprintf("the answer with code %d repeats the secret and is not shown", reply.Code)
		}
		if r.Spec.Type == api.ReceiverWebhook {
			text = host(r.Spec.Address) + ": " + text
		}
	}
	return line(text, 2*maxSubject)
}

// repeats reports that a text has a secret in it: as it is, with anything but
// letters and digits added or left out, in hexadecimal or in base64.
func repeats(text, secret string) bool {
	bare := letters(secret)
	if len(bare) < 4 { // anything might hold that
		return secret != "" && strings.Contains(text, secret)
	}
	if strings.Contains(letters(text), bare) || strings.Contains(strings.ToLower(text), hex.EncodeToString([]byte(secret))) {
		return true
	}
	for run := range strings.FieldsFuncSeq(text, func(c rune) bool { return !isBase64(c) }) {
		run = strings.NewReplacer("-", "+", "_", "/").Replace(run)
		// The run may begin with letters of the words before it.
		for skip := range min(4, len(run)) {
			plain, _ := base64.RawStdEncoding.DecodeString(run[skip:]) // as far as it goes
			if strings.Contains(letters(string(plain)), bare) {
				return true
			}
		}
	}
	return false
}

func isBase64(c rune) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("+/-_", c)
}

// letters leaves letters and digits only.
func letters(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsLetter(r) || unicode.IsDigit(r) {
			return r
		}
		return -1
	}, s)
}

// host is what may be said of a webhook's address.
func host(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return "the address"
	}
	return u.Scheme + "://" + u.Host
}
