// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package lab

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptrace"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	apiBase     = "/api/v1"
	dialTimeout = 2 * time.Second
	maxAnswer   = 64 << 20
)

// Caller asks nodes by REST: once, without retries of its own.
type Caller struct {
	urls []string

	mu    sync.Mutex
	token string
	http  *http.Client
}

// Answer is what came of one request.
type Answer struct {
	Status int
	Code   string // of a problem document
	Detail string
	Header http.Header
	Body   []byte
	Err    error
	// Sent: something of the request may have reached the node.
	Sent bool
}

func NewCaller(urls []string, token, ca string) (*Caller, error) {
	c := &Caller{urls: urls}
	return c, c.Turn(token, ca)
}

// Turn makes later calls go to another cluster of the same hosts.
func (c *Caller) Turn(token, ca string) error {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(ca)) {
		return errors.New("the cluster's CA certificate is not PEM")
	}
	tr := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13}, TLSHandshakeTimeout: dialTimeout,
		MaxIdleConnsPerHost: 4, IdleConnTimeout: time.Minute,
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.http != nil {
		c.http.CloseIdleConnections()
	}
	c.token, c.http = token, &http.Client{Transport: tr}
	return nil
}

func (c *Caller) access() (token string, client *http.Client) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.token, c.http
}

// HTTP is what sends the requests.
func (c *Caller) HTTP() *http.Client {
	_, client := c.access()
	return client
}

// Request is one request.
type Request struct {
	Method, Path string
	Header       map[string]string
	Body         []byte
	Timeout      time.Duration
}

// New makes the request, for who wants to send it in another way.
func (c *Caller) New(ctx context.Context, node int, r Request) (*http.Request, error) {
	var body io.Reader
	if r.Body != nil {
		body = bytes.NewReader(r.Body)
	}
	req, err := http.NewRequestWithContext(ctx, r.Method, c.urls[node]+apiBase+r.Path, body)
	if err != nil {
		return nil, err
	}
	token, _ := c.access()
	req.Header.Set("Authorization", "Bearer "+token)
	for k, v := range r.Header {
		req.Header.Set(k, v)
	}
	return req, nil
}

// Do asks once.
func (c *Caller) Do(ctx context.Context, node int, r Request) Answer {
	ctx, cancel := context.WithTimeout(ctx, r.Timeout)
	defer cancel()
	var sent atomic.Bool
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { sent.Store(true) }})
	req, err := c.New(ctx, node, r)
	if err != nil {
		return Answer{Err: err}
	}
	resp, err := c.HTTP().Do(req)
	if err != nil {
		return Answer{Err: err, Sent: sent.Load()}
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return Answer{Err: err, Sent: true}
	}
	a := Answer{Status: resp.StatusCode, Header: resp.Header, Body: b, Sent: true}
	if a.Status >= 400 {
		var p struct{ Code, Detail string }
		if json.Unmarshal(b, &p) == nil {
			a.Code, a.Detail = p.Code, p.Detail
		}
	}
	return a
}

func (a *Answer) OK() bool { return a.Err == nil && a.Status/100 == 2 }

// Revision is that of the view or of the change.
func (a *Answer) Revision() uint64 { return number(a.Header.Get("Muster-Revision")) }

// ETag is the revision of the object.
func (a *Answer) ETag() uint64 { return number(strings.Trim(a.Header.Get("ETag"), `"`)) }

func number(s string) uint64 {
	n, _ := strconv.ParseUint(s, 10, 64) // 0 when it is none, which is no revision
	return n
}

// Word sums the answer up, for people.
func (a *Answer) Word() string {
	if a.Err != nil {
		return "no answer: " + a.Err.Error()
	}
	if a.Code != "" {
		return strconv.Itoa(a.Status) + " " + a.Code + ": " + a.Detail
	}
	return strconv.Itoa(a.Status)
}
