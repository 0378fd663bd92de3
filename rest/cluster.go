// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"net/http"
	"time"

	"github.com/muster-vm/muster/api"
)

// membershipTimeout bounds init, join and admit, which exchange certificates
// and wait for the new member to be up to date.
const membershipTimeout = 2 * time.Minute

// Bounds of a join token's life in seconds.
const (
	minTTL, defaultTTL, maxTTL = 60, 3600, 604800
)

func (s *Server) clusterStatus(q *request) error {
	st, err := s.cfg.Cluster.Status(q.ctx())
	if err != nil {
		return err
	}
	q.reply(http.StatusOK, st.Revision, st)
	return nil
}

// membership gives a call that changes the membership the time it needs.
func (q *request) membership(in any, call func(context.Context) (any, error)) error {
	return q.membershipFor(membershipTimeout, in, call)
}

func (q *request) membershipFor(within time.Duration, in any, call func(context.Context) (any, error)) error {
	if _, err := q.optional(in); err != nil {
		return err
	}
	_ = q.ctl.SetWriteDeadline(time.Now().Add(within + replyTimeout))
	ctx, cancel := context.WithTimeout(q.ctx(), within)
	defer cancel()
	out, err := call(ctx)
	if err != nil {
		return err
	}
	q.reply(q.route.status, 0, out)
	return nil
}

func (s *Server) clusterInit(q *request) error {
	var in api.InitRequest
	return q.membership(&in, func(ctx context.Context) (any, error) {
		if in.Name != "" {
			if err := api.ValidName("name", in.Name); err != nil {
				return nil, err
			}
		}
		out, err := s.cfg.Bootstrap.Init(ctx, in)
		if db, ok := s.cfg.DB(); ok && err == nil {
			q.db = db // there was none when the request came
			q.auditAlone(api.KindCluster, api.Meta{Name: out.Cluster})
		}
		return out, err
	})
}

func (s *Server) clusterTransfer(q *request) error {
	var in api.TransferRequest
	return q.membership(&in, func(ctx context.Context) (any, error) {
		r, err := s.cfg.Cluster.Transfer(ctx, in.Node)
		if err == nil {
			q.auditAlone("cluster", api.Meta{Name: "leader " + r.Leader})
		}
		return r, err
	})
}

func (s *Server) clusterJoin(q *request) error {
	var in api.JoinRequest
	return q.membership(&in, func(ctx context.Context) (any, error) {
		if in.Token == "" {
			return nil, api.Invalid("token", "is missing; muster cluster token create on a member prints one")
		}
		return s.cfg.Bootstrap.Join(ctx, in)
	})
}

func (s *Server) clusterAdmit(q *request) error {
	var in api.AdmitRequest
	return q.membership(&in, func(ctx context.Context) (any, error) {
		for _, f := range []struct{ name, value string }{{"tokenID", in.TokenID}, {"secret", in.Secret}, {"csr", in.CSR}, {"address", in.Address}} {
			if f.value == "" {
				return nil, api.Invalid(f.name, "is missing")
			}
		}
		if err := api.ValidName("node", in.Node); err != nil {
			return nil, err
		}
		out, err := s.cfg.Cluster.Admit(ctx, in)
		if err == nil {
			q.who.actor = "token:" + in.TokenID // all that is known of who let it in
			q.auditAlone(api.KindNode, api.Meta{ID: out.NodeID, Name: in.Node})
		}
		return out, err
	})
}

func (s *Server) joinToken(q *request) error {
	var in api.JoinTokenRequest
	return q.membership(&in, func(ctx context.Context) (any, error) {
		role, err := api.ParseNodeRole("role", in.Role)
		if err != nil {
			return nil, err
		}
		in.Role = role
		if in.TTLSeconds == 0 {
			in.TTLSeconds = defaultTTL
		}
		if in.TTLSeconds < minTTL || in.TTLSeconds > maxTTL {
			return nil, api.Invalid("ttlSeconds", "is %d; give %d to %d", in.TTLSeconds, minTTL, maxTTL)
		}
		t, err := s.cfg.Cluster.CreateJoinToken(ctx, q.who.actor, in)
		if err == nil {
			q.auditAlone(api.KindToken, api.Meta{Name: "join-" + string(in.Role)})
		}
		return t, err
	})
}
