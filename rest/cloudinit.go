// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"fmt"

	"github.com/GehirnInc/crypt/sha512_crypt"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/sshkey"
)

// hideCloudInit takes the password's hash out of what readers see. The copy is
// fresh, but what its pointers lead to is shared.
func hideCloudInit(_ *configdb.View, vm *api.VM) {
	if c := vm.Spec.CloudInit; c != nil && c.PasswordHash+c.Password != "" {
		c = c.Clone()
		c.Password, c.PasswordHash = "", ""
		vm.Spec.CloudInit = c
	}
}

// sealCloudInit prepares a VM's cloud-init settings for the database: a password
// leaves only its hash behind (crypt(3), SHA-512, which every guest knows). What
// is not given stays as it was in old, because nobody can read it to give it again.
func sealCloudInit(vm, old *api.VM) error {
	c := vm.Spec.CloudInit.Clone()
	if c == nil {
		return nil
	}
	for i, line := range c.SSHKeys {
		if _, err := sshkey.Parse(line); err != nil {
			return api.Invalid(fmt.Sprintf("spec.cloudInit.sshKeys[%d]", i), "%v", err)
		}
	}
	if c.Password != "" {
		hash, err := sha512_crypt.New().Generate([]byte(c.Password), nil)
		if err != nil {
			return fmt.Errorf("hash the password of vm %s: %w", vm.Meta.Name, err)
		}
		c.Password, c.PasswordHash = "", hash
	}
	if was := old.Spec.CloudInit; was != nil {
		switch {
		case c.PasswordHash == "" && c.User == was.User && c.Format == was.Format:
			c.PasswordHash = was.PasswordHash
		case c.PasswordHash == was.PasswordHash && c.User != was.User: // kept by a patch
			c.PasswordHash = ""
		}
	}
	vm.Spec.CloudInit = c
	return nil
}
