// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ovs

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/go-logr/logr/funcr"
	"github.com/ovn-kubernetes/libovsdb/cache"
	"github.com/ovn-kubernetes/libovsdb/client"
	"github.com/ovn-kubernetes/libovsdb/model"
	"github.com/ovn-kubernetes/libovsdb/ovsdb"
)

// OwnerKey is the key in external_ids that marks what is ours.
const OwnerKey = "muster"

// CallDeadline bounds connecting, and one transaction.
const CallDeadline = 5 * time.Second

// The rows, with the columns that matter here.
type (
	rootRow struct {
		UUID    string   `ovsdb:"_uuid"`
		Bridges []string `ovsdb:"bridges"`
		Version *string  `ovsdb:"ovs_version"`
	}
	bridgeRow struct {
		UUID        string            `ovsdb:"_uuid"`
		Name        string            `ovsdb:"name"`
		Datapath    string            `ovsdb:"datapath_type"`
		FailMode    *string           `ovsdb:"fail_mode"`
		Ports       []string          `ovsdb:"ports"`
		ExternalIDs map[string]string `ovsdb:"external_ids"`
	}
	portRow struct {
		UUID        string            `ovsdb:"_uuid"`
		Name        string            `ovsdb:"name"`
		Interfaces  []string          `ovsdb:"interfaces"`
		Tag         *int              `ovsdb:"tag"`
		Trunks      []int             `ovsdb:"trunks"`
		VLANMode    *string           `ovsdb:"vlan_mode"`
		QoS         *string           `ovsdb:"qos"`
		ExternalIDs map[string]string `ovsdb:"external_ids"`
	}
	interfaceRow struct {
		UUID        string            `ovsdb:"_uuid"`
		Name        string            `ovsdb:"name"`
		Type        string            `ovsdb:"type"`
		OFPort      *int              `ovsdb:"ofport"`
		Error       *string           `ovsdb:"error"`
		ExternalIDs map[string]string `ovsdb:"external_ids"`
	}
)

// Conn is a connection to the database of one switch.
type Conn struct {
	c       client.Client
	mu      sync.Mutex
	changed chan struct{} // closed, and replaced, at every change
	done    chan struct{} // closed at the end of the connection
	stop    func()        // ends the goroutine that waits for it
}

// Dial connects and waits for the first picture of the database. Endpoint is
// as in ovsdb(7), such as unix:/var/run/openvswitch/db.sock.
func Dial(ctx context.Context, endpoint string, log *slog.Logger) (*Conn, error) {
	m, err := model.NewClientDBModel("Open_vSwitch", map[string]model.Model{
		"Open_vSwitch": &rootRow{}, "Bridge": &bridgeRow{}, "Port": &portRow{}, "Interface": &interfaceRow{},
		"QoS": &qosRow{}, "Queue": &queueRow{},
	})
	if err != nil {
		return nil, fmt.Errorf("describe the switch's database: %w", err)
	}
	errs := funcr.New(func(_, text string) { log.Warn("Open vSwitch's database", "err", text) }, funcr.Options{})
	cl, err := client.NewOVSDBClient(m, client.WithEndpoint(endpoint), client.WithLogger(&errs))
	if err != nil {
		return nil, fmt.Errorf("connect to the switch's database at %s: %w", endpoint, err)
	}
	ctx, cancel := context.WithTimeout(ctx, CallDeadline)
	defer cancel()
	if err := cl.Connect(ctx); err != nil {
		return nil, fmt.Errorf("connect to the switch's database at %s: %w", endpoint, err)
	}
	conn := newConn(cl)
	cl.Cache().AddEventHandler(&cache.EventHandlerFuncs{
		AddFunc:    func(string, model.Model) { conn.notify() },
		UpdateFunc: func(string, model.Model, model.Model) { conn.notify() },
		DeleteFunc: func(string, model.Model) { conn.notify() },
	})
	// With the columns named: of a table as a whole there would come columns
	// that the rows here do not have, such as counters every few seconds.
	r, b, p, i, q, u := &rootRow{}, &bridgeRow{}, &portRow{}, &interfaceRow{}, &qosRow{}, &queueRow{}
	if _, err := cl.Monitor(ctx, cl.NewMonitor(
		client.WithTable(r, &r.Bridges, &r.Version),
		client.WithTable(b, &b.Name, &b.Datapath, &b.FailMode, &b.Ports, &b.ExternalIDs),
		client.WithTable(p, &p.Name, &p.Interfaces, &p.Tag, &p.Trunks, &p.VLANMode, &p.QoS, &p.ExternalIDs),
		client.WithTable(q, &q.Type, &q.Queues, &q.OtherConfig, &q.ExternalIDs),
		client.WithTable(u, &u.OtherConfig, &u.ExternalIDs),
		client.WithTable(i, &i.Name, &i.Type, &i.OFPort, &i.Error, &i.ExternalIDs),
	)); err != nil {
		conn.Close()
		return nil, fmt.Errorf("follow the switch's database: %w", err)
	}
	return conn, nil
}

func newConn(cl client.Client) *Conn {
	ctx, stop := context.WithCancel(context.Background())
	c := &Conn{c: cl, changed: make(chan struct{}), done: make(chan struct{}), stop: stop}
	go func() {
		defer close(c.done)
		select {
		case <-cl.DisconnectNotify(): // one word to one listener
		case <-ctx.Done():
		}
	}()
	return c
}

func (c *Conn) notify() {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.changed)
	c.changed = make(chan struct{})
}

// Changed returns a channel that is closed at the next change of the database.
// Ask for it before State, so that nothing is missed.
func (c *Conn) Changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

// Done is closed when the connection has ended.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Alive asks the database for an answer.
func (c *Conn) Alive(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, CallDeadline)
	defer cancel()
	return c.c.Echo(ctx) == nil
}

// Close ends the connection.
func (c *Conn) Close() {
	c.stop()
	c.c.Close()
}

// Bridge is a bridge as the database has it.
type Bridge struct {
	Name     string
	Datapath string
	// Owner is external_ids:muster, empty for what is not ours.
	Owner       string
	ExternalIDs map[string]string
	uuid        string
}

// Port is a port as the database has it.
type Port struct {
	Name   string
	Bridge string
	// Tag is the VLAN of an access port, 0 for none; Trunks those of a trunk.
	Tag    int
	Trunks []int
	Owner  string
	// ExternalIDs of the port.
	ExternalIDs map[string]string
	// OFPort is the number in the running switch, 0 while it has none.
	OFPort int
	// Error is what ovs-vswitchd said when it could not make the port.
	Error string
	// Shape is what limits the port, as far as it is its owner's.
	Shape Shape
	uuid  string
}

// State is the database at one moment.
type State struct {
	// Version of Open vSwitch, empty when its start script did not note it.
	Version string
	Bridges map[string]Bridge
	Ports   map[string]Port
	root    string
	shaping shaping
	shaped  map[string]bool // rows of QoS that a port has
}

// State returns the last known content of the database.
func (c *Conn) State(ctx context.Context) (*State, error) {
	var roots []rootRow
	var bridges []bridgeRow
	var ports []portRow
	var ifaces []interfaceRow
	var qos []qosRow
	var queues []queueRow
	for _, rows := range []any{&roots, &bridges, &ports, &ifaces, &qos, &queues} {
		if err := c.c.List(ctx, rows); err != nil {
			return nil, fmt.Errorf("read the switch's database: %w", err)
		}
	}
	if len(roots) != 1 {
		return nil, fmt.Errorf("the switch's database has %d Open_vSwitch rows; initialise it: ovs-vsctl --no-wait init", len(roots))
	}
	s := &State{root: roots[0].UUID, Bridges: map[string]Bridge{}, Ports: map[string]Port{}, shaped: map[string]bool{}}
	s.shaping = shaping{qos: map[string]qosRow{}, queues: map[string]queueRow{}}
	for _, q := range qos {
		s.shaping.qos[q.UUID] = q
	}
	for _, q := range queues {
		s.shaping.queues[q.UUID] = q
	}
	if roots[0].Version != nil {
		s.Version = *roots[0].Version
	}
	byPort := map[string]string{}
	for _, b := range bridges {
		s.Bridges[b.Name] = Bridge{Name: b.Name, Datapath: b.Datapath, Owner: b.ExternalIDs[OwnerKey], ExternalIDs: b.ExternalIDs, uuid: b.UUID}
		for _, p := range b.Ports {
			byPort[p] = b.Name
		}
	}
	byIface := map[string]interfaceRow{}
	for _, i := range ifaces {
		byIface[i.UUID] = i
	}
	for _, p := range ports {
		out := Port{Name: p.Name, Bridge: byPort[p.UUID], Trunks: p.Trunks, Owner: p.ExternalIDs[OwnerKey], ExternalIDs: p.ExternalIDs, uuid: p.UUID}
		if p.Tag != nil {
			out.Tag = *p.Tag
		}
		if p.QoS != nil {
			s.shaped[*p.QoS] = true
		}
		out.Shape = s.shaping.of(p.QoS, out.Owner)
		for _, id := range p.Interfaces {
			if i := byIface[id]; i.OFPort != nil && *i.OFPort > 0 {
				out.OFPort = *i.OFPort
			}
			if i := byIface[id]; i.Error != nil {
				out.Error = *i.Error
			}
		}
		s.Ports[p.Name] = out
	}
	return s, nil
}

func (c *Conn) transact(ctx context.Context, what string, ops []ovsdb.Operation) error {
	ctx, cancel := context.WithTimeout(ctx, CallDeadline)
	defer cancel()
	res, err := c.c.Transact(ctx, ops...)
	if err == nil {
		var errs []ovsdb.OperationError
		if errs, err = ovsdb.CheckOperationResults(res, ops); err != nil && len(errs) > 0 {
			err = fmt.Errorf("%w: %w", err, errs[0])
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}
