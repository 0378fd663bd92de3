// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/console"
	"github.com/muster-vm/muster/internal/pki"
	"github.com/muster-vm/muster/internal/version"
)

// The host key of the console shell is one for the whole cluster, so that a
// person meets the same key on every node. It is kept sealed.
const (
	hostKeyKey   = configdb.Root + "secret/ssh-host-key"
	hostKeyLabel = "cluster/ssh-host-key"
)

// shell returns the console shell of this node.
func (d *Daemon) shell(m *member) (*console.Server, error) {
	return console.New(console.Config{
		HostKey: m.hostKey,
		Users: func(name string) (api.User, bool) {
			u, err := configdb.Users.Find(m.store.Local(), "", name)
			return u, err == nil
		},
		Handler: func(actor string, role api.Role, source string) http.RoundTripper {
			return console.NewTransport(d.rest.HTTPServer(d.rest.SessionHandler(actor, role)), source)
		},
		Cluster: func() string { return m.info.Cluster },
		Node:    func() string { return m.info.Node },
		Audit:   m.auditShell,
		NoQuorum: func() string {
			if l := m.noQuorum(); l != nil {
				return l.Banner
			}
			return ""
		},
		Version: version.Version,
		Log:     m.log.With("module", "console"),
	})
}

// hostKey reads the key, or makes it if this is the first shell of the cluster.
func (m *member) hostKey(ctx context.Context) (ssh.Signer, error) {
	// It never changes, so that this replica's is good without a quorum, too.
	e, ok := m.store.Local().Get(hostKeyKey)
	if !ok {
		if _, err := m.store.View(ctx); err != nil { // it may not have come here yet
			return nil, err
		}
		if err := m.makeHostKey(ctx); err != nil {
			return nil, err
		}
		e, ok = m.store.Local().Get(hostKeyKey)
	}
	if !ok {
		return nil, fmt.Errorf("the host key of the shell is not there")
	}
	plain, err := pki.Open(m.info.clusterKey, hostKeyLabel, e.Value)
	if err != nil {
		return nil, err
	}
	return console.ParseHostKey(plain)
}

func (m *member) makeHostKey(ctx context.Context) error {
	plain, err := console.NewHostKey()
	if err != nil {
		return err
	}
	sealed, err := pki.Seal(m.info.clusterKey, hostKeyLabel, plain)
	if err != nil {
		return err
	}
	_, err = configdb.Transact(ctx, m.store, "node "+m.info.Node, 4, func(v *configdb.View, tx *configdb.Txn) error {
		if _, ok := v.Get(hostKeyKey); ok {
			return nil // another node was faster
		}
		tx.RequireRevision(hostKeyKey, 0)
		tx.Put(hostKeyKey, sealed)
		return nil
	})
	return err
}

// auditShell records a login or its end. That it cannot be recorded without a
// quorum must not lock anybody out.
func (m *member) auditShell(e console.Entry) {
	ev := api.NewEvent("audit."+e.Action, api.SeverityInfo, "", api.Meta{}, e.Action+" of "+e.User+" at the shell: "+e.Detail, time.Now())
	ev.Spec.Node, ev.Spec.Actor, ev.Spec.Source = m.info.Node, console.ActorPrefix+e.User, e.Source
	ctx, cancel := context.WithTimeout(context.Background(), writeDeadline)
	defer cancel()
	tx := &configdb.Txn{Actor: console.ActorPrefix + e.User}
	err := configdb.PutEvent(tx, &ev)
	if err == nil {
		_, err = m.store.Txn(ctx, tx)
	}
	if err != nil {
		m.log.Warn("login not recorded", "user", e.User, "err", err)
	}
}
