// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package client

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/muster-vm/muster/api"
)

// The headers of the contract.
const (
	headerNode        = "Muster-Node"
	headerRevision    = "Muster-Revision"
	headerConsistency = "Muster-Consistency"
	headerAge         = "Muster-Age"
	headerKey         = "Idempotency-Key"
	headerQuorum      = "Muster-Quorum"
)

const (
	// Base is the path of the interface.
	Base = "/api/v1"
	// maxReply is the largest answer that is read into memory.
	maxReply = 64 << 20
	// maxProblem is how much of an error's body is read.
	maxProblem = 64 << 10
	// rounds is how often the whole list is tried, roundPause the wait before
	// the next round: an election is over in less.
	rounds     = 2
	roundPause = 500 * time.Millisecond
)

var errNoAnswer = errors.New("no answer within " + answerTimeout.String())

// Config of a client.
type Config struct {
	// Servers as ParseServers returns them, tried in order.
	Servers []string
	// Token is sent as bearer token to all servers but unix sockets.
	Token string
	// CACert is the PEM of the authority that signed the nodes' certificates;
	// the system's authorities when empty.
	CACert []byte
	// Transport, if set, carries every request instead of the network, as for a
	// session inside a daemon; Servers then only names it in messages.
	Transport http.RoundTripper
	// UserAgent names the program.
	UserAgent string
	// RaceDelay is how long a server may take to connect before the next one is tried
	// beside it; 300 ms when 0.
	RaceDelay time.Duration
	// Notify, if set, is told in one line about each switch to another server.
	Notify func(message string)
	// NoQuorum, if set, is told in one line, with the first answer of a node that
	// reaches no majority, what that node says of it.
	NoQuorum func(message string)
}

// Client is safe for use by many goroutines.
type Client struct {
	cfg       Config
	endpoints []*endpoint
	good      atomic.Int32  // index of the server that answered last
	revision  atomic.Uint64 // highest revision seen
	lost      atomic.Bool   // a node that answered had no quorum
	settled   atomic.Bool   // a server that connects was found
	settling  chan struct{} // held while it is looked for
}

// New checks the configuration; it opens no connection.
func New(cfg Config) (*Client, error) {
	if len(cfg.Servers) == 0 {
		return nil, api.Invalid("server", "names no server; give https://HOST:%s", DefaultPort)
	}
	var roots *x509.CertPool
	if len(cfg.CACert) > 0 {
		roots = x509.NewCertPool()
		if !roots.AppendCertsFromPEM(cfg.CACert) {
			return nil, api.Invalid("cacert", "holds no PEM certificate; give the file ca.crt of a node's data directory")
		}
	}
	c := &Client{cfg: cfg, settling: make(chan struct{}, 1)}
	if cfg.Transport != nil {
		c.endpoints = []*endpoint{inProcess(cfg.Servers[0], cfg.Transport)}
		return c, nil
	}
	for _, s := range cfg.Servers {
		c.endpoints = append(c.endpoints, newEndpoint(s, roots))
	}
	return c, nil
}

// Close drops idle connections.
func (c *Client) Close() {
	for _, e := range c.endpoints {
		if conn := e.take(); conn != nil {
			_ = conn.Close()
		}
		e.rest.CloseIdleConnections()
		e.ws.CloseIdleConnections()
	}
}

// Request is one call. Path is escaped and below Base.
type Request struct {
	Method string
	Path   string
	Query  url.Values
	Header http.Header
	Body   []byte
	Stream *Stream // instead of Body
	// Once is set when doing it twice is not like doing it once, whatever its
	// Idempotency-Key says, and when its answer may take long.
	Once bool
}

// Stream is a body that does not fit into memory.
type Stream struct {
	// Open returns the body from its beginning.
	Open func() (io.ReadCloser, error)
	// Size in bytes, -1 when unknown.
	Size int64
	// Once is set when Open can be called only once, as for a pipe.
	Once bool
}

// Reply is a successful answer.
type Reply struct {
	Status   int
	Header   http.Header
	Body     []byte
	Node     string
	Revision uint64
	// Stale is set when the node answered from its own replica because there
	// is no quorum, or because it was asked to; Age says how old it may be.
	Stale bool
	Age   time.Duration
	// Asked is set when the request itself asked for the node's replica.
	Asked bool
}

// Revision returns the highest store revision seen in any answer.
func (c *Client) Revision() uint64 { return c.revision.Load() }

// QuorumLost reports whether a node answered that reaches no majority.
func (c *Client) QuorumLost() bool { return c.lost.Load() }

// Do sends a request to the first server that takes it. The error is an
// *api.Error by errors.As, or the error of ctx.
func (c *Client) Do(ctx context.Context, r Request) (*Reply, error) {
	r.Header = r.Header.Clone()
	if r.Header == nil {
		r.Header = http.Header{}
	}
	if r.Method == http.MethodPost && r.Header.Get(headerKey) == "" {
		r.Header.Set(headerKey, api.NewID())
	}
	failed := c.settle(ctx)
	if failed != nil {
		return nil, c.giveUp(ctx, failed)
	}
	for round := range rounds {
		if round > 0 {
			if !worthAnotherRound(failed) || !pause(ctx, roundPause) {
				break
			}
			failed = failed[:0]
		}
		reply, err := c.round(ctx, &r, &failed)
		if reply != nil || err != nil {
			return reply, err
		}
	}
	return nil, c.giveUp(ctx, failed)
}

// round tries every server once. It returns nil, nil when all were passed over.
func (c *Client) round(ctx context.Context, r *Request, failed *attempts) (*Reply, error) {
	first := int(c.good.Load())
	for i := range c.endpoints {
		at := (first + i) % len(c.endpoints)
		e := c.endpoints[at]
		reply, sent, err := c.attempt(ctx, e, r)
		if err == nil {
			c.good.Store(int32(at))
			return reply, nil
		}
		var p *Problem
		answered := errors.As(err, &p)
		if r.Method == http.MethodDelete && answered && p.Code == api.CodeNotFound && anySent(*failed) {
			// An earlier attempt, cut off, has deleted it.
			return &Reply{Status: http.StatusNoContent, Header: http.Header{}, Node: p.Node}, nil
		}
		var own *api.Error
		if answered && !passOver(p) || !answered && errors.As(err, &own) {
			c.good.Store(int32(at))
			return nil, err
		}
		if ctx.Err() != nil && !errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return nil, ctx.Err()
		}
		*failed = append(*failed, attemptError{server: e.name, err: err, sent: sent})
		if sent && !r.repeatable() && (!answered || p.Code != api.CodeNotMember) {
			return nil, c.unknownOutcome(r, e, err, answered)
		}
		if ctx.Err() != nil {
			return nil, nil
		}
		if i < len(c.endpoints)-1 {
			c.notify(fmt.Sprintf("%s: %s; trying the next server", e.name, brief(err)))
		}
	}
	return nil, nil
}

func (c *Client) notify(message string) {
	if c.cfg.Notify != nil {
		c.cfg.Notify(message)
	}
}

// repeatable reports whether doing the request twice is like doing it once.
func (r *Request) repeatable() bool {
	if r.Once {
		return false
	}
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodPost:
		return r.Stream == nil
	}
	if r.Header.Get("If-Match") != "" || r.Header.Get("If-None-Match") != "" {
		return false
	}
	return r.Stream == nil || !r.Stream.Once
}

// passOver reports whether another server may do better than this answer.
func passOver(p *Problem) bool {
	switch p.Code {
	case api.CodeNoQuorum, api.CodeNodeFull, api.CodeNotMember, CodeUnavailable:
		return true
	case api.CodeTimeout:
		return p.Status == http.StatusGatewayTimeout
	}
	return false
}

func anySent(a attempts) bool {
	for _, e := range a {
		if e.sent {
			return true
		}
	}
	return false
}

// worthAnotherRound is false when no server was reached at all: that does not
// change within half a second.
func worthAnotherRound(failed attempts) bool {
	for _, e := range failed {
		var p *Problem
		if e.sent && (!errors.As(e.err, &p) || p.Code != api.CodeNotMember && p.Code != api.CodeTimeout) {
			return true
		}
	}
	return false
}

func (c *Client) unknownOutcome(r *Request, e *endpoint, err error, answered bool) error {
	if answered {
		return err
	}
	if r.Stream != nil {
		return &api.Error{Code: CodeUnavailable, Detail: "the upload to " + e.name + " was cut off and its source cannot be read again; send it once more", Err: attempts{{server: e.name, err: err}}}
	}
	if r.Once {
		return &api.Error{Code: CodeUnavailable,
			Detail: "the connection to " + e.name + " was lost before the answer came; whether it was carried out is not known, and it was not tried again",
			Err:    attempts{{server: e.name, err: err}}}
	}
	return &api.Error{Code: CodeUnavailable,
		Detail: "the connection to " + e.name + " was lost before the answer came; whether the conditional write took place is not known, read the object before trying again",
		Err:    attempts{{server: e.name, err: err}}}
}

// giveUp chooses the error that says most: what a server answered rather than
// that another was silent.
func (c *Client) giveUp(ctx context.Context, failed attempts) error {
	if ctx.Err() != nil && !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return ctx.Err()
	}
	var best *Problem
	for _, e := range failed {
		var p *Problem
		if errors.As(e.err, &p) && (best == nil || best.Code == api.CodeNotMember) {
			best = p
		}
	}
	if best != nil {
		return best
	}
	if len(c.endpoints) == 1 {
		return &api.Error{Code: CodeUnavailable, Detail: "the server does not answer", Err: failed}
	}
	return &api.Error{Code: CodeUnavailable, Detail: fmt.Sprintf("none of the %d servers answers", len(c.endpoints)), Err: failed}
}

// attempt sends the request to one server. sent is false when no connection
// came about, so that nothing can have happened there.
func (c *Client) attempt(ctx context.Context, e *endpoint, r *Request) (reply *Reply, sent bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var connected atomic.Bool
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { connected.Store(true) }})
	req, err := c.newRequest(ctx, e, r)
	if err != nil {
		return nil, false, err
	}
	var stop func()
	switch {
	case r.Once:
		stop = func() {}
	case r.Stream == nil:
		timer := time.AfterFunc(answerTimeout, func() { cancel(errNoAnswer) })
		stop = func() { timer.Stop() }
	default:
		stop, err = c.attachStream(req, r.Stream, cancel)
		if err != nil {
			return nil, false, err
		}
	}
	resp, err := e.rest.Do(req)
	stop()
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && errors.Is(ctx.Err(), context.Canceled) {
			err = cause
		}
		return nil, connected.Load(), err
	}
	defer resp.Body.Close()
	reply, err = c.read(resp)
	return reply, true, err
}

func (c *Client) newRequest(ctx context.Context, e *endpoint, r *Request) (*http.Request, error) {
	var body io.Reader
	if r.Body != nil {
		body = bytes.NewReader(r.Body)
	}
	req, err := http.NewRequestWithContext(ctx, r.Method, e.base+Base+r.Path, body)
	if err != nil {
		return nil, api.Errorf(api.CodeInvalid, "build request for %s: %w", r.Path, err)
	}
	q := url.Values{}
	for k, v := range r.Query {
		q[k] = v
	}
	if rev := c.revision.Load(); rev > 0 && q.Get("minRevision") == "" {
		q.Set("minRevision", strconv.FormatUint(rev, 10))
	}
	req.URL.RawQuery = q.Encode()
	req.Header = r.Header.Clone()
	c.sign(req.Header, e)
	if req.Header.Get("Accept") == "" {
		req.Header.Set("Accept", "application/json")
	}
	return req, nil
}

func (c *Client) sign(h http.Header, e *endpoint) {
	if c.cfg.Token != "" && !e.local {
		h.Set("Authorization", "Bearer "+c.cfg.Token)
	}
	if c.cfg.UserAgent != "" {
		h.Set("User-Agent", c.cfg.UserAgent)
	}
}

// read takes the answer in and notes its revision.
func (c *Client) read(resp *http.Response) (*Reply, error) {
	if resp.Header.Get(headerQuorum) == "lost" && !c.lost.Swap(true) && c.cfg.NoQuorum != nil {
		c.cfg.NoQuorum(warningOf(resp.Header))
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, maxProblem))
		return nil, problemFrom(resp.StatusCode, resp.Header, body)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxReply+1))
	if err != nil {
		return nil, fmt.Errorf("read answer: %w", err)
	}
	if len(body) > maxReply {
		return nil, api.Errorf(api.CodeTooLarge, "the answer is larger than %s; ask for less with a selector or limit", api.Size(maxReply))
	}
	r := &Reply{Status: resp.StatusCode, Header: resp.Header, Body: body, Node: resp.Header.Get(headerNode)}
	r.Revision, _ = strconv.ParseUint(resp.Header.Get(headerRevision), 10, 64)
	c.sawRevision(r.Revision)
	r.Stale = resp.Header.Get(headerConsistency) == "stale"
	r.Asked = resp.Request != nil && resp.Request.URL.Query().Get("consistency") == "stale"
	if age, err := strconv.ParseFloat(resp.Header.Get(headerAge), 64); err == nil {
		r.Age = time.Duration(age * float64(time.Second))
	}
	return r, nil
}

// sawRevision keeps the highest revision. Answers of other goroutines may
// arrive in any order.
func (c *Client) sawRevision(rev uint64) {
	for {
		old := c.revision.Load()
		if rev <= old || c.revision.CompareAndSwap(old, rev) {
			return
		}
	}
}

// pause waits and reports false when ctx ended first.
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
