// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

func (a *app) serviceCmd() *cobra.Command {
	var node string
	ls := &cobra.Command{
		Use: "ls", Short: "List the supervised parts of the daemons", Args: args(),
		Long: `Lists the supervised parts of every node's daemon: state, restarts after an
error, how long the last run took, and its error. Services of the leader are
listed for the node that leads or has led.`,
		Example: "  muster service ls\n  muster service ls --node m2 -o json",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.listServices(cmd.Context(), node) },
	}
	ls.Flags().StringVar(&node, "node", "", "only this node")
	return group("service", "The supervised parts of the daemons", ls)
}

// askNodes asks for what every node has, or one if it is named. It is done when
// the answer was printed as it came; else it is in list.
func (a *app) askNodes(ctx context.Context, path, node string, list any) (done bool, err error) {
	c, err := a.connect()
	if err != nil {
		return false, err
	}
	query := url.Values{}
	if node != "" {
		query.Set("node", node)
	}
	r, err := c.Do(ctx, client.Request{Method: http.MethodGet, Path: path, Query: query})
	if err != nil {
		return false, err
	}
	if a.structured() {
		return true, a.printJSON(r.Body)
	}
	if err := json.Unmarshal(r.Body, list); err != nil {
		return false, fmt.Errorf("read the answer: %w", err)
	}
	return false, nil
}

func (a *app) listServices(ctx context.Context, node string) error {
	var list struct {
		Items       []api.ServiceStatus `json:"items"`
		Unreachable map[string]string   `json:"unreachable"`
	}
	if done, err := a.askNodes(ctx, "/services", node, &list); done || err != nil {
		return err
	}
	t := &table{head: []string{"NODE", "SERVICE", "STATE", "RESTARTS", "SINCE", "LAST RUN", "LAST ERROR"}}
	for _, s := range list.Items {
		since, last := s.StartedAt, "-"
		if s.EndedAt != nil {
			last = time.Duration(s.LastSeconds * float64(time.Second)).Round(time.Millisecond).String()
			if s.State != api.ServiceRunning {
				since = *s.EndedAt
			}
		}
		t.add(s.Node, s.Name, string(s.State), strconv.Itoa(s.Restarts), age(since, a.Now()), last, first(s.LastError, "-"))
	}
	for _, name := range slices.Sorted(maps.Keys(list.Unreachable)) {
		t.add(name, "-", "unreachable", "-", "-", "-", list.Unreachable[name])
	}
	return a.printTable(t, "no services")
}
