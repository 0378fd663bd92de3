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
	answers, unreachable, err := gather(q, q.servicesOf)
	if err != nil {
		return err
	}
	list := ServiceList{Kind: "serviceList", Items: slices.Concat(answers...), Unreachable: unreachable}
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
	var list ServiceList
	err := q.askPeer(ctx, node, "services", &list)
	return list.Items, err
}

// askPeer puts this request's question to another node and reads its answer.
func (q *request) askPeer(ctx context.Context, node, path string, into any) error {
	transport, target, err := q.s.cfg.Peers.Proxy(node)
	if err != nil {
		return err
	}
	target = target.JoinPath(base + path)
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return err
	}
	r.Header.Set(headerBy, q.s.cfg.Node())
	r.Header.Set(headerActor, q.who.actor)
	r.Header.Set(headerRole, string(q.who.role))
	resp, err := transport.RoundTrip(r)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxPeerAnswer)).Decode(into); err != nil || resp.StatusCode != http.StatusOK {
		return fmt.Errorf("node %s answered %s", node, resp.Status)
	}
	return nil
}

// gather asks every node, or the one that ?node= names. It returns the answers
// and, by name, why others gave none.
func gather[T any](q *request, ask func(ctx context.Context, node string) (T, error)) (answers []T, unreachable map[string]string, err error) {
	only := q.param("node")
	if only == q.s.cfg.Node() || q.who.forwarded {
		one, err := ask(q.ctx(), q.s.cfg.Node())
		return []T{one}, nil, err
	}
	nodes, err := configdb.Nodes.List(q.db.Local())
	if err != nil {
		return nil, nil, err
	}
	asked := slices.DeleteFunc(nodes, func(n api.Node) bool { return only != "" && n.Meta.Name != only })
	if len(asked) == 0 {
		return nil, nil, api.Errorf(api.CodeNotFound, "node %q does not exist", only)
	}
	ctx, cancel := context.WithTimeout(q.ctx(), readTimeout)
	defer cancel()
	unreachable = map[string]string{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range asked {
		name := asked[i].Meta.Name
		wg.Go(func() {
			var one T
			err := contain.Call(func() (err error) {
				one, err = ask(ctx, name)
				return err
			})
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				unreachable[name] = err.Error()
				return
			}
			answers = append(answers, one)
		})
	}
	wg.Wait()
	return answers, unreachable, nil
}
