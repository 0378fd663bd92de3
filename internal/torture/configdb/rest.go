// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package main

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
	"sync/atomic"
	"time"
)

const (
	apiBase     = "/api/v1"
	dialTimeout = 2 * time.Second
	maxAnswer   = 64 << 20
)

// caller asks nodes by REST: once, without retries of its own.
type caller struct {
	urls  []string
	token string
	http  *http.Client
}

// answer is what came of one request.
type answer struct {
	status int
	code   string // of a problem document
	detail string
	header http.Header
	body   []byte
	err    error
	// sent: something of the request may have reached the node.
	sent bool
}

func newCaller(urls []string, token, ca string) (*caller, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(ca)) {
		return nil, errors.New("the cluster's CA certificate is not PEM")
	}
	tr := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13}, TLSHandshakeTimeout: dialTimeout,
		MaxIdleConnsPerHost: 4, IdleConnTimeout: time.Minute,
	}
	return &caller{urls: urls, token: token, http: &http.Client{Transport: tr}}, nil
}

// request is one request.
type request struct {
	method, path string
	header       map[string]string
	body         []byte
	timeout      time.Duration
}

func (c *caller) new(ctx context.Context, node int, r request) (*http.Request, error) {
	var body io.Reader
	if r.body != nil {
		body = bytes.NewReader(r.body)
	}
	req, err := http.NewRequestWithContext(ctx, r.method, c.urls[node]+apiBase+r.path, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	for k, v := range r.header {
		req.Header.Set(k, v)
	}
	return req, nil
}

// do asks once.
func (c *caller) do(ctx context.Context, node int, r request) answer {
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	var sent atomic.Bool
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { sent.Store(true) }})
	req, err := c.new(ctx, node, r)
	if err != nil {
		return answer{err: err}
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return answer{err: err, sent: sent.Load()}
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return answer{err: err, sent: true}
	}
	a := answer{status: resp.StatusCode, header: resp.Header, body: b, sent: true}
	if a.status >= 400 {
		var p struct{ Code, Detail string }
		if json.Unmarshal(b, &p) == nil {
			a.code, a.detail = p.Code, p.Detail
		}
	}
	return a
}

func (a *answer) ok() bool { return a.err == nil && a.status/100 == 2 }

// revision is that of the view or of the change.
func (a *answer) revision() uint64 { return number(a.header.Get("Muster-Revision")) }

// etag is the revision of the object.
func (a *answer) etag() uint64 { return number(strings.Trim(a.header.Get("ETag"), `"`)) }

func number(s string) uint64 {
	n, _ := strconv.ParseUint(s, 10, 64) // 0 when it is none, which is no revision
	return n
}

// word sums the answer up, for people.
func (a *answer) word() string {
	if a.err != nil {
		return "no answer: " + a.err.Error()
	}
	if a.code != "" {
		return strconv.Itoa(a.status) + " " + a.code + ": " + a.detail
	}
	return strconv.Itoa(a.status)
}
