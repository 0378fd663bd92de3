// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package freeport finds port numbers for the daemons of tests, which listen on them
// later, and once more after a restart.
package freeport

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
)

const (
	rangeFile = "/proc/sys/net/ipv4/ip_local_port_range"
	lowest    = 10000
	block     = 256 // port numbers
)

// own are the blocks of port numbers of this process. The tests of several packages run at
// once: one of them may not listen yet, or not again, when another one looks for an address.
var own struct {
	sync.Mutex
	left  []int          // that were not returned
	marks []net.Listener // one for each block, as long as the process lives
}

// Loopback returns an address of the loopback interface whose port number is free for
// TCP and for UDP, and that no other call returns, in whatever process. It is below those
// that the kernel gives to connections (ip(7), ip_local_port_range): one of them may be
// taken by the time it is listened on.
func Loopback(tb testing.TB) string {
	tb.Helper()
	own.Lock()
	defer own.Unlock()
	for range 1000 {
		if len(own.left) == 0 {
			if err := claim(); err != nil {
				tb.Fatal(err)
			}
		}
		addr := fmt.Sprintf("127.0.0.1:%d", own.left[0])
		if own.left = own.left[1:]; free(addr) {
			return addr
		}
	}
	tb.Fatal("no port number is free for TCP and UDP")
	return ""
}

// claim takes a block that no process has. What marks it is a name of unix(7) without a file,
// which ends with the process.
func claim() error {
	var first, last int
	b, err := os.ReadFile(rangeFile)
	if err == nil {
		_, err = fmt.Sscan(string(b), &first, &last)
	}
	if err != nil {
		return fmt.Errorf("the port numbers of connections: %w", err)
	}
	for _, i := range rand.Perm(max(0, (first-lowest)/block)) {
		ln, err := net.Listen("unix", fmt.Sprintf("@muster-freeport-%d", i))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			return fmt.Errorf("mark port numbers as taken: %w", err)
		}
		own.marks = append(own.marks, ln)
		for _, n := range rand.Perm(block) {
			own.left = append(own.left, lowest+i*block+n)
		}
		return nil
	}
	return fmt.Errorf("no %d port numbers that nobody has between %d and those of connections, which begin at %d (%s)", block, lowest, first, rangeFile)
}

func free(addr string) bool {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return false
	}
	defer func() { _ = ln.Close() }()
	udp, err := net.ListenPacket("udp", addr)
	if err != nil {
		return false
	}
	return udp.Close() == nil
}
