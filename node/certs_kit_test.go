// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
	"github.com/muster-vm/muster/internal/pki"
)

// writer writes to the cluster without a pause, as a careful client does: it
// goes to the next node when one is down, and gives each write a deadline.
type writer struct {
	f      *flock
	mu     sync.Mutex
	c      *client.Client
	stop   context.CancelFunc
	ended  sync.WaitGroup
	writes int
	failed []string
	worst  time.Duration
}

// writeDeadline bounds one write; an election is over in a second.
const writeDeadline = 20 * time.Second

// keepWriting begins; ca is the file that the client trusts.
func (f *flock) keepWriting(ca string) *writer {
	f.t.Helper()
	w := &writer{f: f}
	w.trust(ca)
	ctx, stop := context.WithCancel(context.Background())
	w.stop = stop
	for i := range 4 {
		w.ended.Go(func() { w.run(ctx, fmt.Sprintf("writer/%d", i)) })
	}
	f.t.Cleanup(func() { w.end() })
	return w
}

// trust gives the client another ca.crt, as an administrator does.
func (w *writer) trust(ca string) {
	w.f.t.Helper()
	b, err := os.ReadFile(ca)
	if err != nil {
		w.f.t.Fatal(err)
	}
	var servers []string
	for _, h := range w.f.nodes {
		servers = append(servers, "https://"+h.addr)
	}
	c, err := client.New(client.Config{Servers: servers, Token: w.f.token, CACert: b})
	if err != nil {
		w.f.t.Fatal(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.c = c
}

func (w *writer) run(ctx context.Context, key string) {
	for i := 0; ctx.Err() == nil; i++ {
		w.mu.Lock()
		c := w.c
		w.mu.Unlock()
		value := fmt.Sprint(i)
		wctx, cancel := context.WithTimeout(context.Background(), writeDeadline)
		began := time.Now()
		_, err := c.Do(wctx, client.Request{Method: http.MethodPut, Path: "/raw/" + key, Body: []byte(value)})
		cancel()
		if i%20 == 0 {
			c.Close() // so that there are new handshakes all the time
		}
		w.mu.Lock()
		w.writes++
		w.worst = max(w.worst, time.Since(began))
		if err != nil {
			w.failed = append(w.failed, fmt.Sprintf("%s at %s: %v", key, time.Now().Format("15:04:05.000"), err))
		}
		w.mu.Unlock()
	}
}

// end stops and reports.
func (w *writer) end() {
	w.stop()
	w.ended.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.failed) > 0 {
		w.f.t.Errorf("%d of %d writes failed, such as %s", len(w.failed), w.writes, strings.Join(w.failed[:min(3, len(w.failed))], "; "))
	}
	if w.writes > 0 {
		w.f.t.Logf("%d writes, the slowest took %v", w.writes, w.worst)
		w.writes, w.failed = 0, nil
	}
}

func (w *writer) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.writes
}

// cert is a node's certificate as it reports it.
func (h *host) cert(name string) api.CertificateStatus {
	h.f.t.Helper()
	c := h.node(name).Status.Certificate
	if c == nil {
		return api.CertificateStatus{}
	}
	return *c
}

// term is the Raft term as this host knows it.
func (h *host) term() uint64 {
	h.f.t.Helper()
	var st api.ClusterStatus
	h.f.decode(h.run("cluster", "status", "-o", "json"), &st)
	return st.Term
}

func (h *host) authority() (s api.AuthorityStatus) {
	h.f.t.Helper()
	h.f.decode(h.run("cluster", "ca", "show", "-o", "json"), &s)
	return s
}

// certified waits until all nodes have reported a certificate.
func (f *flock) certified(at *host) {
	f.t.Helper()
	f.eventually(60*time.Second, "all nodes report their certificates", func() error {
		for _, h := range f.nodes {
			if at.cert(h.name).Serial == "" {
				return fmt.Errorf("%s has not", h.name)
			}
		}
		return nil
	})
}

// phase waits until the rotation is in a phase and all nodes have done what it
// asks, but for some.
func (f *flock) phase(at *host, want api.CAPhase, but ...string) {
	f.t.Helper()
	f.eventually(60*time.Second, fmt.Sprintf("the rotation is in phase %q", want), func() error {
		r := at.try("cluster", "ca", "show", "-o", "json")
		var s api.AuthorityStatus
		if r.code != 0 || json.Unmarshal([]byte(r.stdout), &s) != nil {
			return fmt.Errorf("exit %d: %s", r.code, r.stderr)
		}
		lacking := append(slices.Clone(s.WaitingFor), s.Away...)
		if slices.Sort(lacking); s.Phase != want || !slices.Equal(lacking, but) {
			return fmt.Errorf("phase %q, waiting for %v, away %v, %s", s.Phase, s.WaitingFor, s.Away, s.Next)
		}
		return nil
	})
}

// pem writes what clients are to trust now into a file.
func (h *host) pem(name string) string {
	h.f.t.Helper()
	path := filepath.Join(h.f.dir, name)
	if err := os.WriteFile(path, []byte(h.run("cluster", "ca", "show", "--pem")), 0o600); err != nil {
		h.f.t.Fatal(err)
	}
	return path
}

// trusting is this host seen by a client with another ca.crt.
func (h *host) trusting(ca string) *host {
	f := *h.f
	f.ca = ca
	c := *h
	c.f = &f
	return &c
}

func (h *host) file(name string) []byte {
	h.f.t.Helper()
	b, err := os.ReadFile(filepath.Join(h.dataDir, name))
	if err != nil {
		h.f.t.Fatal(err)
	}
	return b
}

func (h *host) leaf() *x509.Certificate {
	h.f.t.Helper()
	c, err := pki.ParseCert(h.file("node.crt"))
	if err != nil {
		h.f.t.Fatal(err)
	}
	return c
}

// noSecrets looks for key material in all logs.
func (f *flock) noSecrets() {
	f.t.Helper()
	for _, h := range f.nodes {
		log := h.log()
		for _, name := range []string{"node.key", "cluster.key", "authority.json"} {
			secret := h.file(name)
			for what, text := range map[string]string{
				"as it is": string(secret), "a line of it": longestLine(string(secret)), "hexadecimal": fmt.Sprintf("%x", secret), "as numbers": strings.Trim(fmt.Sprintf("%d", secret), "[]"),
			} {
				if len(text) > 16 && strings.Contains(log, text) {
					f.t.Errorf("the log of %s has %s, %s", h.name, name, what)
				}
			}
		}
		if strings.Contains(log, "PRIVATE KEY") {
			f.t.Errorf("the log of %s has a private key", h.name)
		}
	}
}

func longestLine(text string) string {
	best := ""
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); len(line) > len(best) {
			best = line
		}
	}
	return best
}

func (f *flock) secretModes(t *testing.T) {
	t.Helper()
	for _, h := range f.nodes {
		for _, name := range []string{"node.key", "cluster.key", "authority.json", "node.json"} {
			st, err := os.Stat(filepath.Join(h.dataDir, name))
			if err != nil || st.Mode().Perm() != 0o600 {
				t.Errorf("%s of %s: %v, %v", name, h.name, st.Mode(), err)
			}
		}
		if left, _ := filepath.Glob(filepath.Join(h.dataDir, "*.new")); len(left) > 0 {
			t.Errorf("left behind on %s: %v", h.name, left)
		}
	}
}
