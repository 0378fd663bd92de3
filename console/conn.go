// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

import (
	"context"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muster-vm/muster/api"
)

// conn is one connection of a user who has logged in.
type conn struct {
	s      *Server
	ssh    ssh.Conn
	user   string
	userID string
	role   api.Role
	key    ssh.PublicKey
	source string
	rest   http.RoundTripper

	began   time.Time
	touched atomic.Int64 // nanoseconds since began of the last key
	busy    atomic.Int32 // consoles and commands without a terminal
	open    atomic.Int32 // channels

	mu     sync.Mutex
	why    string // why the server ended it
	screen map[*terminal]struct{}
}

// serveConn is one connection from its first byte to its end.
func (s *Server) serveConn(ctx context.Context, nc net.Conn, dismiss func()) {
	defer dismiss()
	defer func() { _ = nc.Close() }()
	defer context.AfterFunc(ctx, func() { _ = nc.Close() })()
	_ = nc.SetDeadline(time.Now().Add(LoginTimeout))
	cfg, err := s.sshConfig(ctx)
	if err != nil {
		s.log.Warn("shell has no host key", "err", err)
		return
	}
	sc, chans, requests, err := ssh.NewServerConn(nc, cfg)
	if err != nil {
		s.log.Debug("login failed", "source", nc.RemoteAddr(), "err", err)
		return
	}
	_ = nc.SetDeadline(time.Time{})
	dismiss()
	c, err := s.newConn(sc)
	if err != nil {
		s.log.Warn("login failed", "user", sc.User(), "source", nc.RemoteAddr(), "err", err)
		return
	}
	c.serve(ctx, chans, requests)
}

func (s *Server) newConn(sc *ssh.ServerConn) (*conn, error) {
	key, err := ssh.ParsePublicKey([]byte(sc.Permissions.Extensions[extKey]))
	if err != nil {
		return nil, err
	}
	// Looked up again: the login may have taken as long as its deadline.
	user, err := s.holder(sc.User(), key)
	if err != nil {
		return nil, err
	}
	return &conn{
		s: s, ssh: sc, user: sc.User(), userID: user.Meta.ID, role: user.Spec.Role, key: key, source: sc.RemoteAddr().String(),
		began: time.Now(), screen: map[*terminal]struct{}{},
	}, nil
}

func (c *conn) serve(ctx context.Context, chans <-chan ssh.NewChannel, requests <-chan *ssh.Request) {
	log := c.s.log.With("user", c.user, "source", c.source)
	full := c.s.enter(c)
	if full != nil {
		// It is counted nowhere, so it stays only as long as it takes to say why.
		log.Debug("login over a limit", "err", full)
		defer time.AfterFunc(fullTimeout, func() { _ = c.ssh.Close() }).Stop()
	} else {
		defer c.s.leave(c)
		c.rest = c.s.cfg.Handler(ActorPrefix+c.user, c.role, c.source)
		if closer, ok := c.rest.(io.Closer); ok {
			defer func() { _ = closer.Close() }()
		}
		finger := ssh.FingerprintSHA256(c.key)
		log.Info("login", "role", c.role, "key", finger)
		told := c.s.audit(Entry{User: c.user, Source: c.source, Action: "login", Detail: finger}, nil)
		defer func() {
			why := c.reason()
			log.Info("logout", "reason", why)
			c.s.audit(Entry{User: c.user, Source: c.source, Action: "logout", Detail: why}, told)
		}()
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	defer func() { _ = c.ssh.Close() }()            // else the requests would never end
	wg.Go(func() { ssh.DiscardRequests(requests) }) // tcpip-forward and all others: no
	wg.Go(func() { c.keepAlive(ctx) })
	for nch := range chans {
		switch {
		case nch.ChannelType() == "direct-tcpip" || nch.ChannelType() == "direct-streamlocal@openssh.com":
			_ = nch.Reject(ssh.Prohibited, "ports are not forwarded")
		case nch.ChannelType() != "session":
			_ = nch.Reject(ssh.UnknownChannelType, "only sessions")
		case full != nil:
			_ = nch.Reject(ssh.ResourceShortage, full.Error())
		case c.open.Add(1) > MaxChannels:
			c.open.Add(-1)
			_ = nch.Reject(ssh.ResourceShortage, "too many sessions over one connection")
		default:
			ch, reqs, err := nch.Accept()
			if err != nil {
				c.open.Add(-1)
				continue
			}
			c.touch()
			wg.Go(func() {
				defer c.open.Add(-1)
				c.s.alone("channel", func() { newSession(c, ch).serve(ctx, reqs) })
			})
		}
	}
}

// keepAlive closes a connection whose client does not answer, as after a loss
// of power.
func (c *conn) keepAlive(ctx context.Context) {
	for pause(ctx, KeepAlive) {
		late := time.AfterFunc(KeepAliveTimeout, func() { c.end("the client does not answer") })
		_, _, err := c.ssh.SendRequest("keepalive@openssh.com", true, nil)
		late.Stop()
		if err != nil {
			return
		}
	}
}

func (c *conn) touch() { c.touched.Store(int64(time.Since(c.began))) }

// idle returns how long no key was pressed, 0 while something runs that does
// not need any.
func (c *conn) idle() time.Duration {
	if c.busy.Load() > 0 {
		return 0
	}
	return time.Since(c.began) - time.Duration(c.touched.Load())
}

// end closes the connection and tells those who sit at a terminal why. A
// client that takes nothing must not hold up the server.
func (c *conn) end(why string) {
	c.mu.Lock()
	if c.why != "" {
		c.mu.Unlock()
		return
	}
	c.why = why
	var screens []*terminal
	for t := range c.screen {
		screens = append(screens, t)
	}
	c.mu.Unlock()
	told := make(chan struct{})
	c.s.ending.Go(func() {
		defer close(told)
		c.s.alone("farewell", func() {
			for _, t := range screens {
				t.farewell(why)
			}
		})
	})
	c.s.ending.Go(func() {
		t := time.NewTimer(farewellTimeout)
		defer t.Stop()
		select {
		case <-told:
		case <-t.C:
		}
		_ = c.ssh.Close()
	})
}

const farewellTimeout = time.Second

func (c *conn) reason() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.why == "" {
		return "left"
	}
	return c.why
}

func (c *conn) addScreen(t *terminal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.screen[t] = struct{}{}
}

func (c *conn) dropScreen(t *terminal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.screen, t)
}
