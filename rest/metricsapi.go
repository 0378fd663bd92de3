// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"net/http"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
)

// Monitor is what this node measured, and the monitoring of the cluster as far
// as it needs more than the database.
type Monitor interface {
	// WriteMetrics appends this node's values in the Prometheus text format.
	WriteMetrics(b *strings.Builder)
	// Metrics returns series by name; one that ends in * stands for all that
	// begin so. since is how far back, 0 for the newest values only.
	Metrics(name string, since time.Duration) api.Metrics
	// SealSecret encrypts the secret of a receiver for the database.
	SealSecret(receiverID, secret string) ([]byte, error)
	// TestReceiver sends a test message; this node leads.
	TestReceiver(ctx context.Context, receiverID, actor string) error
}

// Limits of metrics.
const (
	maxMetricsSince = time.Hour
	maxMetricName   = 200
)

// monitor returns the monitor, which a node has once it is in a cluster.
func (s *Server) monitor() (Monitor, error) {
	if s.cfg.Monitor == nil {
		return nil, api.Errorf(api.CodeUnsupported, "node %s does not monitor", s.cfg.Node())
	}
	return s.cfg.Monitor, nil
}

func (s *Server) metricsRoute() route {
	return route{
		method: http.MethodGet, path: base + "metrics", need: needViewer, handle: s.queryMetrics,
		operation: "get-node-metrics", summary: "What a node measured: the newest values, or the last hour",
		params: []string{"node", "name", "since"}, out: typeOf[api.Metrics](), status: http.StatusOK,
	}
}

// queryMetrics answers GET /api/v1/metrics for this node or sends it on.
func (s *Server) queryMetrics(q *request) error {
	name := q.param("name")
	if len(name) > maxMetricName {
		return api.Invalid("name", "is longer than %d characters", maxMetricName)
	}
	var since time.Duration
	if text := q.param("since"); text != "" {
		d, err := time.ParseDuration(text)
		if err != nil || d < 0 || d > maxMetricsSince {
			return api.Invalid("since", "is %q; give a duration of at most %s, such as 10m", clip(text), maxMetricsSince)
		}
		since = d
	}
	if node := q.param("node"); node != "" && node != s.cfg.Node() {
		if err := api.ValidName("node", node); err != nil {
			return err
		}
		return q.proxy(node)
	}
	m, err := s.monitor()
	if err != nil {
		return err
	}
	q.reply(http.StatusOK, q.db.Local().Revision(), m.Metrics(name, since))
	return nil
}
