// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package accel

import _ "embed"

// probeCode is probe.asm assembled, to be run at 0xf0000. The command is in the
// head of the source.
//
//go:embed probe.bin
var probeCode []byte

const (
	// imageSize is the size of the smallest firmware image that QEMU takes.
	imageSize = 64 << 10
	// resetVector is where an x86 begins, counted from the image's start.
	resetVector = imageSize - 16
	// passCode is what QEMU exits with when the program writes 0x2a to
	// isa-debug-exit: (value << 1) | 1.
	passCode = 0x2a<<1 | 1
)

// image returns the firmware image: the program at its start, and at the reset
// vector a far jump to f000:0000, which is the same place below 1 MiB.
func image() []byte {
	b := make([]byte, imageSize)
	copy(b, probeCode)
	copy(b[resetVector:], []byte{0xea, 0x00, 0x00, 0x00, 0xf0})
	return b
}

// steps are the letters that the program prints, in order, with what each
// proves.
var steps = []struct {
	letter byte
	what   string
}{
	{'r', "real mode"},
	{'p', "protected mode"},
	{'l', "long mode with paging"},
	{'w', "running kernel code at hardware speed"},
	{'c', "CPUID"},
	{'m', "reading and writing MSRs"},
	{'f', "handling a page fault"},
	{'t', "timer interrupts"},
	{'u', "user mode and system calls"},
	{'v', "running kernel code at hardware speed after user mode"},
}

// failedStep names the first step that is not in what the program printed.
func failedStep(printed []byte) string {
	for i, s := range steps {
		if i >= len(printed) || printed[i] != s.letter {
			return s.what
		}
	}
	return "ending QEMU"
}
