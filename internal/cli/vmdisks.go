// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"encoding/json"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// withDisks returns a VM for people to read, its disks completed from their
// volumes: the VM itself keeps only their names. What cannot be read stays as
// the VM says it.
func withDisks(ctx context.Context, c *client.Client, raw json.RawMessage) json.RawMessage {
	vm, err := client.As[api.VMSpec, api.VMStatus](raw)
	if err != nil {
		return raw // the view reports it
	}
	for i := range vm.Spec.Disks {
		d := &vm.Spec.Disks[i]
		if d.Volume == "" {
			continue
		}
		doc, _, err := c.Get(ctx, api.KindVolume, vm.Meta.Project, d.Volume)
		if err != nil && exitCode(err) == ExitUnavailable || ctx.Err() != nil {
			break // the others would end the same way
		}
		if err != nil {
			continue
		}
		if v, err := client.As[api.VolumeSpec, api.VolumeStatus](doc); err == nil {
			d.Pool, d.Image, d.Size = v.Spec.Pool, v.Spec.Image, max(v.Status.Size, v.Spec.Size)
		}
	}
	full, err := json.Marshal(vm)
	if err != nil {
		return raw
	}
	return full
}

// warnHA warns of a VM that could not be restarted elsewhere because a new
// disk of it lies on one node only. It is advice: what cannot be looked up is
// left to the creation to report.
func (a *app) warnHA(ctx context.Context, f *vmCreateFlags) {
	if f.ha != string(api.HARestart) || f.image == "" && len(f.disks) == 0 {
		return
	}
	c, err := a.connect()
	if err != nil {
		return
	}
	pools := map[string]bool{}
	switch {
	case f.pool != "":
		pools[f.pool] = true
	default:
		if len(f.disks) > 0 {
			pools[api.LocalPool] = true
		}
		if f.image != "" {
			// A clone lies where its image does.
			raw, _, err := c.Get(ctx, api.KindImage, a.project, f.image)
			if image, asErr := client.As[api.ImageSpec, api.ImageStatus](raw); err == nil && asErr == nil {
				pools[first(image.Spec.Pool, api.LocalPool)] = true
			}
		}
	}
	for name := range pools {
		raw, _, err := c.Get(ctx, api.KindPool, "", name)
		if err != nil {
			continue
		}
		if pool, err := client.As[api.PoolSpec, api.PoolStatus](raw); err == nil && pool.Spec.Type == api.PoolDir {
			a.notice("warning: the disk lies on one node only: ha cannot restart it elsewhere; use a shared pool")
			return
		}
	}
}
