// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

// DiskLimit bounds what a disk does in a second; 0 is no limit. A limit for
// both ways and one for a single way do not go together.
type DiskLimit struct {
	// IOPS are requests in a second, BPS bytes.
	IOPS      int64 `json:"iops,omitempty" minimum:"0"`
	IOPSRead  int64 `json:"iopsRead,omitempty" minimum:"0"`
	IOPSWrite int64 `json:"iopsWrite,omitempty" minimum:"0"`
	BPS       Size  `json:"bps,omitempty"`
	BPSRead   Size  `json:"bpsRead,omitempty"`
	BPSWrite  Size  `json:"bpsWrite,omitempty"`
	// Burst is how many times each limit may be passed for as many seconds as
	// BurstSeconds says (1 when left out), after a quiet time.
	Burst        int `json:"burst,omitempty" minimum:"0" maximum:"100"`
	BurstSeconds int `json:"burstSeconds,omitempty" minimum:"0" maximum:"3600"`
}

// Bounds of limits; QEMU takes rates up to 1e15.
const (
	MaxDiskRate     = 1_000_000_000_000_000
	MaxBurst        = 100
	MaxBurstSeconds = 3600
)

func (l DiskLimit) validate(field string) error {
	for _, r := range []struct {
		name             string
		all, read, write int64
	}{{"iops", l.IOPS, l.IOPSRead, l.IOPSWrite}, {"bps", int64(l.BPS), int64(l.BPSRead), int64(l.BPSWrite)}} {
		for name, n := range map[string]int64{r.name: r.all, r.name + "Read": r.read, r.name + "Write": r.write} {
			if n < 0 || n > MaxDiskRate {
				return Invalid(field+"."+name, "is %d; give 1 to %d, or 0 for no limit", n, int64(MaxDiskRate))
			}
		}
		if r.all > 0 && (r.read > 0 || r.write > 0) {
			return Invalid(field+"."+r.name, "bounds both ways and goes with neither %sRead nor %sWrite; give one or the other", r.name, r.name)
		}
	}
	return validBurst(field, l.Burst, l.BurstSeconds)
}

// Throttle is the limit in the words of QEMU (QAPI BlockIOThrottle).
func (l DiskLimit) Throttle() map[string]any {
	out := map[string]any{}
	for name, n := range map[string]int64{
		"iops": l.IOPS, "iops_rd": l.IOPSRead, "iops_wr": l.IOPSWrite,
		"bps": int64(l.BPS), "bps_rd": int64(l.BPSRead), "bps_wr": int64(l.BPSWrite),
	} {
		out[name] = n
		if n > 0 && l.Burst > 1 {
			out[name+"_max"] = min(n*int64(l.Burst), MaxDiskRate)
			out[name+"_max_length"] = max(l.BurstSeconds, 1)
		}
	}
	return out
}
