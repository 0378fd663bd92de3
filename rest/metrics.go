// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// metrics counts requests by route, method and status. The routes are a fixed
// set, so the memory is too.
type metrics struct {
	mu       sync.Mutex
	requests map[requestKey]*requestCount
}

type requestKey struct {
	route, method string
	status        int
}

type requestCount struct {
	count   uint64
	seconds float64
}

func newMetrics() *metrics { return &metrics{requests: map[requestKey]*requestCount{}} }

func (m *metrics) observe(method, route string, status int, took time.Duration) {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete:
	default:
		method = "other"
	}
	k := requestKey{route, method, status}
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.requests[k]
	if c == nil {
		c = &requestCount{}
		m.requests[k] = c
	}
	c.count++
	c.seconds += took.Seconds()
}

// write renders the counters in the Prometheus text format 0.0.4.
func (m *metrics) write(b *strings.Builder) {
	m.mu.Lock()
	defer m.mu.Unlock()
	keys := slices.SortedFunc(maps.Keys(m.requests), func(a, b requestKey) int {
		return strings.Compare(fmt.Sprint(a.route, a.method, a.status), fmt.Sprint(b.route, b.method, b.status))
	})
	header(b, "muster_http_requests_total", "counter", "Requests answered.")
	for _, k := range keys {
		fmt.Fprintf(b, "muster_http_requests_total{route=%q,method=%q,code=\"%d\"} %d\n", k.route, k.method, k.status, m.requests[k].count)
	}
	header(b, "muster_http_request_duration_seconds", "summary", "Time from the request to the end of the answer.")
	for _, k := range keys {
		c := m.requests[k]
		labels := fmt.Sprintf("{route=%q,method=%q,code=\"%d\"}", k.route, k.method, k.status)
		fmt.Fprintf(b, "muster_http_request_duration_seconds_sum%s %g\n", labels, c.seconds)
		fmt.Fprintf(b, "muster_http_request_duration_seconds_count%s %d\n", labels, c.count)
	}
}

func header(b *strings.Builder, name, typ, help string) {
	fmt.Fprintf(b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, typ)
}

func gauge(b *strings.Builder, name, help string, value float64) {
	header(b, name, "gauge", help)
	fmt.Fprintf(b, "%s %g\n", name, value)
}

func truth(v bool) float64 {
	if v {
		return 1
	}
	return 0
}

// serveMetrics answers GET /metrics. It asks nothing of other nodes, so that
// it works when they do not.
func (s *Server) serveMetrics(q *request) error {
	var b strings.Builder
	header(&b, "muster_build_info", "gauge", "The version of the daemon.")
	fmt.Fprintf(&b, "muster_build_info{version=%q,node=%q} 1\n", s.cfg.Version, s.cfg.Node())
	v := q.db.Local()
	gauge(&b, "muster_store_revision", "Revision that this node has applied.", float64(v.Revision()))
	gauge(&b, "muster_store_keys", "Keys in the configuration database.", float64(v.Len()))
	gauge(&b, "muster_store_bytes", "Bytes of keys and values.", float64(v.Bytes()))
	if age, known := q.db.Staleness(); known {
		gauge(&b, "muster_store_staleness_seconds", "How old this replica may be.", age.Seconds())
	}
	if st, err := s.cfg.Cluster.Status(q.ctx()); err == nil {
		gauge(&b, "muster_cluster_data_age_seconds", "How old what this node shows may be; from the daemon's start while it heard no leader.", st.StaleSeconds)
		gauge(&b, "muster_raft_term", "Current Raft term.", float64(st.Term))
		gauge(&b, "muster_raft_is_leader", "1 on the leader.", truth(st.Leader != "" && st.Leader == s.cfg.Node()))
		gauge(&b, "muster_raft_has_leader", "1 if a leader is known.", truth(st.Leader != ""))
		gauge(&b, "muster_cluster_quorum", "1 if a majority answers.", truth(st.Quorum))
		gauge(&b, "muster_cluster_members", "Members of the configuration database.", float64(len(st.Members)))
	}
	gauge(&b, "muster_watches", "Open watches.", float64(len(s.watches)))
	gauge(&b, "muster_consoles", "Open consoles.", float64(len(s.consoles)))
	gauge(&b, "muster_uploads", "Running uploads.", float64(len(s.uploads)))
	s.haMetrics(&b)
	drillMetrics(v, &b)
	s.metrics.write(&b)
	if s.cfg.Monitor != nil {
		s.cfg.Monitor.WriteMetrics(&b)
	}
	q.w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	q.w.WriteHeader(http.StatusOK)
	_, _ = q.w.Write([]byte(b.String())) // a failure means that the client is gone
	return nil
}

// healthz says that the daemon answers.
func healthz(q *request) error {
	q.w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	q.w.WriteHeader(http.StatusOK)
	_, _ = q.w.Write([]byte("ok\n"))
	return nil
}

// readyz says that this node can take any call: it reaches a majority.
func readyz(q *request) error {
	if _, err := q.freshView(readyTimeout); err != nil {
		return err
	}
	return healthz(q)
}
