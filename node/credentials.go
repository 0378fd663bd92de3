// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/clusternet"
	"github.com/muster-vm/muster/internal/pki"
)

// Files of a node's credentials besides those in files.go.
const (
	// authorityFile is a copy of what the cluster object says of the authority;
	// see storedAuthority.
	authorityFile = "authority.json"
	// redoFile has a whole set of credentials while they are being written, so
	// that a crash leaves either set and never halves of two.
	redoFile = "credentials.new"
)

// credentials are what a node shows and trusts, as they lie on its disk.
type credentials struct {
	// Key and Cert are the node's own, CA the authorities it trusts; PEM.
	Key  []byte `json:"key"`
	Cert []byte `json:"cert"`
	CA   []byte `json:"ca"`
	// Authority is storedAuthority in JSON; empty until the replica had it.
	Authority []byte `json:"authority,omitempty"`
}

// storedAuthority lets a node whose certificate has ended come back, before it
// can read the cluster object from its replica; see internal/pki/DESIGN.md.
type storedAuthority struct {
	// Life and Revision of the cluster object: a replica that has not caught up
	// yet, after a restart, must not bring back an authority that was replaced.
	Life        uint64 `json:"life"`
	Revision    uint64 `json:"revision"`
	CACert      string `json:"caCert"`
	SealedCAKey []byte `json:"sealedCAKey"`
	Bridge      string `json:"bridge,omitempty"`
}

// authority returns the copy, empty if there is none.
func (c *credentials) authority() (a storedAuthority, err error) {
	if len(c.Authority) == 0 {
		return a, nil
	}
	if err := json.Unmarshal(c.Authority, &a); err != nil {
		return a, fmt.Errorf("%s is damaged: %w", authorityFile, err)
	}
	return a, nil
}

// shown returns the credentials in the form of clusternet.
func (c *credentials) shown() clusternet.Credentials {
	a, err := c.authority()
	if err != nil {
		a = storedAuthority{} // goes on without the bridge; it is written anew
	}
	return clusternet.Credentials{Cert: c.Cert, Key: c.Key, CA: c.CA, Bridge: []byte(a.Bridge)}
}

// files are the parts with their names and modes.
func (c *credentials) files() []credentialFile {
	out := []credentialFile{{keyFile, c.Key, 0o600}, {certFile, c.Cert, 0o644}, {caFile, c.CA, 0o644}}
	if len(c.Authority) > 0 {
		out = append(out, credentialFile{authorityFile, c.Authority, 0o600})
	}
	return out
}

type credentialFile struct {
	name string
	data []byte
	mode fs.FileMode
}

// save replaces the credentials in a directory.
func (c *credentials) save(dir string) error {
	record, err := json.Marshal(c)
	if err != nil {
		return err
	}
	redo := filepath.Join(dir, redoFile)
	if err := writeFile(redo, record, 0o600); err != nil {
		return fmt.Errorf("save credentials: %w", err)
	}
	// From here on the new set counts, whatever happens.
	return c.finish(dir)
}

// finish writes what the record says and removes it.
func (c *credentials) finish(dir string) error {
	for _, f := range c.files() {
		path := filepath.Join(dir, f.name)
		if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, f.data) {
			continue
		}
		if err := writeFile(path, f.data, f.mode); err != nil {
			return fmt.Errorf("save credentials: %w", err)
		}
	}
	if err := os.Remove(filepath.Join(dir, redoFile)); err != nil {
		return fmt.Errorf("save credentials: %w", err)
	}
	return syncDir(dir)
}

// redoCredentials finishes what a crash interrupted.
func redoCredentials(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, redoFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read credentials: %w", err)
	}
	var c credentials
	if err := json.Unmarshal(b, &c); err != nil {
		return fmt.Errorf("%s is damaged (%w); restore the data directory from a backup, or remove the node from its cluster and start with an empty data directory", filepath.Join(dir, redoFile), err)
	}
	return c.finish(dir)
}

// readAuthority returns the copy of the authority, if there is one.
func readAuthority(dir string) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(dir, authorityFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read membership: %w", err)
	}
	return b, nil
}

// secretFiles are for root only.
var secretFiles = []string{keyFile, clusterKeyFile, authorityFile, redoFile, pendingKeyFile, identityFile}

// tightenModes puts right what was opened by hand: a key that others on the host
// can read is no secret.
func tightenModes(dir string, log *slog.Logger) error {
	for _, name := range secretFiles {
		path := filepath.Join(dir, name)
		st, err := os.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("check the mode of %s: %w", path, err)
		}
		if !st.Mode().IsRegular() || st.Mode().Perm()&0o077 == 0 {
			continue
		}
		if err := os.Chmod(path, 0o600); err != nil {
			return fmt.Errorf("close %s to others: %w", path, err)
		}
		log.Warn("a file with secrets was open to other users of this host; it is closed now, consider it known and replace it", "file", path, "was", st.Mode().Perm().String())
	}
	return nil
}

// interimLife is how long an interim certificate lasts.
const interimLife = 24 * time.Hour

// interim issues a certificate for this node's present key, from the copy of
// the authority's sealed key: for a node whose certificate has ended, or was
// signed by an authority that is trusted no longer. It is never written to disk.
func (m *membership) interim(c *credentials, now time.Time) (clusternet.Credentials, error) {
	none := clusternet.Credentials{}
	leaf, err := pki.ParseCert(c.Cert)
	if err != nil {
		return none, err
	}
	a, err := c.authority()
	if err != nil {
		return none, err
	}
	if len(a.SealedCAKey) == 0 {
		return none, fmt.Errorf("%s is not there", authorityFile)
	}
	if id, ok := pki.NodeIDOf(leaf); !ok || id != m.NodeID {
		return none, fmt.Errorf("the certificate is not that of node %s", m.NodeID)
	}
	if _, err := tls.X509KeyPair(c.Cert, c.Key); err != nil {
		return none, fmt.Errorf("node certificate: %w", err)
	}
	caKey, err := pki.Open(m.clusterKey, caKeyLabel, a.SealedCAKey)
	if err != nil {
		return none, err
	}
	host, _, err := net.SplitHostPort(m.Address)
	if err != nil {
		return none, err
	}
	// The beginning of the ended one: good also for who has an earlier clock.
	t := pki.Terms{NodeID: m.NodeID, Name: m.Node, Host: host, NotBefore: leaf.NotBefore, NotAfter: now.Add(interimLife), At: now}
	if now.Before(t.NotBefore) {
		return none, fmt.Errorf("the clock of this host says %s, which is before its certificate was issued (%s); set the clock", stamp(now), stamp(leaf.NotBefore))
	}
	cert, err := pki.Issue([]byte(a.CACert), caKey, leaf.PublicKey, t)
	if err != nil {
		return none, err
	}
	out := c.shown()
	out.Cert = cert
	_, err = out.Check()
	return out, err
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// held are the credentials as they were read at the start.
func (m *membership) held() credentials {
	return credentials{Key: m.key, Cert: m.cert, CA: m.ca, Authority: m.authority}
}

// identity is what this node shows from the start on.
func (m *membership) identity(now time.Time) (*clusternet.Identity, error) {
	held := m.held()
	show := held.shown()
	leaf, err := show.Check()
	if err == nil {
		if id, _ := pki.NodeIDOf(leaf); id != m.NodeID {
			return nil, fmt.Errorf("the certificate is that of node %s, but the data directory is that of %s; restore both from one backup", id, m.NodeID)
		}
	}
	if err != nil || now.After(leaf.NotAfter) {
		stopgap, ierr := m.interim(&held, now)
		switch {
		case ierr == nil:
			show = stopgap
		case err != nil:
			return nil, fmt.Errorf("%w; restore key, certificate and ca.crt from one backup, or remove the node and start with an empty data directory", err)
		}
	}
	id, err := clusternet.NewIdentity(show.Cert, show.Key, show.CA)
	if err != nil {
		return nil, err
	}
	id.Life = m.life()
	return id, id.Replace(show) // with the bridge
}

// older reports whether a cluster object is from before the copy was made.
func (a *storedAuthority) older(c *api.Cluster) bool {
	if c.Spec.Life != a.Life {
		return c.Spec.Life < a.Life
	}
	return c.Meta.Revision < a.Revision
}

// copyAuthority is what a node keeps of a cluster object.
func copyAuthority(c *api.Cluster) ([]byte, error) {
	a := storedAuthority{Life: c.Spec.Life, Revision: c.Meta.Revision, CACert: c.Spec.CACert, SealedCAKey: c.Spec.SealedCAKey}
	if r := c.Spec.Rotation; r != nil {
		a.Bridge = r.Bridge
	}
	b, err := json.MarshalIndent(a, "", "  ")
	return append(b, '\n'), err
}

// bundleOf are the authorities that a cluster trusts, the one that signs first.
func bundleOf(c *api.ClusterSpec) []byte {
	if c.Rotation == nil {
		return pki.JoinPEM([]byte(c.CACert))
	}
	return pki.JoinPEM([]byte(c.CACert), []byte(c.Rotation.CACert))
}
