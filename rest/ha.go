// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// HA says what would happen if nodes died.
type HA interface {
	// Status is what would happen now if each node died.
	Status(ctx context.Context) (*api.HAStatus, error)
	// Simulate is what would happen if these nodes, by name or ID, died together.
	Simulate(ctx context.Context, kill []string) (*api.HALoss, error)
	// Promise is whether the promise to survive failures can be kept, as it was
	// found last and after how long; false before it was looked at.
	Promise() (a api.HAAdmission, took time.Duration, ok bool)
	// Admit judges a change that makes a VM run: it returns a warning if the change
	// breaks the promise, or fails with api.CodeRefused if that is wished.
	Admit(before, after *configdb.View) (warning string, err error)
}

// admit asks whether the change so far keeps the promise to survive failures. It
// comes last, when all that the change does is in its transaction.
func (c *change) admit(e *effect) error {
	warning, err := c.q.s.cfg.HA.Admit(c.v, c.tx.Seen(c.v))
	e.warning = warning
	return err
}

// headerWarning carries what the caller should know of a change that was made
// all the same (RFC 7234, section 5.5, with the code for "other").
const headerWarning = "Warning"

// warn puts the warning of a change into the answer.
func (q *request) warn(out outcome) {
	if out.warning != "" {
		q.setWarning(out.warning)
	}
}

// setWarning puts a text into headerWarning.
func (q *request) setWarning(text string) {
	q.w.Header().Set(headerWarning, "299 muster "+strconv.QuoteToASCII(text))
}

// haTimeout bounds the wait for the newest state.
const haTimeout = 10 * time.Second

func (s *Server) haRoutes() []route {
	return []route{
		{method: http.MethodGet, path: base + "ha/status", need: needViewer, handle: s.haStatus,
			summary: "What would happen now if each node died, and whether failures are survived", out: typeOf[api.HAStatus](), status: http.StatusOK},
		{method: http.MethodPost, path: base + "ha/simulate", need: needViewer, handle: s.haSimulate, verb: "simulate",
			summary: "What would happen now if some nodes died together", in: typeOf[api.HASimulateRequest](), out: typeOf[api.HALoss](), status: http.StatusOK},
	}
}

// failoverRoutes are about the evidence of losses.
func (s *Server) failoverRoutes() []route {
	failovers := &resource[api.FailoverSpec, api.FailoverStatus]{table: configdb.Failovers, need: needViewer, global: true}
	s.kinds[api.KindFailover] = failovers
	proof := func(q *request) error {
		v, err := q.view(fresh)
		if err != nil {
			return err
		}
		f, err := failovers.find(q, v)
		if err != nil {
			return err
		}
		p, err := configdb.ProofOf(v, f)
		if err != nil {
			return err
		}
		q.reply(http.StatusOK, p.Revision, p)
		return nil
	}
	return append(reads(failovers), route{method: http.MethodGet, path: base + "failovers/{name}/proof", need: needViewer, handle: proof,
		summary: "Everything that is kept of a failover, to be checked", params: oneParams, out: typeOf[api.FailoverProof](), status: http.StatusOK})
}

func (s *Server) haStatus(q *request) error {
	ctx, cancel := context.WithTimeout(q.ctx(), haTimeout)
	defer cancel()
	st, err := s.cfg.HA.Status(ctx)
	if err != nil {
		return err
	}
	q.reply(http.StatusOK, st.Revision, st)
	return nil
}

func (s *Server) haSimulate(q *request) error {
	body, err := q.body()
	if err != nil {
		return err
	}
	var in api.HASimulateRequest
	if err := decode(body, &in); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(q.ctx(), haTimeout)
	defer cancel()
	out, err := s.cfg.HA.Simulate(ctx, in.Kill)
	if err != nil {
		return err
	}
	q.reply(http.StatusOK, out.Revision, out)
	return nil
}

// haMetrics renders what the promise is.
func (s *Server) haMetrics(b *strings.Builder) {
	a, took, ok := s.cfg.HA.Promise()
	if !ok {
		return
	}
	gauge(b, "muster_ha_promise_kept", "1 if every protected VM restarts when as many nodes as promised die together.", truth(a.Kept))
	gauge(b, "muster_ha_promise_failures", "Nodes that are promised to be survived.", float64(a.Failures))
	gauge(b, "muster_ha_promise_refused_vms", "Protected VMs that would not restart in the worst case.", float64(a.RefusedVMs))
	gauge(b, "muster_ha_outlook_seconds", "How long the last look took.", took.Seconds())
	header(b, "muster_ha_admission", "gauge", "What becomes of a start that would break the promise.")
	fmt.Fprintf(b, "muster_ha_admission{mode=%q} 1\n", a.Admission)
}
