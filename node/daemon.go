// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/thejerf/suture/v4"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/clusternet"
	"github.com/muster-vm/muster/internal/version"
	"github.com/muster-vm/muster/rest"
)

// Times of the daemon.
const (
	shutdownGrace = 3 * time.Second
	// answerGrace is what requests that are being answered have of it.
	answerGrace = 2 * time.Second
	initTimeout = 30 * time.Second
	joinTimeout = 60 * time.Second
)

// Daemon is one musterd.
type Daemon struct {
	cfg   *Config
	log   *slog.Logger
	rest  *rest.Server
	sup   *suture.Supervisor
	table *serviceTable

	fatalOnce sync.Once
	fatal     chan error

	become sync.Mutex // held by init and join, one at a time

	mu     sync.Mutex
	member *member // nil until this host belongs to a cluster
}

// New prepares a daemon; Run starts it.
func New(cfg *Config, log *slog.Logger) (*Daemon, error) {
	d := &Daemon{cfg: cfg, log: log, fatal: make(chan error, 1), table: newServiceTable(log)}
	srv, err := rest.New(rest.Config{
		Version: version.Version, Node: d.nodeName, DB: d.db, Bootstrap: d, Cluster: clusterOf{d}, Authority: authorityOf{d}, Placer: restPlacer{},
		Images: imagesOf{d}, Consoles: consolesOf{d}, Machines: machinesOf{d}, Peers: d, Backups: backupsOf{d}, Disaster: d, HA: haOf{d}, Forecaster: forecaster{restPlacer{}}, Monitor: monitorOf{d}, Power: powerOf{d}, PoolKeys: poolKeysOf{d}, PeerName: d.peerName, Services: d.services, NoQuorum: d.noQuorum, Log: log.With("module", "rest"),
	})
	if err != nil {
		return nil, err
	}
	d.rest = srv
	return d, nil
}

// Serve runs a daemon until the context ends. VMs live on.
func Serve(ctx context.Context, cfg *Config, log *slog.Logger) error {
	for {
		d, err := New(cfg, log)
		if err != nil {
			return err
		}
		if err := d.Run(ctx); !errors.Is(err, errBeginAnew) {
			return err
		}
	}
}

// Run is one life of the daemon, until the context ends.
func (d *Daemon) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	lock, err := lockDir(d.cfg.DataDir)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	runLock, err := lockRunDir(d.cfg.RunDir)
	if err != nil {
		return err
	}
	defer func() { _ = runLock.Close() }()
	if err := d.dropFounding(); err != nil {
		return err
	}
	if err := tightenModes(d.cfg.DataDir, d.log); err != nil {
		return err
	}
	if err := d.finishRecovery(ctx); err != nil {
		return err
	}
	info, err := loadMembership(d.cfg.DataDir)
	if err != nil {
		return err
	}
	if info != nil {
		if err := checkLevelFile(d.cfg.DataDir, info); err != nil {
			return err
		}
	}
	// The services go on for the moment that it takes to say that they end.
	work, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	d.sup = newSupervisor("musterd", d.log)
	if info != nil {
		err = d.start(info)
	} else {
		err = probePort(d.cfg.Listen)
	}
	if err != nil {
		return err
	}
	defer d.closeMember()
	local, err := d.listenLocal()
	if err != nil {
		return err
	}
	d.serve("local", d.rest.HTTPServer(d.rest.LocalHandler()), local)
	done := d.sup.ServeBackground(work)
	d.log.Info("musterd ready", "node", d.nodeName(), "data", d.cfg.DataDir, "listen", d.cfg.Listen, "member", info != nil, "version", version.Version)
	select {
	case err = <-d.fatal:
		if !errors.Is(err, errBeginAnew) {
			d.log.Error("this node cannot go on", "err", err)
		}
	case <-ctx.Done():
		if m := d.current(); m != nil {
			m.sayStopping()
		}
	}
	end()
	if serr := <-done; serr != nil && !errors.Is(serr, context.Canceled) {
		d.log.Warn("services did not all end", "err", serr)
	}
	return err
}

func (d *Daemon) fail(err error) {
	d.fatalOnce.Do(func() { d.fatal <- err })
}

// probePort finds a port in use before anybody tries to init or join.
func probePort(listen string) error {
	ln, packets, err := listenPort(listen)
	if err != nil {
		return err
	}
	return errors.Join(ln.Close(), packets.Close())
}

func portError(listen string, err error) error {
	return fmt.Errorf("cannot listen on %s: %w; stop what uses the port, or choose another with --listen ADDR:PORT", listen, err)
}

// start opens the membership and adds its services to the supervisor.
func (d *Daemon) start(info *membership) error {
	if err := takeRunDir(d.cfg.RunDir, info); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(d.cfg.DataDir, runDirFile), []byte(d.cfg.RunDir+"\n"), 0o600); err != nil {
		return fmt.Errorf("note the run directory: %w", err)
	}
	ln, packets, err := listenPort(d.cfg.Listen)
	if err != nil {
		return err
	}
	m, err := openMember(d.cfg, info, ln, packets, d.fail, d.services, d.log)
	if err != nil {
		return errors.Join(err, ln.Close(), packets.Close())
	}
	m.table = d.table
	d.mu.Lock()
	d.member = m
	d.mu.Unlock()
	for name, s := range m.services() {
		d.table.supervise(d.sup, name, s)
	}
	d.serve("web", d.rest.HTTPServer(d.rest.Handler()), m.webListener)
	shell, err := d.shell(m)
	if err != nil {
		return err
	}
	d.table.supervise(d.sup, "shell", func(ctx context.Context) error {
		// A new listener for each run: Serve closes it.
		return shell.Serve(ctx, m.port.Listener(clusternet.ProtoSSH))
	})
	return nil
}

// serve adds an HTTP server to the supervisor. Requests that are being answered when
// it ends are answered first: one of them may be what ends the daemon.
func (d *Daemon) serve(name string, srv *http.Server, ln net.Listener) {
	d.table.supervise(d.sup, name, func(ctx context.Context) error {
		answered := make(chan struct{})
		stop := context.AfterFunc(ctx, func() {
			defer close(answered)
			grace, cancel := context.WithTimeout(context.Background(), answerGrace)
			defer cancel()
			_ = srv.Shutdown(grace)
			_ = srv.Close()
		})
		err := srv.Serve(ln)
		if !stop() {
			<-answered
		}
		if !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve %s: %w", name, err)
		}
		return suture.ErrDoNotRestart
	})
}

// listenLocal opens the administrator's socket. The directory's lock is held,
// so a socket that is there belongs to nobody.
func (d *Daemon) listenLocal() (net.Listener, error) {
	path := filepath.Join(d.cfg.DataDir, socketFile)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("local socket: %w", err)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("local socket %s: %w (the path of a socket has at most 107 bytes)", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("local socket: %w", err), ln.Close())
	}
	return ln, nil
}

func (d *Daemon) current() *member {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.member
}

func (d *Daemon) closeMember() {
	if m := d.current(); m != nil {
		if err := m.close(); err != nil {
			d.log.Warn("configuration database not closed cleanly", "err", err)
		}
	}
}

func (d *Daemon) nodeName() string {
	if m := d.current(); m != nil {
		return m.info.Node
	}
	return d.cfg.NodeName
}

func (d *Daemon) db() (configdb.DB, bool) {
	if m := d.current(); m != nil {
		return m.store, true
	}
	return nil, false
}

func (d *Daemon) peerName(r *http.Request) (string, bool) {
	m := d.current()
	id, ok := clusternet.PeerNode(r.TLS)
	if m == nil || !ok {
		return "", false
	}
	n, err := configdb.Nodes.Get(m.store.Local(), id)
	if err != nil {
		return "", false // a node that was removed is nobody
	}
	return n.Meta.Name, true
}

// Proxy implements rest.Peers.
func (d *Daemon) Proxy(node string) (http.RoundTripper, *url.URL, error) {
	m := d.current()
	if m == nil {
		return nil, nil, notMember()
	}
	n, err := configdb.Nodes.Find(m.store.Local(), "", node)
	if err != nil {
		return nil, nil, err
	}
	return m.peerTransport(n), &url.URL{Scheme: "https", Host: n.Spec.Address}, nil
}

func notMember() error {
	return api.Errorf(api.CodeNotMember, "this host belongs to no cluster yet; run: muster cluster init, or: muster cluster join TOKEN")
}

// services is how this daemon's services fare.
func (d *Daemon) services() []api.ServiceStatus { return d.table.list(d.nodeName()) }
