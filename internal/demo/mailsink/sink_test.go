// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

import (
	"context"
	"net"
	"net/smtp"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestMailsBecomeFilesAndLines(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var out strings.Builder
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, ln, dir, &out) }()

	send := func(content string) error {
		return smtp.SendMail(ln.Addr().String(), nil, "muster@example.org", []string{"a@example.org", "b@example.org"}, []byte(content))
	}
	head := "Subject: =?UTF-8?q?node_m1_is_lost=E2=80=A6?=\r\n folded\r\nX-Muster-Phase: firing\r\n\r\n"
	if err := send(head + "restarted elsewhere: web1\r\n.a line with a dot\r\n"); err != nil {
		t.Fatal(err)
	}
	if err := send("no mail at all"); err == nil || !strings.Contains(err.Error(), "554") {
		t.Errorf("what is no mail was taken: %v", err)
	}
	if err := send("Subject: x\r\n\r\n" + strings.Repeat("long\r\n", maxBytes/6+1)); err == nil {
		t.Error("a mail without end was taken")
	}
	if err := send("Subject: second\r\n\r\nx\r\n"); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if want := "1 firing node m1 is lost… folded\n2 - second\n"; out.String() != want {
		t.Errorf("said %q, want %q", out.String(), want)
	}
	b, err := os.ReadFile(filepath.Join(dir, "1.eml"))
	want := "Return-Path: <muster@example.org>\r\nDelivered-To: a@example.org\r\nDelivered-To: b@example.org\r\n" + head + "restarted elsewhere: web1\r\n.a line with a dot\r\n"
	if err != nil || string(b) != want {
		t.Errorf("kept %q, %v, want %q", b, err, want)
	}
	if files, _ := os.ReadDir(dir); len(files) != 2 {
		t.Errorf("%d files, want 2: %v", len(files), files)
	}
}
