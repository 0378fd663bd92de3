// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package client

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"

	"github.com/muster-vm/muster/api"
)

// snapshotPath is the path of a VM's snapshots, or of one if name is given.
func snapshotPath(vm, name string) (string, error) {
	path, err := objectPath(api.KindVM, vm)
	if err != nil || name == "" {
		return path + "/snapshots", err
	}
	if err := api.ValidName("snapshot", name); err != nil {
		return "", err
	}
	return path + "/snapshots/" + url.PathEscape(name), nil
}

// Snapshots returns the snapshots of a VM in order of their names.
func (c *Client) Snapshots(ctx context.Context, project, vm string) (*List, error) {
	path, err := snapshotPath(vm, "")
	if err != nil {
		return nil, err
	}
	reply, err := c.Do(ctx, Request{Method: http.MethodGet, Path: path, Query: projectQuery(api.KindVM, project)})
	if err != nil {
		return nil, err
	}
	l := &List{Reply: reply}
	if err := json.Unmarshal(reply.Body, l); err != nil {
		return nil, api.Errorf(api.CodeInternal, "decode the snapshots of vm %s: %w", vm, err)
	}
	return l, nil
}

// Snapshot returns one snapshot of a VM.
func (c *Client) Snapshot(ctx context.Context, project, vm, name string) (json.RawMessage, error) {
	path, err := snapshotPath(vm, name)
	if err != nil {
		return nil, err
	}
	reply, err := c.Do(ctx, Request{Method: http.MethodGet, Path: path, Query: projectQuery(api.KindVM, project)})
	if err != nil {
		return nil, err
	}
	return reply.Body, nil
}

// TakeSnapshot asks for a snapshot of a VM.
func (c *Client) TakeSnapshot(ctx context.Context, project, vm string, body any) (*Result, error) {
	path, err := snapshotPath(vm, "")
	if err != nil {
		return nil, err
	}
	return c.post(ctx, path, projectQuery(api.KindVM, project), body)
}

// Revert asks to take a VM back to a snapshot.
func (c *Client) Revert(ctx context.Context, project, vm, name string, body any) (*Result, error) {
	path, err := snapshotPath(vm, name)
	if err != nil {
		return nil, err
	}
	return c.post(ctx, path+"/revert", projectQuery(api.KindVM, project), body)
}

// DeleteSnapshot asks for the end of a snapshot.
func (c *Client) DeleteSnapshot(ctx context.Context, project, vm, name string) (*Result, error) {
	path, err := snapshotPath(vm, name)
	if err != nil {
		return nil, err
	}
	reply, err := c.Do(ctx, Request{Method: http.MethodDelete, Path: path, Query: projectQuery(api.KindVM, project)})
	if err != nil {
		return nil, err
	}
	return resultOf(reply), nil
}
