// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package freeport finds port numbers for the daemons of tests, which listen on them
// later, and once more after a restart.
package freeport

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
)

const (
	rangeFile = "/proc/sys/net/ipv4/ip_local_port_range"
	lowest    = 10000
)

// given are the addresses that were returned: of tests that run in parallel, one may not
// listen yet when another one looks for an address.
var given sync.Map

// Loopback returns an address of the loopback interface whose port number is free for
// TCP and for UDP. It is below those that the kernel gives to connections (ip(7),
// ip_local_port_range): one of them may be taken by the time it is listened on.
func Loopback(tb testing.TB) string {
	tb.Helper()
	var first, last int
	b, err := os.ReadFile(rangeFile)
	if err == nil {
		_, err = fmt.Sscan(string(b), &first, &last)
	}
	if err != nil {
		tb.Fatalf("the port numbers of connections: %v", err)
	}
	if first <= lowest {
		tb.Fatalf("no port number between %d and those of connections, which begin at %d (%s)", lowest, first, rangeFile)
	}
	for range 100 {
		addr := fmt.Sprintf("127.0.0.1:%d", lowest+rand.IntN(first-lowest))
		if _, is := given.LoadOrStore(addr, true); !is && free(addr) {
			return addr
		}
	}
	tb.Fatal("no port number is free for TCP and UDP")
	return ""
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
