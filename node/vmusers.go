// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node

import (
	"bufio"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"

	"github.com/muster-vm/muster/hypervisor"
	"github.com/muster-vm/muster/hypervisor/limit"
)

// Users of VMs; docs/adr/0011-users-of-vms.md says why these.
const (
	// DefaultVMUsers lies above what Debian and systemd give to packages, people
	// and services (up to 65535), and below the subordinate ids of containers (from
	// 100000).
	DefaultVMUsers = "70000-70999"
	vmUsersOff     = "off"
	// minVMUser is the first id that no distribution gives to system users.
	minVMUser = 1000
	// noUser is (uid_t)-1.
	noUser = 1<<32 - 1
	// capSetgid and capSetuid are bits of capabilities(7).
	capChown, capSetgid, capSetuid = 0, 6, 7
)

// findLimits looks for the control groups of this host.
func findLimits(log *slog.Logger) hypervisor.Limits {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		log.Warn("control groups cannot be found: limits of VMs are not in force", "err", err)
	}
	return limit.Find(string(mounts))
}

// parseUsers reads FIRST-LAST; 0, 0 is "off".
func parseUsers(s string) (first, last int, err error) {
	if s == vmUsersOff {
		return 0, 0, nil
	}
	a, b, ok := strings.Cut(s, "-")
	first, err1 := strconv.Atoi(a)
	last, err2 := strconv.Atoi(b)
	if !ok || err1 != nil || err2 != nil {
		return 0, 0, fmt.Errorf("vmUsers: %q is not FIRST-LAST, such as %s, or %s", s, DefaultVMUsers, vmUsersOff)
	}
	if first < minVMUser || last >= noUser || last <= first {
		return 0, 0, fmt.Errorf("vmUsers: %s must begin at %d or above and have at least two ids", s, minVMUser)
	}
	return first, last, nil
}

// users are the users that VMs run as on this host, or why there are none.
func (c *Config) users() hypervisor.Users {
	first, last, err := parseUsers(c.VMUsers)
	if err != nil || last == 0 {
		return hypervisor.Users{Problem: "vmUsers is off in the configuration of musterd"}
	}
	if why := usersProblem(first, last); why != "" {
		return hypervisor.Users{Problem: why}
	}
	return hypervisor.Users{Group: first, First: first + 1, Last: last, Taken: takenIDs("/etc/passwd", "/etc/group")}
}

// usersProblem says why this process cannot give VMs the ids, or "".
func usersProblem(first, last int) string {
	if os.Geteuid() != 0 {
		return "musterd does not run as root, so that it cannot start VMs as other users"
	}
	caps, err := effectiveCaps("/proc/self/status")
	if err != nil {
		return "its own rights cannot be read: " + err.Error()
	}
	for bit, name := range map[int]string{capChown: "CAP_CHOWN", capSetgid: "CAP_SETGID", capSetuid: "CAP_SETUID"} {
		if caps&(1<<bit) == 0 {
			return "musterd lacks " + name + ", which it needs to start VMs as other users"
		}
	}
	for _, path := range []string{"/proc/self/uid_map", "/proc/self/gid_map"} {
		b, err := os.ReadFile(path)
		if err != nil {
			return "its user namespace cannot be read: " + err.Error()
		}
		if !mapped(string(b), first, last) {
			return fmt.Sprintf("the user namespace of musterd has no ids %d to %d; set vmUsers to a range that it has, with more subordinate ids if need be", first, last)
		}
	}
	return ""
}

// mapped tells whether one line of user_namespaces(7) has the whole range.
func mapped(idMap string, first, last int) bool {
	for line := range strings.Lines(idMap) {
		var inside, outside, count int
		if n, err := fmt.Sscan(line, &inside, &outside, &count); n == 3 && err == nil && inside <= first && last < inside+count {
			return true
		}
	}
	return false
}

func effectiveCaps(path string) (uint64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	_, rest, ok := strings.Cut(string(b), "CapEff:")
	if f := strings.Fields(rest); ok && len(f) > 0 {
		return strconv.ParseUint(f[0], 16, 64)
	}
	return 0, fmt.Errorf("%s has no CapEff", path)
}

// takenIDs returns the ids of the third column of the given files, which are
// somebody's.
func takenIDs(paths ...string) map[int]bool {
	taken := map[int]bool{}
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			continue // a host without it has no such users
		}
		for s := bufio.NewScanner(f); s.Scan(); {
			if cols := strings.Split(s.Text(), ":"); len(cols) > 2 {
				if id, err := strconv.Atoi(cols[2]); err == nil {
					taken[id] = true
				}
			}
		}
		_ = f.Close()
	}
	return taken
}
