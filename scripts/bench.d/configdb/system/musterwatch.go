// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package system

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// The daemon has no watch of raw keys: the watched object is a user, whose
// full name changes.
const (
	watchedUser = "bench"
	usersPath   = "/api/v1/users"
)

// Toucher implements load.Watched.
func (m *Muster) Toucher(ctx context.Context, node int) (func(context.Context, string) error, func(), error) {
	c, err := dialHTTP(ctx, m.address(node), m.tls)
	if err != nil {
		return nil, nil, err
	}
	s := &musterSession{c, " HTTP/1.1\r\nHost: " + m.address(node) + "\r\nAuthorization: Bearer " + m.token + "\r\nContent-Type: application/json\r\n"}
	// It exists already if another load has watched it.
	status, b, err := c.call(ctx, "POST "+usersPath+s.head, []byte(`{"meta":{"name":"`+watchedUser+`"},"spec":{"fullName":""}}`))
	if err == nil && status != http.StatusCreated && status != http.StatusConflict {
		err = fmt.Errorf("create the watched user: status %d: %.200s", status, b)
	}
	if err != nil {
		c.Close()
		return nil, nil, err
	}
	touch := func(ctx context.Context, text string) error {
		status, b, err := c.call(ctx, "PATCH "+usersPath+"/"+watchedUser+s.head, []byte(`{"spec":{"fullName":"`+text+`"}}`))
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("change the watched user: status %d: %.200s", status, b)
		}
		return err
	}
	return touch, c.Close, nil
}

// Watch implements load.Watched with server-sent events, each stream on a
// connection of its own.
func (m *Muster) Watch(ctx context.Context, node, n int, seen func(int, string)) (func() error, error) {
	streams := make([]*eventStream, 0, n)
	end := func() {
		for _, s := range streams {
			_ = s.conn.Close()
		}
	}
	for i := range n {
		s, err := m.openStream(ctx, node)
		if err != nil {
			end()
			return nil, fmt.Errorf("open watch %d: %w", i, err)
		}
		streams = append(streams, s)
	}
	stop := context.AfterFunc(ctx, end)
	failed := make(chan error, n)
	for i, s := range streams {
		go func() {
			err := s.follow(func(text string) { seen(i, text) })
			if ctx.Err() != nil {
				err = nil // it was ended
			}
			failed <- err
		}()
	}
	return func() error {
		defer stop()
		var err error
		for range n {
			err = errors.Join(err, <-failed)
		}
		return err
	}, nil
}

type eventStream struct {
	conn net.Conn
	in   *bufio.Reader
}

// openStream returns a watch that has delivered what there is.
func (m *Muster) openStream(ctx context.Context, node int) (*eventStream, error) {
	d := tls.Dialer{Config: m.tls}
	conn, err := d.DialContext(ctx, "tcp", m.address(node))
	if err != nil {
		return nil, err
	}
	s := &eventStream{conn: conn}
	if err := s.open(m.address(node), m.token); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return s, nil
}

func (s *eventStream) open(host, token string) error {
	if err := s.conn.SetDeadline(time.Now().Add(setupCall)); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(s.conn, "GET /api/v1/watch?kinds=user HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nAccept: text/event-stream\r\n\r\n", host, token); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(s.conn), nil) //nolint:bodyclose // the stream lives as long as its connection
	if err != nil {
		return err
	}
	s.in = bufio.NewReader(resp.Body)
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, maxReply)) // goes into the error
		return fmt.Errorf("watch: status %d: %.200s", resp.StatusCode, b)
	}
	for {
		line, err := s.in.ReadString('\n')
		if err != nil {
			return err
		}
		if strings.HasPrefix(line, "event: synced") {
			return s.conn.SetDeadline(time.Time{})
		}
	}
}

// follow reports the full names until the stream ends. Only what is needed of
// an event is looked at: the client shares the cores with the servers.
func (s *eventStream) follow(seen func(text string)) error {
	for {
		line, err := s.in.ReadSlice('\n')
		if err != nil {
			return fmt.Errorf("watch ended: %w", err)
		}
		_, rest, ok := bytes.Cut(line, []byte(`"fullName":"`))
		if !ok {
			continue
		}
		text, _, _ := bytes.Cut(rest, []byte(`"`))
		seen(string(text))
	}
}
