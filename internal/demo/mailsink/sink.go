// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"bytes"
	"fmt"
	"io"
	"mime"
	"net/mail"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/emersion/go-smtp"
)

// Limits of a mail.
const (
	maxBytes      = 1 << 20
	maxRecipients = 50
	ioTimeout     = 30 * time.Second
)

// sink keeps mails.
type sink struct {
	dir string
	out io.Writer

	mu    sync.Mutex
	count int
}

// NewSession implements smtp.Backend.
func (s *sink) NewSession(*smtp.Conn) (smtp.Session, error) { return &session{sink: s}, nil }

// keep writes one mail and says so.
func (s *sink) keep(content []byte) error {
	m, err := mail.ReadMessage(bytes.NewReader(content))
	if err != nil {
		return &smtp.SMTPError{Code: 554, EnhancedCode: smtp.EnhancedCode{5, 6, 0}, Message: "not a mail: " + err.Error()}
	}
	subject, err := new(mime.WordDecoder).DecodeHeader(m.Header.Get("Subject"))
	if err != nil {
		subject = m.Header.Get("Subject")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	path := filepath.Join(s.dir, fmt.Sprintf("%d.eml", s.count+1))
	if err := os.WriteFile(path+".part", content, 0o600); err != nil {
		return err
	}
	if err := os.Rename(path+".part", path); err != nil {
		return err
	}
	s.count++
	_, err = fmt.Fprintf(s.out, "%d %s %s\n", s.count, word(m.Header.Get("X-Muster-Phase")), strings.Join(strings.Fields(subject), " "))
	return err
}

// word makes one word of a header's value.
func word(s string) string {
	if f := strings.Fields(s); len(f) == 1 {
		return f[0]
	}
	return "-"
}

// session is one connection.
type session struct {
	sink     *sink
	from, to string
}

// Reset implements smtp.Session.
func (s *session) Reset() { s.from, s.to = "", "" }

// Logout implements smtp.Session.
func (s *session) Logout() error { return nil }

// Mail implements smtp.Session.
func (s *session) Mail(from string, _ *smtp.MailOptions) error {
	s.from = from
	return nil
}

// Rcpt implements smtp.Session.
func (s *session) Rcpt(to string, _ *smtp.RcptOptions) error {
	s.to += "Delivered-To: " + to + "\r\n"
	return nil
}

// Data implements smtp.Session.
func (s *session) Data(r io.Reader) error {
	content, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	envelope := "Return-Path: <" + s.from + ">\r\n" + s.to
	return s.sink.keep(append([]byte(envelope), content...))
}
