// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package notify

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/gosnmp/gosnmp"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/monitor/snmp"
)

const trapTimeout = 5 * time.Second

// TrapEngineID is the engine ID of notifications: one for the whole cluster,
// so that a manager's user goes on to work when another node leads.
func TrapEngineID(clusterID string) string { return snmp.EngineID("cluster/" + clusterID) }

// traps sends one notification per alert. The leader is the authoritative
// engine: its boots are the Raft term, which rises with every leader, and its
// time the seconds since it leads.
func (s *Sender) traps(ctx context.Context, r Receiver, m Message) error {
	host, portText, err := net.SplitHostPort(r.Spec.Address)
	if err != nil {
		return err
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return fmt.Errorf("port %q is not a number", portText)
	}
	up := max(0, time.Since(time.Unix(0, s.began.Load())))
	g := &gosnmp.GoSNMP{
		Target: host, Port: uint16(port), Transport: "udp", Context: ctx, Timeout: trapTimeout, Retries: 0,
		MaxOids: gosnmp.MaxOids, Version: gosnmp.Version2c, Community: r.Secret,
	}
	if r.Spec.Version == "3" {
		g.Version, g.Community = gosnmp.Version3, ""
		g.SecurityModel, g.MsgFlags = gosnmp.UserSecurityModel, gosnmp.AuthPriv
		engine := TrapEngineID(s.clusterID)
		g.ContextEngineID = engine
		g.SecurityParameters = &gosnmp.UsmSecurityParameters{
			UserName: r.Spec.User, AuthoritativeEngineID: engine,
			AuthoritativeEngineBoots: uint32(max(1, s.term.Load()&0x7fffffff)), //nolint:gosec // 31 bits
			AuthoritativeEngineTime:  uint32(up / time.Second),                 //nolint:gosec // 68 years
			AuthenticationProtocol:   gosnmp.SHA, AuthenticationPassphrase: r.Secret,
			PrivacyProtocol: gosnmp.AES, PrivacyPassphrase: r.Secret,
		}
	}
	if err := g.Connect(); err != nil {
		return err
	}
	defer func() { _ = g.Conn.Close() }()
	ticks := uint32(up / (10 * time.Millisecond)) //nolint:gosec // it wraps, as TimeTicks do
	for i := range m.Items {
		if err := s.trap(g, &m.Items[i], ticks); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

func (s *Sender) trap(g *gosnmp.GoSNMP, it *Item, ticks uint32) error {
	a := api.Alert{Meta: api.Meta{ID: it.ID}}
	a.Spec = api.AlertSpec{Rule: it.Rule, Severity: it.Severity, TargetKind: it.TargetKind, TargetID: it.TargetID, Target: it.Target}
	a.Status = api.AlertStatus{Phase: it.Phase, Message: it.Message, FiringAt: &it.FiringAt, ResolvedAt: &it.ResolvedAt}
	vars, ok := snmp.NotificationBindings(&a, s.cluster, ticks)
	if !ok {
		return errors.New("the alert has no ID that a notification can carry")
	}
	_, err := g.SendTrap(gosnmp.SnmpTrap{Variables: vars})
	return err
}
