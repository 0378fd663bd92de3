// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/ptytest"
)

// patience is how long a test waits for what must come.
const patience = 60 * time.Second

// fixture is a node's shell with users, and a directory with their keys.
type fixture struct {
	t       *testing.T
	dir     string
	rest    *fakeREST
	hostKey []byte
	port    string
	srv     *Server

	mu      sync.Mutex
	users   map[string]api.User
	entries []Entry
}

func newFixture(t *testing.T, change ...func(*Config)) *fixture {
	t.Helper()
	f := &fixture{t: t, dir: t.TempDir(), rest: newFakeREST(), users: map[string]api.User{}}
	var err error
	if f.hostKey, err = NewHostKey(); err != nil {
		t.Fatal(err)
	}
	f.addUser("admin", api.RoleAdministrator)
	f.addUser("guest", api.RoleViewer)
	f.port = f.serve("m1", change...)
	return f
}

// serve starts another node of the same cluster and returns its port.
func (f *fixture) serve(node string, change ...func(*Config)) string {
	f.t.Helper()
	cfg := Config{
		HostKey: func(context.Context) (ssh.Signer, error) { return ParseHostKey(f.hostKey) },
		Users: func(name string) (api.User, bool) {
			f.mu.Lock()
			defer f.mu.Unlock()
			u, ok := f.users[name]
			return u, ok
		},
		Handler: func(actor string, role api.Role, source string) http.RoundTripper {
			return NewTransport(&http.Server{Handler: f.rest.as(actor, role)}, source)
		},
		Audit: func(e Entry) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.entries = append(f.entries, e)
		},
		Cluster: func() string { return "demo" }, Node: func() string { return node }, Version: "9.9",
		Log:     slog.New(slog.NewTextHandler(f.t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
		Recheck: 50 * time.Millisecond,
	}
	for _, c := range change {
		c(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		f.t.Fatal(err)
	}
	f.srv = s
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		f.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, ln) }()
	f.t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				f.t.Errorf("Serve: %v", err)
			}
		case <-time.After(patience):
			f.t.Error("Serve did not end")
		}
	})
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	return port
}

// addUser makes a user and, with the real ssh-keygen, a key in dir/NAME.
func (f *fixture) addUser(name string, role api.Role) {
	f.t.Helper()
	f.newKey(name, "-t", "ed25519")
	u := api.User{Meta: api.NewMeta(api.KindUser, "", name), Spec: api.UserSpec{Role: role, SSHKeys: []string{f.public(name)}}}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.users[name] = u
}

func (f *fixture) newKey(name string, args ...string) {
	f.t.Helper()
	args = append([]string{"-q", "-N", "", "-C", name + "@test", "-f", filepath.Join(f.dir, name)}, args...)
	if out, err := exec.Command("ssh-keygen", args...).CombinedOutput(); err != nil {
		f.t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
}

func (f *fixture) public(key string) string {
	b, err := os.ReadFile(filepath.Join(f.dir, key+".pub"))
	if err != nil {
		f.t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func (f *fixture) change(name string, do func(*api.User)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	u := f.users[name]
	do(&u)
	f.users[name] = u
}

// login is how to call the client.
type login struct {
	user, key, port string
	options         []string // of ssh
	stdin           io.Reader
}

// ssh is the real client, with nothing of the machine's own configuration.
func (f *fixture) ssh(ctx context.Context, l login, words ...string) *exec.Cmd {
	f.t.Helper()
	if l.user == "" {
		l.user = "admin"
	}
	if l.key == "" {
		l.key = l.user
	}
	if l.port == "" {
		l.port = f.port
	}
	args := append(slices.Clone(l.options), // of an option given twice the first counts
		"-F", "none", "-o", "UserKnownHostsFile="+filepath.Join(f.dir, "known_hosts"), "-o", "StrictHostKeyChecking=accept-new",
		"-o", "HostKeyAlias=cluster", "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR", "-o", "PreferredAuthentications=publickey,password,keyboard-interactive",
		"-o", "BatchMode=yes", "-i", filepath.Join(f.dir, l.key), "-p", l.port, l.user+"@127.0.0.1")
	cmd := exec.CommandContext(ctx, "ssh", append(args, words...)...)
	cmd.Env = []string{"HOME=" + f.dir, "TERM=xterm", "PATH=" + os.Getenv("PATH")}
	cmd.Stdin = l.stdin
	return cmd
}

// run runs a command without a terminal.
func (f *fixture) run(l login, words ...string) (stdout, stderr string, code int) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 3*patience)
	defer cancel()
	cmd := f.ssh(ctx, l, words...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		f.t.Fatalf("ssh %v: %v", words, err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// screen is a client on a pseudo terminal.
type screen struct {
	t    *testing.T
	pty  *os.File
	cmd  *exec.Cmd
	done chan struct{}

	mu    sync.Mutex
	out   []byte
	from  int // what expect has taken
	total int
	more  chan struct{} // closed when output comes
	ended bool
}

// onScreen starts a client on a terminal of 80 by 24. It has all the time that
// the test takes: each of the screen's steps has its own.
func (f *fixture) onScreen(l login, words ...string) *screen {
	f.t.Helper()
	cmd := f.ssh(f.t.Context(), l, words...)
	master, err := ptytest.Start(cmd)
	if err != nil {
		f.t.Fatal(err)
	}
	s := &screen{t: f.t, pty: master, cmd: cmd, more: make(chan struct{}), done: make(chan struct{})}
	go s.read()
	f.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-s.done
		_ = cmd.Wait()
		_ = master.Close()
	})
	return s
}

func resize(t *testing.T, pty *os.File, columns, rows uint16) {
	t.Helper()
	if err := unix.IoctlSetWinsize(int(pty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: columns, Row: rows}); err != nil {
		t.Fatal(err)
	}
}

func (s *screen) read() {
	defer close(s.done)
	b := make([]byte, 64<<10)
	for {
		n, err := s.pty.Read(b)
		s.mu.Lock()
		s.out = append(s.out, b[:n]...)
		s.total += n
		if drop := len(s.out) - 1<<20; drop > 0 && s.from >= drop {
			s.out, s.from = append([]byte(nil), s.out[drop:]...), s.from-drop
		}
		s.ended = err != nil
		close(s.more)
		s.more = make(chan struct{})
		s.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (s *screen) send(text string) {
	s.t.Helper()
	if err := s.pty.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.pty.WriteString(text); err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.t.Fatalf("type %q: %v; the client has ended: %t", text[:min(len(text), 40)], err, s.ended)
	}
}

// expect waits until a pattern comes after what was expected before, and
// returns what was matched.
func (s *screen) expect(pattern string) string {
	s.t.Helper()
	re := regexp.MustCompile(pattern)
	deadline := time.After(patience)
	for {
		s.mu.Lock()
		rest := s.out[s.from:]
		at := re.FindIndex(rest)
		if at != nil {
			found := string(rest[at[0]:at[1]])
			s.from += at[1]
			s.mu.Unlock()
			return found
		}
		more, ended, seen := s.more, s.ended, string(rest[max(0, len(rest)-2000):])
		s.mu.Unlock()
		if ended {
			s.t.Fatalf("the client ended without %q; last was %q", pattern, seen)
		}
		select {
		case <-more:
		case <-deadline:
			s.t.Fatalf("%q did not come; last was %q", pattern, seen)
		}
	}
}

// exit waits for the end of the client and returns its code.
func (s *screen) exit() int {
	s.t.Helper()
	select {
	case <-s.done:
	case <-time.After(patience):
		s.t.Fatal("the client does not end")
	}
	_ = s.cmd.Wait()
	return s.cmd.ProcessState.ExitCode()
}

// prompt is what the shell shows before a line.
const prompt = `admin@demo:m1> `

func (f *fixture) shell(l login) *screen {
	f.t.Helper()
	l.options = append(l.options, "-tt")
	s := f.onScreen(l)
	s.expect(prompt)
	return s
}
