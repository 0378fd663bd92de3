// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/cli"
)

func TestExec(t *testing.T) {
	f := newFixture(t)
	for name, c := range map[string]struct {
		words       []string
		code        int
		out, errOut string
	}{
		"a table":              {[]string{"vm", "ls"}, 0, "web1", ""},
		"with the word muster": {[]string{"muster", "vm", "ls", "-o", "name"}, 0, "vm/db1\nvm/web1\nvm/web2\n", ""},
		"quotes":               {[]string{`vm show 'web1' -o "name"`}, 0, "vm/web1", ""},
		"help":                 {[]string{"help"}, 0, "Usage:", ""},
		"no such command":      {[]string{"vn", "ls"}, cli.ExitUsage, "", "did you mean"},
		"no such flag":         {[]string{"vm", "ls", "--lable", "x"}, cli.ExitUsage, "", "--labels"},
		"no such object":       {[]string{"vm", "show", "nope"}, cli.ExitNotFound, "", "does not exist"},
		"refused":              {[]string{"vm", "pause", "web1"}, cli.ExitRefused, "", "not running"},
		"open quotes":          {[]string{"vm show 'web1"}, cli.ExitUsage, "", "quotes"},
		"a pipe":               {[]string{"vm ls | sh"}, cli.ExitUsage, "", "pipes"},
		"another program":      {[]string{"/bin/sh", "-c", "id"}, cli.ExitUsage, "", "unknown"},
		"scp":                  {[]string{"scp", "-t", "/tmp"}, cli.ExitUsage, "", "unknown"},
		"a node's file":        {[]string{"apply", "-f", "/etc/shadow"}, cli.ExitRefused, "", "opens no files"},
		"a node's image":       {[]string{"image", "create", "x", "--file", "/etc/shadow"}, cli.ExitRefused, "", "opens no files"},
		"a node's value":       {[]string{"raw", "put", "k", "-f", "/etc/shadow"}, cli.ExitRefused, "", "opens no files"},
		"another server":       {[]string{"vm", "ls", "--server", "unix:///run/x.sock"}, cli.ExitRefused, "", "not available in the shell"},
		"a data directory":     {[]string{"vm", "ls", "--data-dir", "/var/lib/muster"}, cli.ExitRefused, "", "not available"},
		"a CA file":            {[]string{"vm", "ls", "--cacert", "/etc/shadow"}, cli.ExitRefused, "", "not available"},
		"contexts":             {[]string{"context", "ls"}, cli.ExitRefused, "", "your own computer"},
		"docs":                 {[]string{"docs", "--dir", "/tmp/x"}, cli.ExitRefused, "", "your own computer"},
		"init":                 {[]string{"cluster", "init", "--name", "x"}, cli.ExitRefused, "", "host itself"},
		"join":                 {[]string{"cluster", "join", "TOKEN", "--data-dir", "/x"}, cli.ExitRefused, "", "host itself"},
		"cobra's own":          {[]string{"__complete", "vm", "show", "''"}, cli.ExitUsage, "", "unknown"},
		"escapes in messages":  {[]string{"vm", "show", "web1"}, 0, "evil  message", ""},
		"escapes in a log":     {[]string{"vm", "console", "web1", "--log"}, 0, "boot done\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			out, errOut, code := f.run(login{}, c.words...)
			if code != c.code || !strings.Contains(out, c.out) || !strings.Contains(errOut, c.errOut) {
				t.Errorf("code %d, want %d\nstdout %q, want %q\nstderr %q, want %q", code, c.code, out, c.out, errOut, c.errOut)
			}
			if strings.ContainsAny(out+errOut, "\x1b\x07\r") {
				t.Errorf("control characters without a terminal: %q %q", out, errOut)
			}
		})
	}
}

func TestExecJSONIsOneDocument(t *testing.T) {
	f := newFixture(t)
	out, errOut, code := f.run(login{}, "vm", "ls", "-o", "json")
	var list struct{ Items []api.VM }
	if err := json.Unmarshal([]byte(out), &list); code != 0 || err != nil || len(list.Items) != 3 || errOut != "" {
		t.Fatalf("code %d, %v, stderr %q: %s", code, err, errOut, out)
	}
	_, errOut, code = f.run(login{}, "vm", "show", "nope", "-o", "json")
	var p struct{ Code api.Code }
	if err := json.Unmarshal([]byte(errOut), &p); code != cli.ExitNotFound || err != nil || p.Code != api.CodeNotFound {
		t.Fatalf("code %d, %v: %q", code, err, errOut)
	}
	f.rest.mu.Lock()
	defer f.rest.mu.Unlock()
	if !strings.HasPrefix(f.rest.log[0], "user:admin administrator 127.0.0.1:") {
		t.Errorf("the call was %q", f.rest.log[0])
	}
}

func TestStdinReachesTheCommand(t *testing.T) {
	f := newFixture(t)
	content := strings.Repeat("0123456789abcdef", 300_000) // over the window of the channel
	_, errOut, code := f.run(login{stdin: strings.NewReader(content)}, "image", "create", "disk", "--file", "-")
	f.rest.mu.Lock()
	defer f.rest.mu.Unlock()
	if code != 0 || len(f.rest.uploads) != 1 || f.rest.uploads[0] != content {
		t.Errorf("code %d, stderr %q, %d uploads", code, errOut, len(f.rest.uploads))
	}
}

// A client that dies in the middle has not sent the end of its input.
func TestALostClientIsNotTheEndOfAnUpload(t *testing.T) {
	f := newFixture(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	cmd := f.ssh(t.Context(), login{stdin: r}, "image", "create", "disk", "--file", "-")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteString(strings.Repeat("x", 60_000)); err != nil {
		t.Fatal(err)
	}
	await(t, "the upload begins", func() bool {
		f.rest.mu.Lock()
		defer f.rest.mu.Unlock()
		return strings.Contains(strings.Join(f.rest.log, "\n"), "PUT /api/v1/images/disk/content")
	})
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	select {
	case <-f.rest.aborted:
	case <-time.After(patience):
		f.rest.mu.Lock()
		defer f.rest.mu.Unlock()
		t.Fatalf("%d uploads were taken for complete", len(f.rest.uploads))
	}
}

// await waits for what another goroutine does.
func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !is() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not in %s", what, patience)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestLogins(t *testing.T) {
	f := newFixture(t)
	f.newKey("stranger", "-t", "ed25519")
	f.newKey("weak", "-t", "rsa", "-b", "1024")
	f.newKey("strong", "-t", "rsa", "-b", "2048")
	f.newKey("ecdsa", "-t", "ecdsa")
	for _, k := range []string{"weak", "strong", "ecdsa"} {
		f.change("admin", func(u *api.User) { u.Spec.SSHKeys = append(u.Spec.SSHKeys, f.public(k)) })
	}
	f.addUser("gone", api.RoleOperator)
	f.change("gone", func(u *api.User) { u.Spec.Disabled = true })
	for name, c := range map[string]struct {
		l  login
		in bool
	}{
		"the right key":                {login{}, true},
		"an RSA key":                   {login{key: "strong"}, true},
		"an ECDSA key":                 {login{key: "ecdsa"}, true},
		"a wrong key":                  {login{key: "stranger"}, false},
		"a short RSA key":              {login{key: "weak"}, false},
		"another user's key":           {login{key: "guest"}, false},
		"no such user":                 {login{user: "nobody", key: "admin"}, false},
		"a name that is none":          {login{user: "../admin", key: "admin"}, false},
		"a disabled user":              {login{user: "gone"}, false},
		"a password instead of a key":  {login{options: []string{"-o", "PubkeyAuthentication=no"}}, false},
		"no authentication whatsoever": {login{options: []string{"-o", "PreferredAuthentications=none"}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			_, errOut, code := f.run(c.l, "vm", "ls")
			if (code == 0) != c.in {
				t.Errorf("code %d, stderr %q", code, errOut)
			}
			if !c.in && (!strings.Contains(errOut, "Permission denied (publickey)") || strings.Contains(errOut, "disabled")) {
				t.Errorf("stderr %q", errOut)
			}
		})
	}
}

func TestViewerCannotChange(t *testing.T) {
	f := newFixture(t)
	if _, errOut, code := f.run(login{user: "guest"}, "vm", "ls"); code != 0 {
		t.Errorf("code %d, %s", code, errOut)
	}
	_, errOut, code := f.run(login{user: "guest"}, "vm", "start", "web1")
	if code != cli.ExitRefused || !strings.Contains(errOut, "needs the role operator") || strings.Contains(errOut, "token") {
		t.Errorf("code %d, %s", code, errOut)
	}
	if _, errOut, code = f.run(login{user: "guest"}, "vm", "console", "web1"); code != cli.ExitRefused {
		t.Errorf("code %d, %s", code, errOut)
	}
}

func TestHostKeyIsTheClusters(t *testing.T) {
	f := newFixture(t)
	other := f.serve("m2")
	f.run(login{}, "vm", "ls")
	if _, errOut, code := f.run(login{port: other, options: []string{"-o", "StrictHostKeyChecking=yes"}}, "vm", "ls"); code != 0 {
		t.Errorf("the second node: %s", errOut)
	}
	b, err := os.ReadFile(filepath.Join(f.dir, "known_hosts"))
	if err != nil || strings.Count(string(b), "\n") != 1 {
		t.Errorf("%v: %s", err, b)
	}
}

func TestForwardingAndSubsystemsAreRefused(t *testing.T) {
	f := newFixture(t)
	_, errOut, code := f.run(login{options: []string{"-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:1"}}, "vm", "ls")
	if code != 255 || !strings.Contains(errOut, "forwarding failed") {
		t.Errorf("-R: code %d, %q", code, errOut)
	}
	out, errOut, code := f.run(login{options: []string{"-o", "LogLevel=INFO", "-W", "127.0.0.1:" + f.port}, stdin: strings.NewReader("x")})
	if code != 255 || !strings.Contains(errOut, "ports are not forwarded") {
		t.Errorf("-W: code %d, %q, %q", code, out, errOut)
	}
	if out, errOut, code = f.run(login{options: []string{"-s"}}, "sftp"); code == 0 || !strings.Contains(errOut, "subsystem request failed") {
		t.Errorf("sftp: code %d, %q, %q", code, out, errOut)
	}
	if out, errOut, code = f.run(login{options: []string{"-o", "SetEnv=MUSTER_SERVER=https://evil:1 NO_COLOR=1"}}, "vm", "ls", "-o", "name"); code != 0 || !strings.Contains(out, "web1") {
		t.Errorf("environment: code %d, %q, %q", code, out, errOut)
	}
}

func TestScriptWithoutATerminal(t *testing.T) {
	f := newFixture(t)
	script := "# comment\nvm show web1 -o name\n\nvm show nope\nvm ls -o name\nvm pause web1\nexit\nvm show web2 -o name\n"
	out, errOut, code := f.run(login{stdin: strings.NewReader(script), options: []string{"-T"}})
	if code != cli.ExitRefused || out != "vm/web1\nvm/db1\nvm/web1\nvm/web2\n" || !strings.Contains(errOut, "does not exist") {
		t.Errorf("code %d, %q, %q", code, out, errOut)
	}
	_, errOut, code = f.run(login{stdin: strings.NewReader(strings.Repeat("x", 2*MaxLine)), options: []string{"-T"}})
	if code != cli.ExitUsage || !strings.Contains(errOut, "64 KiB") {
		t.Errorf("a long line: code %d, %q", code, errOut)
	}
}

// A user who is disabled, or whose key or role changes, is out.
func TestLiveSessionsEndWithTheirUser(t *testing.T) {
	for name, do := range map[string]func(*api.User){
		"disabled":    func(u *api.User) { u.Spec.Disabled = true },
		"key removed": func(u *api.User) { u.Spec.SSHKeys = nil },
		"new role":    func(u *api.User) { u.Spec.Role = api.RoleViewer },
		"made anew":   func(u *api.User) { u.Meta.ID = api.NewID() },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			s := f.shell(login{})
			s.send("watch vm\r")
			s.expect("web1")
			f.change("admin", do)
			s.expect("session ended: ")
			if code := s.exit(); code == 0 {
				t.Errorf("code %d", code)
			}
			select {
			case <-f.rest.gone: // what ran for the user has ended, too
			case <-time.After(patience):
				t.Error("the watch goes on")
			}
			await(t, "the audit trail", func() bool {
				f.mu.Lock()
				defer f.mu.Unlock()
				return len(f.entries) == 2 && f.entries[0].Action == "login" && f.entries[1].Action == "logout" && f.entries[1].Detail != "left"
			})
		})
	}
}

func TestIdleSessionsEnd(t *testing.T) {
	// The second client has that long from its login to the console.
	f := newFixture(t, func(c *Config) { c.Idle = 2 * time.Second })
	s := f.shell(login{})
	s.expect("session ended: no key was pressed for 2s")
	s.exit()
	// A console stays: there the guest is what matters.
	c := f.onScreen(login{options: []string{"-tt"}}, "vm", "console", "web1")
	c.expect("login: ")
	for range 10 {
		time.Sleep(300 * time.Millisecond)
		f.rest.print <- []byte(".")
	}
	c.expect(`\.{10}`)
	c.send("\x1d")
	if code := c.exit(); code != 0 {
		t.Errorf("code %d", code)
	}
}

func TestTooManySessionsOfAUser(t *testing.T) {
	f := newFixture(t)
	f.srv.mu.Lock()
	f.srv.perUser["admin"] = MaxConnectionsPerUser
	f.srv.mu.Unlock()
	if _, errOut, code := f.run(login{options: []string{"-o", "LogLevel=INFO"}}, "vm", "ls"); code == 0 || !strings.Contains(errOut, "admin has 16 sessions") {
		t.Errorf("code %d: %s", code, errOut)
	}
	if _, errOut, code := f.run(login{user: "guest"}, "vm", "ls"); code != 0 {
		t.Errorf("code %d: %s", code, errOut)
	}
}
