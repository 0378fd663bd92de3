// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/cli"
)

// A bug that one client meets ends what that client has, and nothing else.

func TestABugInALoginEndsThatLoginOnly(t *testing.T) {
	f := newFixture(t, func(c *Config) {
		users := c.Users
		c.Users = func(name string) (api.User, bool) {
			if name == "guest" {
				panic("a bug of this user")
			}
			return users(name)
		}
	})
	for range 3 {
		if _, _, code := f.run(login{user: "guest"}, "vm", "ls"); code != 255 {
			t.Errorf("code %d", code)
		}
		if _, errOut, code := f.run(login{}, "vm", "ls"); code != 0 {
			t.Errorf("code %d, %s", code, errOut)
		}
	}
	await(t, "no login is counted any more", func() bool {
		f.srv.mu.Lock()
		defer f.srv.mu.Unlock()
		return f.srv.shaking == 0 && len(f.srv.logins) == 0
	})
}

func TestABugInASessionEndsThatSessionOnly(t *testing.T) {
	var bad atomic.Bool
	f := newFixture(t, func(c *Config) {
		c.Cluster = func() string { // for the prompt
			if bad.Load() {
				panic("a bug of the prompt")
			}
			return "demo"
		}
	})
	good, victim := f.shell(login{}), f.shell(login{})
	bad.Store(true)
	victim.send("vm ls\r")
	if code := victim.exit(); code != cli.ExitFailed {
		t.Errorf("code %d", code)
	}
	bad.Store(false)
	good.send("vm ls -o name\r")
	good.expect("vm/web1")
	good.expect(prompt)
}

// If the server cannot find out whether a user is still welcome, they are not.
func TestABugInTheRecheckEndsTheSession(t *testing.T) {
	var bad atomic.Bool
	f := newFixture(t, func(c *Config) {
		users := c.Users
		c.Users = func(name string) (api.User, bool) {
			if name == "guest" && bad.Load() {
				panic("a bug of this user")
			}
			return users(name)
		}
	})
	good := f.shell(login{})
	s := f.onScreen(login{user: "guest", options: []string{"-tt"}})
	s.expect("guest@demo:m1> ")
	bad.Store(true)
	s.expect("session ended: ")
	s.exit()
	time.Sleep(3 * f.srv.cfg.Recheck)
	good.send("vm ls -o name\r")
	good.expect("vm/web1")
}

// A connection over the limit that the client keeps open is closed: it is
// counted nowhere.
func TestAConnectionOverTheLimitIsClosed(t *testing.T) {
	f := newFixture(t)
	f.srv.mu.Lock()
	f.srv.perUser["admin"] = MaxConnectionsPerUser
	f.srv.mu.Unlock()
	b, err := os.ReadFile(filepath.Join(f.dir, "admin"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.ParsePrivateKey(b)
	if err != nil {
		t.Fatal(err)
	}
	c, err := ssh.Dial("tcp", net.JoinHostPort("127.0.0.1", f.port), &ssh.ClientConfig{
		User: "admin", Auth: []ssh.AuthMethod{ssh.PublicKeys(key)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(), //nolint:gosec // of this test
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if _, err := c.NewSession(); err == nil || !strings.Contains(err.Error(), "admin has 16 sessions") {
		t.Errorf("a session: %v", err)
	}
	closed := make(chan struct{})
	go func() { defer close(closed); _ = c.Wait() }()
	select {
	case <-closed:
	case <-time.After(patience):
		t.Errorf("the connection is still open after %s", patience)
	}
}
