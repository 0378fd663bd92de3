// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

// NICLimit bounds what a network card does in a second, as the guest sees it; 0 is
// no limit. What does not fit waits on its way in, as far as there is room, and is
// dropped on its way out, so that the guest's own protocols slow down.
type NICLimit struct {
	// BPSIn are the bytes that the guest receives in a second, BPSOut those that
	// it sends.
	BPSIn  Size `json:"bpsIn,omitempty"`
	BPSOut Size `json:"bpsOut,omitempty"`
	// Burst is how many times each limit may be passed for as many seconds as
	// BurstSeconds says (1 when left out), after a quiet time.
	Burst        int `json:"burst,omitempty" minimum:"0" maximum:"100"`
	BurstSeconds int `json:"burstSeconds,omitempty" minimum:"0" maximum:"3600"`
}

// Bounds of limits of network cards. Below the least rate a single large frame
// would take more than a second; above the most, the counters of Open vSwitch
// (kilobits in 32 bits) are near their end.
const (
	MinNICRate = 8 * KiB
	MaxNICRate = 64 * GiB
)

func (l NICLimit) validate(field string) error {
	for name, n := range map[string]Size{"bpsIn": l.BPSIn, "bpsOut": l.BPSOut} {
		if n != 0 && (n < MinNICRate || n > MaxNICRate) {
			return Invalid(field+"."+name, "is %d; give %s to %s in a second, or 0 for no limit", int64(n), MinNICRate, MaxNICRate)
		}
	}
	return validBurst(field, l.Burst, l.BurstSeconds)
}

// validBurst checks the burst of a limit.
func validBurst(field string, burst, seconds int) error {
	switch {
	case burst < 0 || burst > MaxBurst:
		return Invalid(field+".burst", "is %d; give 2 to %d, or leave it out", burst, MaxBurst)
	case seconds < 0 || seconds > MaxBurstSeconds:
		return Invalid(field+".burstSeconds", "is %d; give 1 to %d, or leave it out", seconds, MaxBurstSeconds)
	case seconds > 0 && burst < 2:
		return Invalid(field+".burstSeconds", "says how long a burst may last, but %s.burst gives none", field)
	}
	return nil
}

// bucketParts says what may pass at once without any burst, in parts of a second of
// the rate: enough that TCP, which waits for 200 ms after a loss, keeps the rate.
const bucketParts = 4

// Bucket is how many bytes may pass at once at a rate: what a burst adds, beyond
// the usual.
func (l NICLimit) Bucket(rate Size) Size {
	usual := max(rate/bucketParts, 64*KiB)
	if l.Burst < 2 {
		return usual
	}
	more := float64(rate) * float64(l.Burst-1) * float64(max(l.BurstSeconds, 1))
	return max(usual, Size(min(more, float64(MaxNICRate))))
}
