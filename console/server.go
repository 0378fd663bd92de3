// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/contain"
)

// Config is what a Server needs. All functions must be set, but for Audit.
type Config struct {
	// HostKey returns the key of the whole cluster. It is asked for until it
	// was returned once.
	HostKey func(ctx context.Context) (ssh.Signer, error)
	// Users returns a user by name, from the node's own replica.
	Users func(name string) (api.User, bool)
	// Handler returns what carries a session's REST calls, as the actor and
	// with the role; source is the client's HOST:PORT. If it is an io.Closer it
	// is closed when the session is over. See NewTransport.
	Handler func(actor string, role api.Role, source string) http.RoundTripper
	// Cluster and Node return the names for the prompt.
	Cluster, Node func() string
	// Audit, if set, is told of logins and their ends, not of failed attempts:
	// those could be made in any number by anybody.
	Audit func(Entry)
	// NoQuorum, if set, returns in one line what is to be said while this node
	// reaches no majority, else nothing.
	NoQuorum func() string
	Version  string
	Log      *slog.Logger

	// Idle ends a session whose user has pressed no key for so long; attached
	// consoles and commands without a terminal are excluded. DefaultIdle if 0.
	Idle time.Duration
	// Recheck is how often the server looks whether users are still welcome.
	// DefaultRecheck if 0.
	Recheck time.Duration
	// Now is the clock of tables; time.Now when nil.
	Now func() time.Time
}

// Entry is one login or its end, for the audit trail.
type Entry struct {
	User   string
	Source string // HOST:PORT
	// Action is "login" or "logout".
	Action string
	// Detail is the fingerprint of the key, or why the session ended.
	Detail string
}

// ActorPrefix is put before the name of a user to make the actor of changes.
const ActorPrefix = "user:"

func (c *Config) check() error {
	for _, f := range []struct {
		name string
		set  bool
	}{
		{"HostKey", c.HostKey != nil}, {"Users", c.Users != nil}, {"Handler", c.Handler != nil},
		{"Cluster", c.Cluster != nil}, {"Node", c.Node != nil},
	} {
		if !f.set {
			return fmt.Errorf("console: Config.%s is not set", f.name)
		}
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Idle <= 0 {
		c.Idle = DefaultIdle
	}
	if c.Recheck <= 0 {
		c.Recheck = DefaultRecheck
	}
	if c.Audit == nil {
		c.Audit = func(Entry) {}
	}
	return nil
}

// Server is the console shell of one node.
type Server struct {
	cfg Config
	log *slog.Logger

	mu      sync.Mutex
	hostKey ssh.Signer
	logins  map[string]int // under way, by address
	shaking int
	conns   map[*conn]struct{}
	perUser map[string]int
	// ending counts what outlives its connection: the closing, the audit trail.
	ending sync.WaitGroup
}

// New returns a server; Serve starts it.
func New(cfg Config) (*Server, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	return &Server{cfg: cfg, log: cfg.Log, logins: map[string]int{}, conns: map[*conn]struct{}{}, perUser: map[string]int{}}, nil
}

// Serve answers the connections of ln, which begin with "SSH-", until the
// context ends; that is no error. It closes ln and returns when all is over.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	group, ctx := contain.NewGroup(ctx)
	defer s.ending.Wait()
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
	group.Go(func() { s.lookAfter(ctx) })
	err := s.accept(ctx, ln, group)
	return errors.Join(err, group.Stop())
}

func (s *Server) accept(ctx context.Context, ln net.Listener, group *contain.Group) error {
	for {
		c, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accept on %s: %w", ln.Addr(), err)
			}
			s.log.Warn("accept failed", "err", err)
			if !pause(ctx, acceptPause) { // out of descriptors, most likely
				return nil
			}
			continue
		}
		ip := hostOf(c)
		if !s.admit(ip) {
			s.log.Debug("too many logins under way", "source", c.RemoteAddr())
			_ = c.Close() // the client tries again
			continue
		}
		group.Go(func() {
			s.alone("connection", func() { s.serveConn(ctx, c, sync.OnceFunc(func() { s.dismiss(ip) })) })
		})
	}
}

// alone runs f so that a bug there ends only what f is about: what strangers
// and guests send goes through it. ok is false after a panic.
func (s *Server) alone(what string, f func()) (ok bool) {
	err := contain.Do(f)
	var p *contain.Panic
	if errors.As(err, &p) {
		s.log.Error("the shell met a bug", "what", what, "panic", p.Value, "stack", p.Stack)
	}
	return err == nil
}

const acceptPause = 50 * time.Millisecond

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func hostOf(c net.Conn) string {
	addr := c.RemoteAddr().String()
	if host, _, err := net.SplitHostPort(addr); err == nil {
		return host
	}
	return addr
}

// admit counts a login that begins, and dismiss one that is over.
func (s *Server) admit(ip string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shaking >= MaxLogins || s.logins[ip] >= MaxLoginsPerIP {
		return false
	}
	s.shaking++
	s.logins[ip]++
	return true
}

func (s *Server) dismiss(ip string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shaking--
	if s.logins[ip]--; s.logins[ip] == 0 {
		delete(s.logins, ip)
	}
}

// key returns the host key, asked for until it is known.
func (s *Server) key(ctx context.Context) (ssh.Signer, error) {
	s.mu.Lock()
	known := s.hostKey
	s.mu.Unlock()
	if known != nil {
		return known, nil
	}
	ctx, cancel := context.WithTimeout(ctx, hostKeyTimeout)
	defer cancel()
	k, err := s.cfg.HostKey(ctx)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hostKey = k
	return k, nil
}

// enter counts a connection in unless there are too many.
func (s *Server) enter(c *conn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case len(s.conns) >= MaxConnections:
		return fmt.Errorf("%d sessions are open on this node; try another node", MaxConnections)
	case s.perUser[c.user] >= MaxConnectionsPerUser:
		return fmt.Errorf("%s has %d sessions on this node; end one or try another node", c.user, MaxConnectionsPerUser)
	}
	s.conns[c] = struct{}{}
	s.perUser[c.user]++
	return nil
}

func (s *Server) leave(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	if s.perUser[c.user]--; s.perUser[c.user] == 0 {
		delete(s.perUser, c.user)
	}
}

// audit tells of an entry in the background, after another one: without a
// quorum that takes seconds, in which the person must not wait.
func (s *Server) audit(e Entry, after <-chan struct{}) (told <-chan struct{}) {
	done := make(chan struct{})
	s.ending.Go(func() {
		defer close(done)
		if after != nil {
			<-after
		}
		s.alone("audit", func() { s.cfg.Audit(e) })
	})
	return done
}

// lookAfter ends the connections of users who are no longer welcome, and those
// that nobody uses.
func (s *Server) lookAfter(ctx context.Context) {
	for pause(ctx, s.cfg.Recheck) {
		s.mu.Lock()
		all := make([]*conn, 0, len(s.conns))
		for c := range s.conns {
			all = append(all, c)
		}
		s.mu.Unlock()
		for _, c := range all {
			ok := s.alone("look after "+c.user, func() {
				if why := s.unwelcome(c); why != "" {
					c.end(why)
				} else if c.idle() > s.cfg.Idle {
					c.end(fmt.Sprintf("no key was pressed for %s", s.cfg.Idle))
				}
			})
			if !ok {
				c.end("the server met a bug") // nobody knows whether the user is still welcome
			}
		}
	}
}
