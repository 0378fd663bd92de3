// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package system

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// httpConn is one HTTP/1.1 connection with keep-alive, for one call at a time.
// It is written by hand because net/http's client costs several times as much
// of the cores that the servers need, with two goroutines per connection and
// a dozen allocations per call.
type httpConn struct {
	addr string
	tls  *tls.Config
	conn net.Conn // nil after an error, until the next call
	in   *bufio.Reader
	out  []byte
	body []byte
}

// maxReply bounds the body of an answer.
const maxReply = 4 << 20

func dialHTTP(ctx context.Context, addr string, conf *tls.Config) (*httpConn, error) {
	c := &httpConn{addr: addr, tls: conf}
	return c, c.connect(ctx)
}

func (c *httpConn) connect(ctx context.Context) error {
	d := tls.Dialer{Config: c.tls}
	conn, err := d.DialContext(ctx, "tcp", c.addr)
	if err != nil {
		return err
	}
	c.conn, c.in = conn, bufio.NewReader(conn)
	return nil
}

// Close ends the connection.
func (c *httpConn) Close() {
	if c.conn != nil {
		_ = c.conn.Close()
		c.conn = nil
	}
}

// call sends one request; head is everything of it up to the body's length.
// The answer's body is good until the next call.
func (c *httpConn) call(ctx context.Context, head string, body []byte) (status int, reply []byte, err error) {
	if c.conn == nil {
		if err := c.connect(ctx); err != nil {
			return 0, nil, err
		}
	}
	defer func() {
		if err != nil {
			c.Close() // an answer may still come, which would be taken for the next
		}
	}()
	deadline, _ := ctx.Deadline() // zero: none
	if err := c.conn.SetDeadline(deadline); err != nil {
		return 0, nil, err
	}
	c.out = append(c.out[:0], head...)
	if body != nil {
		c.out = fmt.Appendf(c.out, "Content-Length: %d\r\n", len(body))
	}
	c.out = append(append(c.out, "\r\n"...), body...)
	if _, err := c.conn.Write(c.out); err != nil {
		return 0, nil, err
	}
	resp, err := http.ReadResponse(c.in, nil) //nolint:bodyclose // it is read to its end, which is what matters on a connection of our own
	if err != nil {
		return 0, nil, err
	}
	if resp.ContentLength > maxReply {
		return 0, nil, fmt.Errorf("an answer of %d bytes", resp.ContentLength)
	}
	if resp.ContentLength >= 0 {
		c.body = append(c.body[:0], make([]byte, resp.ContentLength)...)
		_, err = io.ReadFull(resp.Body, c.body)
	} else {
		c.body, err = io.ReadAll(io.LimitReader(resp.Body, maxReply))
	}
	// Whatever is left, such as the end of chunks.
	_, drain := io.Copy(io.Discard, resp.Body)
	if err := errors.Join(err, drain); err != nil {
		return 0, nil, err
	}
	if resp.Close {
		c.Close()
	}
	return resp.StatusCode, c.body, nil
}

// get is a plain GET for the set-up, with a client of its own.
func get(ctx context.Context, url string, conf *tls.Config, token string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	tr := &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true}
	client := http.Client{Transport: tr, Timeout: setupCall}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxReply))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s: %.200s", url, resp.Status, b)
	}
	return b, err
}

// setupCall bounds one call of the set-up.
const setupCall = 3 * time.Second
