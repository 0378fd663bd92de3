// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
)

// serveMonitor answers what the monitoring has besides its objects.
func (f *fakeCluster) serveMonitor(w http.ResponseWriter, r *http.Request, path string) bool {
	parts := strings.Split(path, "/")
	switch {
	case path == "metrics":
		node := r.URL.Query().Get("node")
		if node == "m2" {
			f.fail(w, api.Errorf(api.CodeTimeout, "node m2 does not answer"))
			return true
		}
		series := func(name string, v float64, labels map[string]string) api.MetricSeries {
			return api.MetricSeries{Name: name, Labels: labels, Points: []api.MetricPoint{{Time: time.Unix(0, 0), Value: v}}}
		}
		web, db := map[string]string{"vm": "web1", "project": "default"}, map[string]string{"vm": "db1", "project": "default"}
		b, _ := json.Marshal(api.Metrics{Node: node, Series: []api.MetricSeries{
			series("muster_node_cpu_percent", 12.34, nil), series("muster_node_load1", 0.5, nil), series("muster_node_memory_bytes", 16<<30, nil),
			series("muster_vm_cpu_percent", 5, web), series("muster_vm_cpu_percent", 80, db), series("muster_vm_resident_bytes", 512<<20, db),
		}})
		f.send(w, http.StatusOK, b)
	case len(parts) == 3 && parts[0] == "receivers" && parts[2] == "test":
		if parts[1] == "dead" {
			f.fail(w, api.Errorf(api.CodeRefused, "send to receiver dead: connection refused"))
			return true
		}
		w.WriteHeader(http.StatusNoContent)
	case len(parts) == 3 && parts[0] == "alerts" && parts[2] == "acknowledge":
		f.mu.Lock()
		defer f.mu.Unlock()
		o := f.find(api.KindAlert, parts[1])
		if o == nil {
			f.fail(w, api.Errorf(api.CodeNotFound, "alert does not exist"))
			return true
		}
		f.send(w, http.StatusOK, o.raw)
	default:
		return false
	}
	return true
}
