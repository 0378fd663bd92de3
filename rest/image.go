// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

type imageResource struct {
	resource[api.ImageSpec, api.ImageStatus]
}

func newImages() *imageResource {
	r := &imageResource{resource[api.ImageSpec, api.ImageStatus]{table: configdb.Images, need: needViewer}}
	r.update, r.past = r.updateLabels, r.reverts()
	return r
}

// create answers POST /images.
func (r *imageResource) create(q *request) error {
	o, body, err := r.decodeNew(q)
	if err != nil {
		return err
	}
	if o.Spec.Path != "" && !q.who.may(needAdministrator) {
		// The daemon reads the file as root: it may be any file of the host.
		return api.Errorf(api.CodeForbidden, "only an administrator may import from a path on a node; upload the file instead")
	}
	var in api.Image // as sent, without defaults
	if err := decode(body, &in); err != nil {
		return err
	}
	if in.Spec.SourceVolume != "" && in.Spec.Pool == "" {
		o.Spec.Pool = "" // the default is the volume's pool
	}
	o.Spec.SHA256 = strings.ToLower(o.Spec.SHA256)
	out, err := q.change(body, func(c *change) (*effect, error) {
		img := o.Clone()
		return r.make(c, &img)
	})
	if err != nil {
		return err
	}
	return q.answerTask(out)
}

func (r *imageResource) make(c *change, img *api.Image) (*effect, error) {
	var from *imageOrigin
	var err error
	if img.Spec.SourceVolume != "" {
		if from, err = c.origin(img); err != nil {
			return nil, err
		}
	}
	pool, err := configdb.Pools.Find(c.v, api.DefaultProject, img.Spec.Pool)
	if err != nil {
		return nil, atField(err, "spec.pool")
	}
	if err := usable(api.KindPool, &pool.Meta, ""); err != nil {
		return nil, err
	}
	if from != nil {
		err = c.copyFrom(from, img, &pool)
	} else {
		img.Spec.Node, err = c.storageNode(&pool, img.Spec.Node, img.Spec.Path != "")
	}
	if err != nil {
		return nil, err
	}
	c.tx.RequireRevision(configdb.Pools.SpecKey(pool.Meta.ID), pool.Meta.Revision)
	configdb.Pools.Refer(c.tx, pool.Meta.ID, api.KindImage, img.Meta.ID)
	img.Status.Phase = api.StoragePending
	if err := r.resource.create(c, img); err != nil {
		return nil, err
	}
	within := uploadDeadline
	switch {
	case img.Spec.Path != "":
		within = importDeadline
	case from != nil:
		within = vmOperationDeadline // as the copies of a clone
	}
	task, err := c.newTask(img.Meta.Project, api.TaskSpec{
		Action: api.ActionImageCreate, TargetKind: api.KindImage, TargetID: img.Meta.ID, Target: img.Meta.Name, TargetGeneration: img.Meta.Generation,
	}, within)
	return &effect{status: http.StatusAccepted, kind: api.KindImage, id: img.Meta.ID, task: task, object: img}, err
}

// storageNode returns the name of the node that makes an image or a volume:
// the one asked for, else this one, else, unless it has to be this one, any
// node where the pool is ready.
func (c *change) storageNode(pool *api.Pool, asked string, here bool) (string, error) {
	self := c.q.s.cfg.Node()
	if asked != "" && asked != self {
		n, err := configdb.Nodes.Find(c.v, api.DefaultProject, asked)
		if err != nil {
			return "", atField(err, "spec.node")
		}
		st, err := configdb.PoolStateOf(c.v, pool.Meta.ID, n.Meta.ID)
		switch {
		case err != nil || !st.Status.Ready:
			return "", api.Errorf(api.CodeRefused, "pool %s is not ready on node %s; see muster pool show %s", pool.Meta.Name, n.Meta.Name, pool.Meta.Name)
		case n.Status.Phase != api.NodeReady:
			return "", api.Errorf(api.CodeRefused, "node %s is %s", n.Meta.Name, n.Status.Phase)
		}
		return n.Meta.Name, nil
	}
	if c.q.s.cfg.Images.HasPool(c.v, pool.Meta.Name) {
		return self, nil
	}
	if asked == "" && !here {
		for _, st := range poolStates(c.v, pool.Meta.ID) {
			n, err := configdb.Nodes.Get(c.v, st.Spec.NodeID)
			if err == nil && st.Status.Ready && n.Status.Phase == api.NodeReady {
				return n.Meta.Name, nil
			}
		}
		return "", api.Errorf(api.CodeRefused, "pool %s is not ready on any node; see muster pool show %s", pool.Meta.Name, pool.Meta.Name)
	}
	return "", api.Errorf(api.CodeRefused, "pool %s is not ready on node %s; see muster pool show %s", pool.Meta.Name, self, pool.Meta.Name)
}

// upload answers PUT /images/{name}/content on the node that keeps the image.
func (r *imageResource) upload(q *request) error {
	sum := strings.ToLower(q.param("sha256"))
	if b, err := hex.DecodeString(sum); sum != "" && (err != nil || len(b) != 32) {
		return api.Invalid("sha256", "must be 64 hexadecimal digits")
	}
	v, err := q.freshView(readTimeout)
	if err != nil {
		return err
	}
	img, err := r.find(q, v)
	switch {
	case err != nil:
		return err
	case img.Meta.Deleting():
		return api.Errorf(api.CodeRefused, "image %s is being deleted", img.Meta.Name)
	case img.Spec.Path != "":
		return api.Errorf(api.CodeRefused, "image %s is imported from %s on node %s and takes no upload", img.Meta.Name, img.Spec.Path, img.Spec.Node)
	case img.Spec.SourceVolume != "":
		return api.Errorf(api.CodeRefused, "image %s is copied from volume %s and takes no upload", img.Meta.Name, img.Spec.SourceVolume)
	case img.Status.Phase == api.StorageReady:
		return api.Errorf(api.CodeRefused, "image %s has its content already; an image never changes", img.Meta.Name)
	}
	if sum != "" && img.Spec.SHA256 != "" && sum != img.Spec.SHA256 {
		return api.Errorf(api.CodeChecksum, "image %s was created for content with SHA-256 %s, the upload announces %s", img.Meta.Name, img.Spec.SHA256, sum)
	}
	if img.Spec.Node != q.s.cfg.Node() {
		return q.proxy(img.Spec.Node)
	}
	if !q.s.uploads.tryAcquire() {
		return api.Errorf(api.CodeRefused, "node %s takes %d uploads already; try again later", img.Spec.Node, maxUploads)
	}
	defer q.s.uploads.release()
	if sum == "" {
		sum = img.Spec.SHA256
	}
	return q.receive(&img, sum)
}

func (q *request) receive(img *api.Image, sum string) error {
	in := &uploadReader{ctl: q.ctl, from: q.r.Body}
	done, err := q.s.cfg.Images.Upload(q.ctx(), img.Meta.ID, in, q.r.ContentLength, sum)
	_ = q.ctl.SetReadDeadline(time.Time{})
	if err != nil {
		if failed := in.failed.Load(); failed != nil && api.CodeOf(err) == api.CodeInternal {
			return failed
		}
		return err
	}
	_ = q.ctl.SetWriteDeadline(time.Now().Add(replyTimeout))
	q.auditAlone(api.KindImage, done.Meta)
	v := q.db.Local()
	q.w.Header().Set("ETag", etag(done.Meta.Revision))
	q.reply(http.StatusOK, v.Revision(), &done)
	return nil
}

// uploadReader reads a body of any length with a deadline for each read, and
// turns a failure into the error that the client gets.
type uploadReader struct {
	ctl    *http.ResponseController
	from   io.ReadCloser
	n      int64
	failed atomic.Pointer[api.Error]
}

// Read implements io.Reader.
func (u *uploadReader) Read(p []byte) (int, error) {
	if err := u.failed.Load(); err != nil {
		return 0, err
	}
	_ = u.ctl.SetReadDeadline(time.Now().Add(uploadStall))
	n, err := u.from.Read(p)
	u.n += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		failed := api.Errorf(api.CodeIncomplete, "the upload ended after %d bytes; upload it again: %w", u.n, err)
		u.failed.Store(failed)
		return n, failed
	}
	return n, err
}

// Close implements io.Closer.
func (u *uploadReader) Close() error { return u.from.Close() }
