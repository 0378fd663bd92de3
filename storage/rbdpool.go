// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// How often a pool in a Ceph cluster is looked at: each look is a process, and the one
// that tells the space takes a third of a second of a processor.
const (
	cephInterval      = 30 * time.Second
	cephSpaceInterval = 5 * time.Minute
)

// probeImage is asked for; that there is none says that everything else works.
const probeImage = "muster-probe"

// check opens the pool as QEMU does, with QEMU's driver.
func (d *rbdDriver) check(ctx context.Context, _ *configdb.View, _ *api.Pool, st api.PoolState) (verdict, error) {
	lp, addresses := d.lp, []string(nil)
	full := !lp.cleaned || d.s.cfg.Now().Sub(lp.since) >= cephSpaceInterval
	now, err := call(ctx, lp.check, checkDeadline, func() (space, error) { return d.look(ctx, full) })
	switch {
	case ctx.Err() != nil:
		return verdict{}, context.Cause(ctx)
	case err != nil:
		lp.cleaned = false
		return verdict{reason: err.Error(), again: checkInterval}, nil
	}
	if full {
		lp.cleaned, lp.since, lp.space = true, d.s.cfg.Now(), now
		if addresses, err = call(ctx, lp.check, checkDeadline, func() ([]string, error) { return rbdFencer{d}.Addresses(ctx) }); err != nil {
			d.s.log.Warn("this node could not be locked out of a pool, so that its VMs there end with its lease", "pool", d.name, "err", err)
		}
	}
	return verdict{ready: true, space: lp.space, root: &rootID{}, addresses: addresses, again: cephInterval}, nil
}

// look says what is missing, with the remedy.
func (d *rbdDriver) look(ctx context.Context, full bool) (space, error) {
	for _, p := range []string{programRBD, programCeph, programRados} {
		if _, err := exec.LookPath(p); err != nil {
			return space{}, api.Errorf(api.CodeUnsupported, "the command %s is missing on this node; install the package ceph-common", p)
		}
	}
	if err := d.scratch(full); err != nil {
		return space{}, err
	}
	if err := d.probe(ctx); err != nil || !full {
		return space{}, err
	}
	if err := d.clean(ctx); err != nil {
		return space{}, err
	}
	return d.space(ctx)
}

// scratch is the directory where images are received and examined.
func (d *rbdDriver) scratch(first bool) error {
	if err := os.MkdirAll(filepath.Join(d.lp.path, "tmp"), 0o700); err != nil {
		return err
	}
	if !first {
		return nil
	}
	return removeLeftovers(d.lp.path, d.s.cfg.NodeID)
}

// probe looks for an image that is not there, with QEMU's driver.
func (d *rbdDriver) probe(ctx context.Context) error {
	key, err := d.cmd.keyFile()
	if err != nil {
		return err
	}
	defer key.Close()
	err = d.s.img.runWith(ctx, checkDeadline, 0, io.Discard, []*os.File{key},
		"info", "--object", "secret,id="+secretID+",format=base64,file="+keyFD, "--image-opts", d.options(probeImage))
	var exit *exitError
	if err == nil {
		return nil // somebody made one
	}
	if api.CodeOf(err) == api.CodeTimeout {
		return api.Errorf(api.CodeTimeout, "the Ceph cluster has not answered for %s; check that its monitors (%s) and OSDs are reachable from this node", checkDeadline, strings.Join(d.spec.Monitors, ", "))
	}
	if !errors.As(err, &exit) {
		return err
	}
	if strings.Contains(exit.text, noImage(probeImage)) {
		return nil
	}
	return d.cannotOpen(exit.text)
}

// noImage is what QEMU's driver says of an image that does not exist.
func noImage(image string) string { return "error reading header from " + image + ": No such file" }

// cannotOpen makes an error with a remedy of what QEMU's driver says.
func (d *rbdDriver) cannotOpen(text string) error {
	switch {
	case strings.Contains(text, "Unknown driver"):
		return api.Errorf(api.CodeUnsupported, "QEMU on this node has no driver for rbd; install the package qemu-block-extra")
	case strings.Contains(text, "error opening pool") && strings.Contains(text, "No such file"):
		return api.Errorf(api.CodeNotFound, "the Ceph cluster has no pool %s; make it with: ceph osd pool create %s && rbd pool init %s", d.spec.Pool, d.spec.Pool, d.spec.Pool)
	case strings.Contains(text, "namespace") && strings.Contains(text, "does not exist"):
		return api.Errorf(api.CodeNotFound, "pool %s of the Ceph cluster has no namespace %s; make it with: rbd namespace create %s/%s", d.spec.Pool, d.spec.Namespace, d.spec.Pool, d.spec.Namespace)
	case strings.Contains(text, "timed out"):
		return api.Errorf(api.CodeTimeout, "the monitors of the Ceph cluster (%s) do not answer; check their addresses and that this node reaches them", strings.Join(d.spec.Monitors, ", "))
	case strings.Contains(text, "not permitted"), strings.Contains(text, "ermission denied"), strings.Contains(text, "Invalid argument"):
		return api.Errorf(api.CodeForbidden, "the Ceph cluster refuses client.%s (%s); check the key, and its capabilities: mon 'profile rbd', osd 'profile rbd pool=%s'", d.spec.User, text, d.spec.Pool)
	case strings.Contains(text, "Cannot send after transport endpoint shutdown"):
		return api.Errorf(api.CodeRefused, "the Ceph cluster has locked this host out (see: ceph osd blocklist ls): it was given up for lost; it is readmitted when its node is, or by hand with: ceph osd blocklist rm ADDRESS:0/0")
	}
	return api.Errorf(api.CodeInternal, "the Ceph cluster cannot be used: %s", text)
}

// clean removes the unfinished work of this node's earlier life.
func (d *rbdDriver) clean(ctx context.Context) error {
	if d.lp.swept {
		return nil
	}
	var names []string
	if err := d.cmd.json(ctx, checkDeadline, &names, programRBD, "ls", strings.TrimSuffix(d.in(), "/")); err != nil {
		return err
	}
	for _, n := range names {
		if strings.HasPrefix(n, rbdTmp+d.s.cfg.NodeID+"-") {
			if _, err := d.cmd.run(ctx, checkDeadline, programRBD, "rm", "--no-progress", d.at(n)); err != nil {
				d.s.log.Warn("an unfinished image stays until the next start", "pool", d.name, "image", n, "err", err)
			}
		}
	}
	d.lp.swept = true
	return nil
}

// space is that of the pool as "ceph df" has it: what may still be stored, replicas
// counted once.
func (d *rbdDriver) space(ctx context.Context) (space, error) {
	var df struct {
		Pools []struct {
			Name  string `json:"name"`
			Stats struct {
				Stored   int64 `json:"stored"`
				MaxAvail int64 `json:"max_avail"`
			} `json:"stats"`
		} `json:"pools"`
	}
	if err := d.cmd.json(ctx, checkDeadline, &df, programCeph, "df"); err != nil {
		return space{}, err
	}
	for _, p := range df.Pools {
		if p.Name == d.spec.Pool {
			return space{total: api.Size(p.Stats.Stored + p.Stats.MaxAvail), free: api.Size(p.Stats.MaxAvail)}, nil
		}
	}
	return space{}, nil
}

// free is what the host has room for while an image is received, and the cluster to
// keep it, as far as that is known.
func (d *rbdDriver) free(ctx context.Context) (int64, error) {
	return call(ctx, d.lp.work, callDeadline, func() (int64, error) {
		_, sp, err := statRoot(d.lp.path)
		return int64(sp.free), err
	})
}
