// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/pki"
)

// The life of certificates with three real daemons and a client that writes all
// the time and must not notice.

func TestRenewalsAndAWholeRotationFailNoWrite(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	for _, h := range f.nodes {
		h.conf["logLevel"] = "debug"
	}
	f.up()
	a, b, c := f.nodes[0], f.nodes[1], f.nodes[2]
	f.certified(a)
	w := f.keepWriting(f.ca) // with the ca.crt of the first day
	term := a.term()
	elections := func(until string) {
		now := a.term()
		t.Logf("elections until %s: %d", until, now-term)
		term = now
	}

	t.Run("an administrator's word renews one node", func(t *testing.T) {
		before, others := a.cert(b.name), a.cert(c.name)
		key := b.file("node.key")
		a.run("node", "renew-certificate", b.name)
		after := c.cert(b.name)
		if after.Serial == before.Serial || pki.Serial(b.leaf()) != after.Serial {
			t.Errorf("serial %s, before %s, in the file %s", after.Serial, before.Serial, pki.Serial(b.leaf()))
		}
		if slices.Equal(key, b.file("node.key")) {
			t.Error("the key is the same")
		}
		if a.cert(c.name).Serial != others.Serial {
			t.Error("another node renewed too")
		}
		if shown := a.run("node", "show", b.name); !strings.Contains(shown, after.Serial) || !strings.Contains(shown, "in 89d") {
			t.Errorf("node show does not say when it ends:\n%s", shown)
		}
		if shown := a.run("cluster", "status"); strings.Count(shown, "in 89d") != 3 {
			t.Errorf("cluster status does not say when they end:\n%s", shown)
		}
	})

	elections("all nodes renew by themselves, again and again")
	t.Run("all nodes renew by themselves, again and again", func(t *testing.T) {
		a.run("cluster", "ca", "set", "--certificate-life", "1m")
		seen := map[string]map[string]bool{}
		f.eventually(150*time.Second, "each node has had three short certificates", func() error {
			for _, h := range f.nodes {
				leaf := h.leaf()
				if pki.Life(leaf) > 2*time.Minute {
					continue
				}
				if seen[h.name] == nil {
					seen[h.name] = map[string]bool{}
				}
				seen[h.name][pki.Serial(leaf)] = true
				if time.Until(leaf.NotAfter) <= 0 {
					t.Fatalf("the certificate of %s ended at %v", h.name, leaf.NotAfter)
				}
			}
			for _, h := range f.nodes {
				if len(seen[h.name]) < 3 {
					return fmt.Errorf("%s has had %d", h.name, len(seen[h.name]))
				}
			}
			return nil
		})
		a.run("cluster", "ca", "set", "--certificate-life", "2160h")
		for _, h := range f.nodes {
			a.run("node", "renew-certificate", h.name)
		}
	})

	token := f.joinToken(a) // made before the rotation
	elections("the authority is replaced")
	t.Run("the authority is replaced", func(t *testing.T) {
		old := a.authority().Authorities[0].Fingerprint
		b.run("cluster", "ca", "rotate")
		f.phase(c, api.CARenew)
		a.refuse(4, "under way already", "cluster", "ca", "rotate")
		s := c.authority()
		if len(s.Authorities) != 2 || s.Authorities[0].Fingerprint == old || s.Authorities[1].Fingerprint != old {
			t.Fatalf("authorities %+v", s.Authorities)
		}
		for _, h := range f.nodes {
			if got := a.cert(h.name); got.Signer != s.Authorities[0].Fingerprint || len(got.Trusts) != 2 {
				t.Errorf("%s: signer %s, trusts %v", h.name, got.Signer, got.Trusts)
			}
			h.run("node", "ls") // a client with the first ca.crt
			if list, err := pki.ParseBundle(h.file("ca.crt")); err != nil || len(list) != 2 {
				t.Errorf("ca.crt of %s has %d authorities, %v", h.name, len(list), err)
			}
		}
	})

	elections("a node joins in the middle with a token from before")
	t.Run("a node joins in the middle with a token from before", func(t *testing.T) {
		d := f.add("n4")
		d.start()
		d.run("cluster", "join", token, "--data-dir", d.dataDir)
		f.eventually(60*time.Second, "it is ready", func() error {
			if p := a.node(d.name).Status.Phase; p != api.NodeReady {
				return fmt.Errorf("%s", p)
			}
			return nil
		})
		f.phase(a, api.CARenew)
	})

	elections("the old authority is dropped")
	t.Run("the old authority is dropped", func(t *testing.T) {
		between := f.joinToken(b)
		both := a.pem("both.crt")
		first := f.ca
		w.trust(both)
		b.run("cluster", "ca", "rotate", "--finish")
		f.ca = a.trusting(both).pem("new.crt")
		w.trust(f.ca)
		defer elections("it is dropped, and a node has joined")
		f.phase(a, "")
		for _, h := range f.nodes {
			f.eventually(60*time.Second, h.name+" has dropped it", func() error {
				if got := a.cert(h.name); len(got.Trusts) != 1 {
					return fmt.Errorf("trusts %v", got.Trusts)
				}
				return nil
			})
			if r := h.trusting(first).try("node", "ls"); r.code != 5 || !strings.Contains(r.stderr, "replaced its authority") {
				t.Errorf("a client with the first ca.crt: exit %d, %s", r.code, r.stderr)
			}
		}
		e := f.add("n5")
		e.start()
		e.refuse(5, "has replaced its authority since", "cluster", "join", token, "--data-dir", e.dataDir)
		e.run("cluster", "join", between, "--data-dir", e.dataDir)
	})
	f.eventually(2*time.Minute, "there were many writes", func() error {
		if n := w.count(); n < 1000 {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	w.end()
	elections("the end")
	f.certified(a)
	f.secretModes(t)
	f.noSecrets()
	for _, h := range f.nodes { // what lies on the disk is whole
		h.stop()
	}
	for _, h := range f.nodes {
		h.start()
	}
	f.eventually(60*time.Second, "all nodes are back after a restart", func() error {
		for _, h := range f.nodes {
			if r := h.try("raw", "put", "after/"+h.name, "x"); r.code != 0 {
				return fmt.Errorf("%s: %s", h.name, r.stderr)
			}
		}
		return nil
	})
}

func TestNodeThatWasOffDuringARotation(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.up()
	a, away := f.nodes[0], f.nodes[2]
	f.certified(a)
	id := a.node(away.name).Meta.ID

	away.stop()
	f.eventually(60*time.Second, "it is lost", func() error {
		if p := a.node(away.name).Status.Phase; p != api.NodeLost {
			return fmt.Errorf("%s", p)
		}
		return nil
	})
	a.run("cluster", "ca", "rotate")
	f.phase(a, api.CARenew, away.name)
	a.refuse(4, "node "+away.name+" has not renewed", "cluster", "ca", "rotate", "--finish")

	away.start()
	f.phase(a, api.CARenew)
	if got, want := a.cert(away.name).Signer, a.authority().Authorities[0].Fingerprint; got != want {
		t.Errorf("it came back under %s, want %s", got, want)
	}
	f.ca = a.pem("new.crt")
	a.run("cluster", "ca", "rotate", "--finish")
	f.phase(a, "")

	// Once more, and this time nobody waits for it.
	away.stop()
	a.run("cluster", "ca", "rotate")
	f.phase(a, api.CARenew, away.name)
	f.ca = a.pem("newer.crt")
	a.run("cluster", "ca", "rotate", "--finish", "--force")
	away.start()
	f.eventually(60*time.Second, "its log names the remedy", func() error {
		if !strings.Contains(away.log(), "muster cluster join TOKEN") {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	token := f.joinToken(a)
	away.run("cluster", "join", token, "--data-dir", away.dataDir)
	f.eventually(60*time.Second, "it is back", func() error {
		n := a.node(away.name)
		if n.Status.Phase != api.NodeReady || n.Meta.ID != id {
			return fmt.Errorf("%s, ID %s", n.Status.Phase, n.Meta.ID)
		}
		return nil
	})
	f.phase(a, "")
	away.run("raw", "put", "back/again", "x")
	away.refuse(4, "already", "cluster", "join", f.joinToken(a), "--data-dir", away.dataDir)
}

func TestLeaderKilledInEachPhaseOfARotation(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.up()
	f.certified(f.nodes[0])
	w := f.keepWriting(f.ca)
	killLeader := func(at *host) (*host, *host) {
		f.voting(60*time.Second, at, 3) // else nobody may lead
		l := f.leader(at)
		l.kill9()
		return l, f.others(l)[0]
	}

	// Trust: a node that is stopped keeps the phase until it is known as lost.
	l := f.leader(f.nodes[0])
	slow := f.others(l)[0]
	slow.signal(syscall.SIGSTOP)
	l.run("cluster", "ca", "rotate")
	if s := l.authority(); s.Phase != api.CATrust || !slices.Contains(s.WaitingFor, slow.name) {
		t.Fatalf("phase %q, waiting for %v", s.Phase, s.WaitingFor)
	}
	l.kill9()
	slow.signal(syscall.SIGCONT)
	f.phase(slow, api.CARenew, l.name)

	// Renew: one node is still away, so it is not over.
	dead, other := killLeaderWith(t, f, l, killLeader)
	f.phase(other, api.CARenew)

	// Finish: right after the word was given.
	f.ca = other.pem("new.crt")
	w.trust(f.ca)
	other.run("cluster", "ca", "rotate", "--finish")
	dead, other = killLeader(dead)
	dead.start()
	f.phase(other, "")

	// Back: aborted after the renewal.
	other.run("cluster", "ca", "rotate")
	f.phase(other, api.CARenew)
	signs := other.authority().Authorities[1].Fingerprint
	other.run("cluster", "ca", "rotate", "--abort")
	dead, other = killLeader(other)
	dead.start()
	f.phase(other, "")
	if s := other.authority(); len(s.Authorities) != 1 || s.Authorities[0].Fingerprint != signs {
		t.Errorf("after the abort: %+v, want %s", s.Authorities, signs)
	}
	for _, h := range f.nodes {
		h.run("node", "ls")
	}
	w.end()
}

// killLeaderWith starts the node that was killed before and, while it catches
// up, kills the leader; then that is started, too.
func killLeaderWith(t *testing.T, f *flock, away *host, kill func(*host) (*host, *host)) (dead, other *host) {
	t.Helper()
	away.start()
	f.eventually(60*time.Second, "it is a follower again", func() error {
		r := away.try("raw", "put", "catch/up", "x")
		if r.code != 0 {
			return fmt.Errorf("%s", r.stderr)
		}
		return nil
	})
	dead, other = kill(away)
	dead.start()
	return dead, other
}

// expired is a certificate for a node's key that ended, signed by the authority
// whose sealed key the node has.
func (h *host) expire(t *testing.T, ended time.Time) {
	t.Helper()
	var stored struct {
		CACert      string `json:"caCert"`
		SealedCAKey []byte `json:"sealedCAKey"`
	}
	h.f.decode(string(h.file("authority.json")), &stored)
	caKey, err := pki.Open(h.file("cluster.key"), "cluster/ca-key", stored.SealedCAKey)
	if err != nil {
		t.Fatal(err)
	}
	leaf := h.leaf()
	id, _ := pki.NodeIDOf(leaf)
	cert, err := pki.Issue([]byte(stored.CACert), caKey, leaf.PublicKey, pki.Terms{NodeID: id, Name: h.name, Host: "127.0.0.1", NotBefore: ended.Add(-time.Hour), NotAfter: ended})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(h.dataDir, "node.crt"), cert, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestNodesComeBackAfterTheirCertificatesEnded(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 3)
	f.up()
	a, b, c := f.nodes[0], f.nodes[1], f.nodes[2]
	f.certified(a)
	ended := time.Now().Add(-time.Minute)

	t.Run("one node", func(t *testing.T) {
		c.stop()
		c.expire(t, ended)
		c.start()
		f.eventually(60*time.Second, "it is back with a new certificate", func() error {
			if n := a.node(c.name); n.Status.Phase != api.NodeReady {
				return fmt.Errorf("%s", n.Status.Phase)
			}
			if leaf := c.leaf(); leaf.NotAfter.Before(time.Now()) {
				return fmt.Errorf("ends %v", leaf.NotAfter)
			}
			return nil
		})
	})
	t.Run("all of them", func(t *testing.T) {
		for _, h := range f.nodes {
			h.stop()
			h.expire(t, ended)
		}
		for _, h := range f.nodes {
			h.start()
		}
		f.eventually(60*time.Second, "the cluster is back with new certificates", func() error {
			for _, h := range f.nodes {
				if r := b.try("raw", "put", "back/"+h.name, "x"); r.code != 0 {
					return fmt.Errorf("%s", r.stderr)
				}
				if leaf := h.leaf(); leaf.NotAfter.Before(time.Now()) {
					return fmt.Errorf("that of %s ended %v", h.name, leaf.NotAfter)
				}
			}
			return nil
		})
	})
	t.Run("one that was removed meanwhile stays out", func(t *testing.T) {
		c.stop()
		c.expire(t, ended)
		f.eventually(60*time.Second, "it is lost", func() error {
			if p := a.node(c.name).Status.Phase; p != api.NodeLost {
				return fmt.Errorf("%s", p)
			}
			return nil
		})
		a.run("node", "remove", c.name, "--force")
		c.spawn() // it may end before anybody sees it
		select {
		case <-c.exited:
			if !strings.Contains(c.log(), "was removed from cluster test") {
				t.Errorf("it ended without saying why:\n%s", c.log())
			}
		case <-time.After(60 * time.Second):
			t.Error("it goes on")
		}
	})
}
