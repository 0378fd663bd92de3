// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/argv"
	"github.com/muster-vm/muster/hypervisor/qmp"
	"github.com/muster-vm/muster/internal/access"
	"github.com/muster-vm/muster/internal/rbdname"
)

// PoolKeys has the keys of pools of type rbd.
type PoolKeys interface {
	// PoolKey is the secret to open what is in a pool, by its ID, as QEMU reads it.
	PoolKey(v *configdb.View, poolID string) ([]byte, error)
}

// vmKeyMode: root writes the file, the user of the VM reads it.
const vmKeyMode = 0o440

// writeKeys puts keys where the VM's QEMU, and nobody else, reads them: in its run
// directory, which is in memory. They are in no argument, and QMP has only their paths.
func (s *step) writeKeys(keys []string) error {
	p := s.h.pathsOf(s.vm.Meta.ID)
	for _, k := range keys {
		if err := s.writeKey(argv.KeyFile(p.dir, k), k); err != nil {
			return fmt.Errorf("hand over the key of a pool of type rbd: %w", err)
		}
	}
	return nil
}

func (s *step) writeKey(path, pool string) error {
	if s.h.cfg.Keys == nil {
		return api.Errorf(api.CodeUnsupported, "this node has no keys of pools")
	}
	key, err := s.h.cfg.Keys.PoolKey(s.v, pool)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return err
	}
	_, err = f.Write(key)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	uid := s.h.users.get(s.vm.Meta.ID)
	if uid == 0 {
		return nil // it runs as we do
	}
	return access.Give(path, 0, uid, vmKeyMode)
}

// addKey gives a running QEMU the key that it needs to open a path.
func (l *live) addKey(ctx context.Context, path string) error {
	n, err := rbdname.Parse(path)
	if err != nil {
		return nil //nolint:nilerr // a file needs no key
	}
	if err := l.s.writeKeys([]string{n.Key}); err != nil {
		return err
	}
	err = l.s.in.execute(ctx, "object-add", argv.SecretOptions(l.s.h.pathsOf(l.s.vm.Meta.ID).dir, n.Key).Object(), nil)
	var refused *qmp.CommandError
	if errors.As(err, &refused) && strings.Contains(refused.Desc, "duplicate") {
		return nil // it has it
	}
	return err
}

// plainFile refuses what QEMU does not open with its block layer.
func plainFile(what, path string) error {
	if rbdname.Is(path) {
		return api.Errorf(api.CodeRefused, "%s is in a pool of type rbd, and has to be a file: keep it in a pool of type dir or shared", what)
	}
	return nil
}
