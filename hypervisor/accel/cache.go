// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package accel

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/hostboot"
)

const cacheName = "accelerator.json"

// answer is what the probe found, valid as long as the key is the same.
type answer struct {
	Key         string          `json:"key"`
	Accelerator api.Accelerator `json:"accelerator"`
	Reason      string          `json:"reason"`
}

// cacheKey changes with the boot of the host, the QEMU program and the probe.
// It is empty, and nothing is kept, if one of them cannot be told.
func cacheKey(bin string) string {
	boot := hostboot.ID()
	if boot == "" {
		return ""
	}
	st, err := os.Stat(bin)
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(image())
	return fmt.Sprintf("%s %s %d %d %s", boot, bin, st.Size(), st.ModTime().UnixNano(), hex.EncodeToString(sum[:8]))
}

func readCache(dir, key string) (answer, bool) {
	var a answer
	b, err := os.ReadFile(filepath.Join(dir, cacheName))
	if err != nil || key == "" || json.Unmarshal(b, &a) != nil || a.Key != key {
		return answer{}, false
	}
	return a, a.Accelerator == api.AccelKVM || a.Accelerator == api.AccelTCG
}

func writeCache(dir string, a answer) error {
	if a.Key == "" {
		return nil
	}
	b, err := json.Marshal(a)
	if err != nil {
		return err
	}
	tmp := filepath.Join(dir, cacheName+".tmp")
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(dir, cacheName))
}
