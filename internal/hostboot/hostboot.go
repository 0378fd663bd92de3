// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hostboot

import (
	"os"
	"strings"
)

const path = "/proc/sys/kernel/random/boot_id"

// ID is that of the present boot; empty if nobody knows.
func ID() string {
	b, _ := os.ReadFile(path)
	return strings.TrimSpace(string(b))
}
