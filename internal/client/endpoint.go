// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/muster-vm/muster/api"
)

// Limits of time and size.
const (
	// DefaultPort of a node.
	DefaultPort = "7600"
	// MaxServers is the longest list of servers.
	MaxServers = 64

	dialTimeout      = 4 * time.Second
	handshakeTimeout = 5 * time.Second
	// answerTimeout is how long one server may take to answer before the next
	// is tried. It is above the 10 s that a node may wait for a revision.
	answerTimeout = 15 * time.Second
	// pingIdle and pingTimeout find a dead connection that carries no traffic.
	pingIdle    = 5 * time.Second
	pingTimeout = 5 * time.Second
	idleConn    = 60 * time.Second
)

// endpoint is one server with its connections.
type endpoint struct {
	name string // as messages show it
	base string // scheme and host
	rest *http.Client
	ws   *http.Client // HTTP/1.1 only, which WebSocket needs
	// local is a unix socket: trusted by its file mode, no token is sent.
	local bool
	// connect opens a connection; spare is one that waits for its use.
	connect func(context.Context) (net.Conn, error)
	spare   atomic.Pointer[net.Conn]
}

// SocketURL returns the server that stands for the daemon of this host with a
// data directory.
func SocketURL(dataDir string) string {
	return "unix://" + filepath.ToSlash(filepath.Join(dataDir, "muster.sock"))
}

// ParseServers checks a comma-separated list of servers and returns their
// normal form. A server is https://HOST:PORT, HOST:PORT, HOST or unix://PATH.
func ParseServers(list string) ([]string, error) {
	var out []string
	for _, s := range strings.Split(list, ",") {
		if s = strings.TrimSpace(s); s == "" {
			continue
		}
		n, err := normalServer(s)
		if err != nil {
			return nil, err
		}
		out = append(out, n)
	}
	if len(out) == 0 {
		return nil, api.Invalid("server", "names no server; give https://HOST:%s", DefaultPort)
	}
	if len(out) > MaxServers {
		return nil, api.Invalid("server", "names %d servers; at most %d are allowed", len(out), MaxServers)
	}
	return out, nil
}

func normalServer(s string) (string, error) {
	if path, ok := strings.CutPrefix(s, "unix://"); ok {
		if path == "" {
			return "", api.Invalid("server", "%q names no socket; give unix:///PATH/muster.sock", s)
		}
		return s, nil
	}
	if strings.HasPrefix(s, "http://") {
		return "", api.Invalid("server", "%q is without TLS, which no node offers; give %q", s, "https://"+strings.TrimPrefix(s, "http://"))
	}
	if !strings.Contains(s, "://") {
		s = "https://" + s
	}
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || strings.Trim(u.Path, "/") != "" {
		return "", api.Invalid("server", "%q is not a server; give https://HOST:PORT", s)
	}
	if u.Port() == "" {
		return "https://" + net.JoinHostPort(u.Hostname(), DefaultPort), nil
	}
	return "https://" + u.Host, nil
}

func newEndpoint(server string, roots *x509.CertPool) *endpoint {
	dialer := &net.Dialer{Timeout: dialTimeout, KeepAlive: idleConn}
	if path, ok := strings.CutPrefix(server, "unix://"); ok {
		e := &endpoint{name: path, base: "http://muster", local: true}
		e.connect = func(ctx context.Context) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", filepath.FromSlash(path))
		}
		e.rest = &http.Client{Transport: &http.Transport{DialContext: e.dial, IdleConnTimeout: idleConn}, CheckRedirect: noRedirect}
		e.ws = e.rest
		return e
	}
	e := &endpoint{name: strings.TrimPrefix(server, "https://"), base: server}
	e.connect = func(ctx context.Context) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", e.name) }
	transport := func(protos ...string) *http.Transport {
		return &http.Transport{
			DialContext:           e.dial,
			TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, NextProtos: protos},
			TLSHandshakeTimeout:   handshakeTimeout,
			ExpectContinueTimeout: handshakeTimeout,
			IdleConnTimeout:       idleConn,
			ForceAttemptHTTP2:     len(protos) > 1,
			HTTP2:                 &http.HTTP2Config{SendPingTimeout: pingIdle, PingTimeout: pingTimeout},
		}
	}
	e.rest = &http.Client{Transport: transport("h2", "http/1.1"), CheckRedirect: noRedirect}
	e.ws = &http.Client{Transport: transport("http/1.1"), CheckRedirect: noRedirect}
	return e
}

// dial is what the transports call: every request of the endpoint goes to the
// one address that its name is.
func (e *endpoint) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	if conn := e.take(); conn != nil {
		return conn, nil
	}
	return e.connect(ctx)
}

// inProcess is a server that a transport reaches without any network.
func inProcess(name string, rt http.RoundTripper) *endpoint {
	c := &http.Client{Transport: rt, CheckRedirect: noRedirect}
	return &endpoint{name: name, base: "http://muster", rest: c, ws: c, local: true}
}

// noRedirect keeps the token from following a redirect to another host: a
// node proxies by itself and never redirects.
func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
