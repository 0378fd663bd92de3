// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package system

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/muster-vm/muster/scripts/bench.d/configdb/load"
)

// Muster is three daemons. Clients speak REST over TLS 1.3 and HTTP/1.1, each
// on a connection of its own, with a token.
type Muster struct {
	*Servers
	runDir string
	ports  []int
	token  string
	tls    *tls.Config
	shared [load.Nodes]*http.Client // HTTP/2, see DialShared
}

// joinLimit bounds init and join.
const joinLimit = 60 * time.Second

// StartMuster founds a cluster with the product's own commands.
func StartMuster(ctx context.Context, h *Host) (_ *Muster, err error) {
	dir, err := h.Fresh("muster")
	if err != nil {
		return nil, err
	}
	// Sockets need short paths. The same name each time, so that nothing piles
	// up when a run was killed.
	sum := sha256.Sum256([]byte(h.Data))
	m := &Muster{runDir: fmt.Sprintf("/run/muster-bench-%x", sum[:4])}
	if err := errors.Join(os.RemoveAll(m.runDir), os.Mkdir(m.runDir, 0o700)); err != nil {
		return nil, fmt.Errorf("folder of the sockets: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Stop())
		}
	}()
	if m.ports, err = FreePorts(load.Nodes); err != nil {
		return nil, err
	}
	m.Servers, err = NewServers(h, dir, func(node int) (string, []string) {
		return "musterd", []string{
			"--data-dir", m.data(dir, node), "--listen", m.address(node), "--node-name", fmt.Sprintf("node%d", node),
			"--run-dir", filepath.Join(m.runDir, fmt.Sprint(node)), "--log-level", "warn",
		}
	})
	if err != nil {
		return nil, err
	}
	return m, m.found(ctx, h)
}

func (m *Muster) data(dir string, node int) string {
	return filepath.Join(dir, fmt.Sprintf("node%d", node))
}

func (m *Muster) address(node int) string { return fmt.Sprintf("127.0.0.1:%d", m.ports[node]) }

// found makes a cluster of the three daemons.
func (m *Muster) found(ctx context.Context, h *Host) error {
	for i := range load.Nodes {
		socket := filepath.Join(m.data(m.Dir, i), "muster.sock")
		if err := m.Await(ctx, socket+" is there", func(context.Context) error { _, err := os.Stat(socket); return err }); err != nil {
			return err
		}
	}
	var init struct{ Token, CACert string }
	if err := m.muster(ctx, h, &init, "cluster", "init", "--name", "bench", "--data-dir", m.data(m.Dir, 0)); err != nil {
		return err
	}
	m.token = init.Token
	ca := filepath.Join(m.Dir, "ca.crt")
	if err := os.WriteFile(ca, []byte(init.CACert), 0o600); err != nil {
		return err
	}
	var err error
	if m.tls, err = ClientTLS(ca); err != nil {
		return err
	}
	for i := range m.shared {
		var only http.Protocols
		only.SetHTTP2(true)
		m.shared[i] = &http.Client{Transport: &http.Transport{TLSClientConfig: m.tls.Clone(), Protocols: &only}}
	}
	m.tls.NextProtos = []string{"http/1.1"}
	for i := 1; i < load.Nodes; i++ {
		var join struct{ Token string }
		args := []string{"--server", "https://" + m.address(0), "--token", m.token, "cluster", "token", "create"}
		if err := m.muster(ctx, h, &join, args...); err != nil {
			return err
		}
		if err := m.muster(ctx, h, nil, "cluster", "join", join.Token, "--data-dir", m.data(m.Dir, i)); err != nil {
			return err
		}
	}
	return m.Await(ctx, "all nodes see three voters", m.whole)
}

// muster runs the command line and decodes what it prints.
func (m *Muster) muster(ctx context.Context, h *Host, into any, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, joinLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(h.Programs, "muster"), append(args, "-o", "json")...)
	cmd.Env = append(os.Environ(), "MUSTER_CACERT="+filepath.Join(m.Dir, "ca.crt"))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("muster %s: %w: %s", args[0], err, stderr.String())
	}
	if into == nil {
		return nil
	}
	if err := json.Unmarshal(out, into); err != nil {
		return fmt.Errorf("muster %s printed %.200q: %w", args[0], out, err)
	}
	return nil
}

// MusterStatus is what a node says of the cluster.
type MusterStatus struct {
	Leader         string
	Term, Revision uint64
	Quorum         bool
	Members        []struct {
		Voter bool
		Phase string
	}
}

// Status asks one node.
func (m *Muster) Status(ctx context.Context, node int) (s MusterStatus, err error) {
	b, err := get(ctx, "https://"+m.address(node)+"/api/v1/cluster", m.tls, m.token)
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(b, &s)
}

// whole is content when every node sees three voters that are well.
func (m *Muster) whole(ctx context.Context) error {
	for i := range load.Nodes {
		s, err := m.Status(ctx, i)
		if err != nil {
			return err
		}
		well := 0
		for _, v := range s.Members {
			if v.Voter && v.Phase == "ready" {
				well++
			}
		}
		if well != load.Nodes || s.Leader == "" || !s.Quorum {
			return fmt.Errorf("node %d sees %d voters ready, leader %q, quorum %t", i, well, s.Leader, s.Quorum)
		}
	}
	return nil
}

// Leader implements load.Cluster.
func (m *Muster) Leader(ctx context.Context) (int, error) {
	var last error
	for i := range load.Nodes {
		s, err := m.Status(ctx, i)
		var n int
		if err == nil {
			_, err = fmt.Sscanf(s.Leader, "node%d", &n)
		}
		if err == nil {
			return n, nil
		}
		last = err
	}
	return 0, fmt.Errorf("ask for the leader: %w", last)
}

// Restart implements load.Killable.
func (m *Muster) Restart(ctx context.Context, node int) error {
	if err := m.StartAgain(node); err != nil {
		return err
	}
	return m.Await(ctx, fmt.Sprintf("node %d is back", node), m.whole)
}

// Stop ends everything.
func (m *Muster) Stop() error {
	var err error
	if m.Servers != nil {
		err = m.Servers.Stop()
	}
	return errors.Join(err, os.RemoveAll(m.runDir))
}

type musterSession struct {
	http *httpConn
	head string // of every request, behind the first line
}

// Dial implements load.Cluster.
func (m *Muster) Dial(ctx context.Context, node int) (load.Session, error) {
	c, err := dialHTTP(ctx, m.address(node), m.tls)
	if err != nil {
		return nil, err
	}
	return &musterSession{c, " HTTP/1.1\r\nHost: " + m.address(node) + "\r\nAuthorization: Bearer " + m.token + "\r\n"}, nil
}

// Put implements load.Session.
func (s *musterSession) Put(ctx context.Context, key string, value []byte) error {
	status, b, err := s.http.call(ctx, "PUT /api/v1/raw/"+key+s.head, value)
	if err == nil && status != http.StatusCreated && status != http.StatusOK {
		err = fmt.Errorf("put %s: status %d: %.200s", key, status, b)
	}
	return err
}

// Get implements load.Session.
func (s *musterSession) Get(ctx context.Context, key string) ([]byte, error) {
	status, b, err := s.http.call(ctx, "GET /api/v1/raw/"+key+s.head, nil)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("get %s: status %d: %.200s", key, status, b)
	}
	return b, err
}

// Close implements load.Session.
func (s *musterSession) Close() { s.http.Close() }

// sharedSession uses HTTP/2, where a call can be given up without its
// connection. For everything else it costs more than a connection each.
type sharedSession struct {
	client *http.Client
	url    string // of all keys
	token  string
}

// DialShared implements load.Killable.
func (m *Muster) DialShared(_ context.Context, node int) (load.Session, error) {
	return &sharedSession{m.shared[node], "https://" + m.address(node) + "/api/v1/raw/", m.token}, nil
}

func (s *sharedSession) call(ctx context.Context, method, key string, value []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, s.url+key, bytes.NewReader(value))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+s.token)
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxReply))
	if err == nil && resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusCreated {
		err = fmt.Errorf("%s %s: %s: %.200s", method, key, resp.Status, b)
	}
	return b, err
}

// Put implements load.Session.
func (s *sharedSession) Put(ctx context.Context, key string, value []byte) error {
	_, err := s.call(ctx, http.MethodPut, key, value)
	return err
}

// Get implements load.Session.
func (s *sharedSession) Get(ctx context.Context, key string) ([]byte, error) {
	return s.call(ctx, http.MethodGet, key, nil)
}

// Close implements load.Session. The connection stays for the others.
func (s *sharedSession) Close() {}
