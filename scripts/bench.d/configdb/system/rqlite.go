// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package system

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"

	"github.com/muster-vm/muster/scripts/bench.d/configdb/load"
)

// Rqlite is three rqlited. Clients speak its HTTP interface over TLS 1.3, each
// on a connection of its own.
type Rqlite struct {
	*Servers
	http, raft []int // ports
	tls        *tls.Config
}

// StartRqlite makes a new cluster.
func StartRqlite(ctx context.Context, h *Host) (_ *Rqlite, err error) {
	dir, err := h.Fresh("rqlite")
	if err != nil {
		return nil, err
	}
	certs, err := NewCerts(dir)
	if err != nil {
		return nil, err
	}
	ports, err := FreePorts(2 * load.Nodes)
	if err != nil {
		return nil, err
	}
	q := &Rqlite{http: ports[:load.Nodes], raft: ports[load.Nodes:]}
	if q.tls, err = ClientTLS(certs.CA); err != nil {
		return nil, err
	}
	q.tls.NextProtos = []string{"http/1.1"}
	if q.Servers, err = NewServers(h, dir, func(node int) (string, []string) { return "rqlited", q.args(dir, node, certs) }); err != nil {
		return nil, err
	}
	if err := q.prepare(ctx); err != nil {
		return nil, errors.Join(err, q.Stop())
	}
	return q, nil
}

func (q *Rqlite) args(dir string, node int, certs *Certs) []string {
	var all []string
	for _, p := range q.raft {
		all = append(all, fmt.Sprintf("127.0.0.1:%d", p))
	}
	return []string{
		"-node-id", fmt.Sprint(node), "-http-addr", q.address(node), "-raft-addr", all[node],
		"-bootstrap-expect", fmt.Sprint(load.Nodes), "-join", strings.Join(all, ","),
		"-http-cert", certs.Cert, "-http-key", certs.Key,
		"-node-cert", certs.Cert, "-node-key", certs.Key, "-node-ca-cert", certs.CA, "-node-verify-client",
		"-node-verify-server-name", "localhost",
		filepath.Join(dir, fmt.Sprintf("node%d", node)),
	}
}

func (q *Rqlite) address(node int) string { return fmt.Sprintf("127.0.0.1:%d", q.http[node]) }

// prepare waits until all are ready and makes the table.
func (q *Rqlite) prepare(ctx context.Context) error {
	if err := q.Await(ctx, "all rqlited are ready", q.whole); err != nil {
		return err
	}
	s, err := q.Dial(ctx, 0)
	if err != nil {
		return err
	}
	defer s.Close()
	ctx, cancel := context.WithTimeout(ctx, setupCall)
	defer cancel()
	_, err = s.(*rqliteSession).ask(ctx, "/db/execute", "CREATE TABLE kv (k TEXT PRIMARY KEY, v TEXT) WITHOUT ROWID")
	return err
}

func (q *Rqlite) whole(ctx context.Context) error {
	for i := range load.Nodes {
		if _, err := get(ctx, "https://"+q.address(i)+"/readyz", q.tls, ""); err != nil {
			return err
		}
	}
	_, err := q.Leader(ctx)
	return err
}

// Leader implements load.Cluster.
func (q *Rqlite) Leader(ctx context.Context) (int, error) {
	b, err := get(ctx, "https://"+q.address(0)+"/nodes", q.tls, "")
	if err != nil {
		return 0, err
	}
	var nodes map[string]struct{ Leader, Reachable bool }
	if err := json.Unmarshal(b, &nodes); err != nil {
		return 0, fmt.Errorf("rqlited answered %.200q: %w", b, err)
	}
	leader := -1
	for name, n := range nodes {
		if !n.Reachable {
			return 0, fmt.Errorf("rqlited %s is not reachable", name)
		}
		if n.Leader {
			if _, err := fmt.Sscan(name, &leader); err != nil {
				return 0, err
			}
		}
	}
	if len(nodes) != load.Nodes || leader < 0 {
		return 0, fmt.Errorf("rqlited knows %d nodes, leader %d", len(nodes), leader)
	}
	return leader, nil
}

// Restart implements load.Killable.
func (q *Rqlite) Restart(ctx context.Context, node int) error {
	if err := q.StartAgain(node); err != nil {
		return err
	}
	return q.Await(ctx, fmt.Sprintf("rqlited %d is back", node), q.whole)
}

type rqliteSession struct {
	http *httpConn
	head string // of every request, behind the path
}

// Dial implements load.Cluster.
func (q *Rqlite) Dial(ctx context.Context, node int) (load.Session, error) {
	c, err := dialHTTP(ctx, q.address(node), q.tls)
	if err != nil {
		return nil, err
	}
	return &rqliteSession{c, " HTTP/1.1\r\nHost: " + q.address(node) + "\r\nContent-Type: application/json\r\n"}, nil
}

// DialShared implements load.Killable.
func (q *Rqlite) DialShared(ctx context.Context, node int) (load.Session, error) {
	return q.Dial(ctx, node)
}

// ask sends one statement with its parameters.
func (s *rqliteSession) ask(ctx context.Context, path string, statement ...string) ([]byte, error) {
	body, err := json.Marshal([][]string{statement})
	if err != nil {
		return nil, err
	}
	status, b, err := s.http.call(ctx, "POST "+path+s.head, body)
	if err != nil {
		return nil, err
	}
	if status != http.StatusOK || bytes.Contains(b, []byte(`"error"`)) {
		return nil, fmt.Errorf("%s: status %d: %.200s", path, status, b)
	}
	return b, nil
}

// Put implements load.Session.
func (s *rqliteSession) Put(ctx context.Context, key string, value []byte) error {
	_, err := s.ask(ctx, "/db/execute", "INSERT OR REPLACE INTO kv(k, v) VALUES(?, ?)", key, string(value))
	return err
}

// Get implements load.Session.
func (s *rqliteSession) Get(ctx context.Context, key string) ([]byte, error) {
	b, err := s.ask(ctx, "/db/query?level=linearizable", "SELECT v FROM kv WHERE k = ?", key)
	if err != nil {
		return nil, err
	}
	var r struct{ Results []struct{ Values [][]string } }
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("rqlited answered %.200q: %w", b, err)
	}
	if len(r.Results) != 1 || len(r.Results[0].Values) != 1 || len(r.Results[0].Values[0]) != 1 {
		return nil, fmt.Errorf("get %s: not one row: %.200s", key, b)
	}
	return []byte(r.Results[0].Values[0][0]), nil
}

// Close implements load.Session.
func (s *rqliteSession) Close() { s.http.Close() }
