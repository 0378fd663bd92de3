// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"errors"

	"github.com/muster-vm/muster/configdb"
)

// clusterCPU is the cluster's CPU baseline as the value of -cpu.
func clusterCPU(v *configdb.View) (string, error) {
	all, err := configdb.CPUBaselines.List(v)
	if err != nil {
		return "", err
	}
	if len(all) == 0 {
		return "", errors.New("the cluster has no CPU baseline yet; the leader makes it when the nodes have told their CPUs")
	}
	return all[0].Spec.QEMU(), nil
}
