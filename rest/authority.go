// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"fmt"
	"net/http"

	"github.com/muster-vm/muster/api"
)

// Authority is the certificate authority of the cluster that this host belongs
// to, and the certificates of its nodes.
type Authority interface {
	// Authority returns the state as this node knows it, and its revision.
	Authority(ctx context.Context) (api.AuthorityStatus, uint64, error)
	// RotateAuthority takes a step of replacing it.
	RotateAuthority(ctx context.Context, actor string, r api.RotateRequest) error
	SetAuthority(ctx context.Context, actor string, s api.AuthoritySettings) error
	// RenewCertificate makes a node, by name or ID, renew its certificate now.
	RenewCertificate(ctx context.Context, actor, node string) (api.Node, error)
}

func (s *Server) authorityRoutes() []route {
	path := base + "cluster/ca"
	status := typeOf[api.AuthorityStatus]()
	return []route{
		{method: http.MethodGet, path: path, need: needViewer, handle: s.authority, summary: "The cluster's certificate authority and the nodes' certificates",
			params: readParams[1:], out: status, status: http.StatusOK},
		{method: http.MethodPatch, path: path, need: needAdministrator, handle: s.setAuthority, summary: "Choose how long node certificates last",
			in: typeOf[api.AuthoritySettings](), out: status, status: http.StatusOK},
		{method: http.MethodPost, path: path + "/rotate", need: needAdministrator, handle: s.rotateAuthority, summary: "Replace the authority: start, finish or abort",
			in: typeOf[api.RotateRequest](), out: status, status: http.StatusOK},
		{method: http.MethodPost, path: base + "nodes/{name}/renew-certificate", need: needAdministrator, handle: s.renewCertificate,
			summary: "Make a node renew its certificate now", out: typeOf[api.Node](), status: http.StatusAccepted},
	}
}

func (s *Server) authority(q *request) error {
	st, rev, err := s.cfg.Authority.Authority(q.ctx())
	if err != nil {
		return err
	}
	q.reply(q.route.status, rev, st)
	return nil
}

// authorityChange decodes a body, carries out a change, which says what it was,
// and answers the state.
func (s *Server) authorityChange(q *request, in any, change func(context.Context) (string, error)) error {
	body, err := q.body()
	if err != nil {
		return err
	}
	if err := decode(body, in); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(q.ctx(), writeTimeout)
	defer cancel()
	what, err := change(ctx)
	if err != nil {
		return err
	}
	q.auditAlone(api.KindCluster, api.Meta{Name: "authority, " + what})
	return s.authority(q)
}

func (s *Server) setAuthority(q *request) error {
	var in api.AuthoritySettings
	return s.authorityChange(q, &in, func(ctx context.Context) (string, error) {
		if err := in.Validate(); err != nil {
			return "", err
		}
		return fmt.Sprintf("certificates last %d s", in.CertificateSeconds), s.cfg.Authority.SetAuthority(ctx, q.who.actor, in)
	})
}

func (s *Server) rotateAuthority(q *request) error {
	var in api.RotateRequest
	return s.authorityChange(q, &in, func(ctx context.Context) (string, error) {
		what := string(in.Action)
		switch in.Action {
		case api.RotateStart, api.RotateFinish, api.RotateAbort:
		default:
			return "", api.Invalid("action", "is %q; give start, finish or abort", clip(what))
		}
		if in.Force {
			what += " by force"
		}
		return what, s.cfg.Authority.RotateAuthority(ctx, q.who.actor, in)
	})
}

func (s *Server) renewCertificate(q *request) error {
	ctx, cancel := context.WithTimeout(q.ctx(), writeTimeout)
	defer cancel()
	n, err := s.cfg.Authority.RenewCertificate(ctx, q.who.actor, q.name())
	if err != nil {
		return err
	}
	q.auditAlone(api.KindNode, n.Meta)
	q.reply(q.route.status, q.db.Local().Revision(), n)
	return nil
}
