// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package notify

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/freeport"
)

// trapDaemon is Debian's snmptrapd on loopback with our MIB.
type trapDaemon struct {
	addr string

	mu    sync.Mutex
	lines []string
}

func (d *trapDaemon) wait(t *testing.T, text string) string {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for time.Now().Before(deadline) {
		d.mu.Lock()
		for _, l := range d.lines {
			if strings.Contains(l, text) {
				d.mu.Unlock()
				return l
			}
		}
		d.mu.Unlock()
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("snmptrapd did not print %q; it printed %q", text, d.lines)
	return ""
}

func (d *trapDaemon) count(text string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := 0
	for _, l := range d.lines {
		if strings.Contains(l, text) {
			n++
		}
	}
	return n
}

func startTrapDaemon(t *testing.T, engine string) *trapDaemon {
	t.Helper()
	dir := t.TempDir()
	d := &trapDaemon{addr: freeport.Loopback(t)}
	conf := filepath.Join(dir, "snmptrapd.conf")
	text := "authCommunity log secret-community\n" +
		fmt.Sprintf("createUser -e 0x%s trapper SHA \"a long pass phrase\" AES \"a long pass phrase\"\nauthUser log trapper priv\n", hex.EncodeToString([]byte(engine)))
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("snmptrapd", "-f", "-Lo", "-C", "-c", conf, "-M", "../snmp/base:../snmp", "-m", "MUSTER-MIB", "-p", filepath.Join(dir, "pid"), "udp:"+d.addr)
	cmd.Env = append(os.Environ(), "SNMP_PERSISTENT_DIR="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatalf("start snmptrapd (Debian package snmptrapd): %v", err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		sc := bufio.NewScanner(out)
		for sc.Scan() {
			d.mu.Lock()
			d.lines = append(d.lines, sc.Text())
			d.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
		_ = cmd.Wait()
	})
	d.wait(t, "NET-SNMP version")
	return d
}

func TestSnmptrapdReceivesNotifications(t *testing.T) {
	d := startTrapDaemon(t, TrapEngineID("c1"))
	s := testSender()
	s.Begin(7)
	v2 := Receiver{Name: "nms", Secret: "secret-community", Spec: api.ReceiverSpec{Type: api.ReceiverSNMP, Address: d.addr, Version: "2c"}}
	v3 := Receiver{Name: "nms3", Secret: "a long pass phrase", Spec: api.ReceiverSpec{Type: api.ReceiverSNMP, Address: d.addr, Version: "3", User: "trapper"}}
	send := func(s *Sender, r Receiver, m Message) {
		t.Helper()
		if err := s.Send(t.Context(), r, m); err != nil {
			t.Fatal(err)
		}
	}
	for end := time.Now().Add(20 * time.Second); d.count("web1 on m3") == 0 && time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		send(s, v2, testMessage("node m1 is lost; restarted elsewhere: web1 on m3")) // it may not listen yet
	}
	line := d.wait(t, "web1 on m3")
	for _, want := range []string{"OID: MUSTER-MIB::musterAlertFiring", "MUSTER-MIB::musterAlertRule", "STRING: rule-0", "INTEGER: critical(3)", "STRING: node m1", "MUSTER-MIB::musterClusterName.0 = STRING: prod"} {
		if !strings.Contains(line, want) {
			t.Errorf("the trap lacks %q: %s", want, line)
		}
	}
	send(s, v3, testMessage("over v3"))
	if l := d.wait(t, "STRING: over v3"); !strings.Contains(l, "MUSTER-MIB::musterAlertFiring") {
		t.Errorf("the trap is %s", l)
	}
	// Another node leads: a new process in a later term.
	next := testSender()
	next.Begin(8)
	m := testMessage("from the next leader")
	m.Items[0].Phase, m.Items[0].ResolvedAt = api.AlertResolved, m.At
	send(next, v3, m)
	if l := d.wait(t, "from the next leader"); !strings.Contains(l, "MUSTER-MIB::musterAlertResolved") || !strings.Contains(l, "resolved(3)") {
		t.Errorf("the trap is %s", l)
	}
	// Wrong secrets are UDP: sent, and not taken by the daemon.
	v2.Secret, v3.Secret = "public", "another pass phrase"
	send(s, v2, testMessage("wrong secret"))
	send(next, v3, testMessage("wrong secret"))
	v2.Secret = "secret-community"
	send(s, v2, testMessage("the last one"))
	d.wait(t, "the last one")
	if n := d.count("wrong secret"); n != 0 {
		t.Errorf("%d traps with a wrong secret were taken", n)
	}
}

// sink is a mail server that demands authentication.
type sink struct {
	open    bool           // to anybody
	refuses map[string]int // code by recipient

	mu    sync.Mutex
	mails []string
	users []string
	to    [][]string
}

func (s *sink) NewSession(*smtp.Conn) (smtp.Session, error) { return &sinkSession{sink: s}, nil }

type sinkSession struct {
	sink *sink
	user string
	to   []string
}

func (s *sinkSession) Reset()        { s.to = nil }
func (s *sinkSession) Logout() error { return nil }
func (s *sinkSession) Mail(string, *smtp.MailOptions) error {
	if s.user == "" && !s.sink.open {
		return smtp.ErrAuthRequired
	}
	return nil
}

func (s *sinkSession) Rcpt(to string, _ *smtp.RcptOptions) error {
	if code := s.sink.refuses[to]; code != 0 {
		return &smtp.SMTPError{Code: code, EnhancedCode: smtp.EnhancedCode{code / 100, 1, 1}, Message: "not here"}
	}
	s.to = append(s.to, to)
	return nil
}

func (s *sinkSession) AuthMechanisms() []string { return []string{sasl.Plain} }
func (s *sinkSession) Auth(string) (sasl.Server, error) {
	return sasl.NewPlainServer(func(_, user, password string) error {
		if user != "muster" || password != "the password" {
			return smtp.ErrAuthFailed
		}
		s.user = user
		return nil
	}), nil
}

func (s *sinkSession) Data(r io.Reader) error {
	b, err := io.ReadAll(r)
	s.sink.mu.Lock()
	defer s.sink.mu.Unlock()
	s.sink.mails, s.sink.users, s.sink.to = append(s.sink.mails, string(b)), append(s.sink.users, s.user), append(s.sink.to, s.to)
	return err
}

// certificate for 127.0.0.1, signed by itself.
func certificate(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}

func TestMailOverTLSWithAuthentication(t *testing.T) {
	cert, pool := certificate(t)
	for _, mode := range []string{"starttls", "tls", "none"} {
		t.Run(mode, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			addr := ln.Addr().String()
			store := &sink{}
			srv := smtp.NewServer(store)
			srv.Domain, srv.AllowInsecureAuth = "localhost", mode == "none"
			conf := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
			switch mode {
			case "starttls":
				srv.TLSConfig = conf
			case "tls":
				ln = tls.NewListener(ln, conf)
			}
			done := make(chan struct{})
			go func() { defer close(done); _ = srv.Serve(ln) }()
			t.Cleanup(func() { _ = srv.Close(); <-done })
			r := Receiver{Name: "ops", Secret: "the password", Spec: api.ReceiverSpec{
				Type: api.ReceiverSMTP, Address: addr, TLS: mode, From: "muster@example.org", To: []string{"a@example.org", "b@example.org"}, User: "muster",
			}}
			s := testSender()
			if mode != "none" {
				if err := s.Send(t.Context(), r, testMessage("x")); err == nil || !strings.Contains(err.Error(), "certificate") {
					t.Errorf("a certificate of nobody was taken: %v", err)
				}
			}
			s.roots = pool
			if err := s.Send(t.Context(), r, testMessage("node m1 is lost", "pool fast is full")); err != nil {
				t.Fatal(err)
			}
			store.mu.Lock()
			if len(store.mails) != 1 || store.users[0] != "muster" || !strings.Contains(store.mails[0], "pool fast is full") || !strings.Contains(store.mails[0], "Importance: high") {
				t.Errorf("mails %q by %q", store.mails, store.users)
			}
			store.mu.Unlock()
			r.Secret = "something else"
			if err := s.Send(t.Context(), r, testMessage("x")); err == nil || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a wrong password: %v", err)
			}
		})
	}
}

// A service that its supervisor starts again leads in the same term: to the
// manager, the time of the engine must not go back.
func TestTheEnginesTimeGoesOnInATerm(t *testing.T) {
	d := startTrapDaemon(t, TrapEngineID("c1"))
	s := testSender()
	s.Begin(7)
	s.began.Store(time.Now().Add(-time.Hour).UnixNano()) // it has led for an hour
	v3 := Receiver{Name: "nms3", Secret: "a long pass phrase", Spec: api.ReceiverSpec{Type: api.ReceiverSNMP, Address: d.addr, Version: "3", User: "trapper"}}
	for _, text := range []string{"before the restart", "after the restart"} {
		if err := s.Send(t.Context(), v3, testMessage(text)); err != nil {
			t.Fatal(err)
		}
		d.wait(t, text)
		s.Begin(7)
	}
}

// TestOneWhoLeftKeepsNobodyUninformed: a mail server that refuses one of the
// people for good must not keep the others from being told.
func TestOneWhoLeftKeepsNobodyUninformed(t *testing.T) {
	people := []string{"ann@example.org", "gone@example.org", "bob@example.org"}
	for name, tc := range map[string]struct {
		refuses map[string]int
		sent    string // recipients
		partial bool
	}{
		"one is refused for good":   {map[string]int{"gone@example.org": 550}, "ann@example.org bob@example.org", true},
		"one is refused for now":    {map[string]int{"gone@example.org": 450}, "", false},
		"one for good, one for now": {map[string]int{"gone@example.org": 550, "bob@example.org": 451}, "", false},
		"all are refused for good":  {map[string]int{"ann@example.org": 550, "gone@example.org": 550, "bob@example.org": 553}, "", false},
		"all are taken":             {nil, strings.Join(people, " "), false},
	} {
		t.Run(name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			store := &sink{open: true, refuses: tc.refuses}
			srv := smtp.NewServer(store)
			srv.Domain = "localhost"
			done := make(chan struct{})
			go func() { defer close(done); _ = srv.Serve(ln) }()
			t.Cleanup(func() { _ = srv.Close(); <-done })
			r := Receiver{Name: "ops", Spec: api.ReceiverSpec{Type: api.ReceiverSMTP, Address: ln.Addr().String(), TLS: "none", From: "muster@example.org", To: people}}
			err = testSender().Send(t.Context(), r, testMessage("node m1 is lost"))
			var partial *Partial
			if errors.As(err, &partial) != tc.partial || (err == nil) != (tc.sent != "" && !tc.partial) {
				t.Errorf("error %v", err)
			}
			if tc.partial && (!strings.Contains(err.Error(), "gone@example.org") || !strings.Contains(err.Error(), "550")) {
				t.Errorf("the error does not say who and why: %v", err)
			}
			store.mu.Lock()
			defer store.mu.Unlock()
			var got []string
			for _, to := range store.to {
				got = append(got, to...)
			}
			if strings.Join(got, " ") != tc.sent || len(store.mails) > 1 {
				t.Errorf("%d mails to %q, want %q", len(store.mails), got, tc.sent)
			}
		})
	}
}
