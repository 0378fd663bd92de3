// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/contain"
)

// ServiceList is the answer of GET /services.
type ServiceList struct {
	Kind  string              `json:"kind"`
	Items []api.ServiceStatus `json:"items"`
	// Unreachable nodes, with the reason.
	Unreachable map[string]string `json:"unreachable,omitempty"`
}

// maxPeerAnswer bounds what another node may answer to a gathered question.
const maxPeerAnswer = 4 << 20

// serveServices answers for every node, or for the one that ?node= names.
func serveServices(q *request) error {
	own := q.s.cfg.Node()
	only := q.r.URL.Query().Get("node")
	list := ServiceList{Kind: "serviceList"}
	if only == own || q.who.forwarded {
		list.Items = q.s.cfg.Services()
		q.reply(http.StatusOK, q.db.Local().Revision(), list)
		return nil
	}
	nodes, err := configdb.Nodes.List(q.db.Local())
	if err != nil {
		return err
	}
	asked := slices.DeleteFunc(nodes, func(n api.Node) bool { return only != "" && n.Meta.Name != only })
	if len(asked) == 0 {
		return api.Errorf(api.CodeNotFound, "node %q does not exist", only)
	}
	ctx, cancel := context.WithTimeout(q.ctx(), readTimeout)
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range asked {
		name := asked[i].Meta.Name
		wg.Go(func() {
			var items []api.ServiceStatus
			err := contain.Call(func() (err error) {
				items, err = q.servicesOf(ctx, name)
				return err
			})
			mu.Lock()
			defer mu.Unlock()
			list.Items = append(list.Items, items...)
			if err != nil {
				if list.Unreachable == nil {
					list.Unreachable = map[string]string{}
				}
				list.Unreachable[name] = err.Error()
			}
		})
	}
	wg.Wait()
	slices.SortFunc(list.Items, func(a, b api.ServiceStatus) int {
		return strings.Compare(a.Node+"/"+a.Name, b.Node+"/"+b.Name)
	})
	q.reply(http.StatusOK, q.db.Local().Revision(), list)
	return nil
}

// servicesOf asks one node.
func (q *request) servicesOf(ctx context.Context, node string) ([]api.ServiceStatus, error) {
	if node == q.s.cfg.Node() {
		return q.s.cfg.Services(), nil
	}
	transport, target, err := q.s.cfg.Peers.Proxy(node)
	if err != nil {
		return nil, err
	}
	target = target.JoinPath(base + "services")
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return nil, err
	}
	r.Header.Set(headerBy, q.s.cfg.Node())
	r.Header.Set(headerActor, q.who.actor)
	r.Header.Set(headerRole, string(q.who.role))
	resp, err := transport.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	var list ServiceList
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxPeerAnswer)).Decode(&list); err != nil || resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("node %s answered %s", node, resp.Status)
	}
	return list.Items, nil
}
