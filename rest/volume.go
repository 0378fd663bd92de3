// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

type volumeResource struct {
	resource[api.VolumeSpec, api.VolumeStatus]
}

func newVolumes() *volumeResource {
	r := &volumeResource{resource[api.VolumeSpec, api.VolumeStatus]{table: configdb.Volumes, need: needViewer}}
	r.update, r.past = r.change, r.reverts()
	return r
}

// create answers POST /volumes.
func (r *volumeResource) create(q *request) error {
	o, body, err := r.decodeNew(q)
	if err != nil {
		return err
	}
	if o.Spec.Content != "" {
		return api.Invalid("spec.content", "is for what is made with a VM only")
	}
	var in api.Volume // as sent, without defaults
	if err := decode(body, &in); err != nil {
		return err
	}
	if in.Spec.SourceVolume != "" || in.Spec.SourceSnapshot != "" {
		return api.Invalid("spec.sourceVolume", "is set when a VM is cloned only: POST %svms/{name}/clone", base)
	}
	if in.Spec.Image != "" && in.Spec.Pool == "" {
		o.Spec.Pool = "" // the default of a clone is its image's pool
	}
	out, err := q.change(body, func(c *change) (*effect, error) {
		n := newVolume{volume: o.Clone()}
		return r.make(c, &n)
	})
	if err != nil {
		return err
	}
	return q.answerTask(out)
}

func (r *volumeResource) make(c *change, n *newVolume) (*effect, error) {
	vol := &n.volume
	var err error
	if n.image, n.pool, err = c.source(vol, "spec"); err != nil {
		return nil, err
	}
	asked := vol.Spec.Node
	if n.image != nil && n.pool.Spec.Type == api.PoolDir {
		if asked != "" && asked != n.image.Spec.Node {
			return nil, api.Errorf(api.CodeRefused, "image %s is on node %s only; its clone cannot be on node %s", n.image.Meta.Name, n.image.Spec.Node, asked)
		}
		asked = n.image.Spec.Node
	}
	if vol.Spec.Node, err = c.storageNode(&n.pool, asked, false); err != nil {
		return nil, err
	}
	c.referSource(n)
	vol.Status.Phase = api.StoragePending
	if err := r.resource.create(c, vol); err != nil {
		return nil, err
	}
	task, err := c.newTask(vol.Meta.Project, api.TaskSpec{
		Action: api.ActionVolumeCreate, TargetKind: api.KindVolume, TargetID: vol.Meta.ID, Target: vol.Meta.Name, TargetGeneration: vol.Meta.Generation,
	}, storageDeadline)
	return &effect{status: http.StatusAccepted, kind: api.KindVolume, id: vol.Meta.ID, task: task, object: vol}, err
}
