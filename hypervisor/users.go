// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/access"
)

// Modes of what a VM's user needs. The run directory is root's, and sticky: QEMU
// makes its sockets there, and can neither remove nor replace what is not its own.
const (
	vmDirMode = fs.ModeSticky | 0o770
	vmLogMode = 0o660
	// vmSeedMode: the VM only reads it.
	vmSeedMode = 0o640
	// vmSocketMode is of sockets that this daemon listens on for the VM.
	vmSocketMode = 0o660
	// kvmDevice is opened by QEMU itself.
	kvmDevice = "/dev/kvm"
)

// Users are the users that VMs run as, one for each, and their common group.
type Users struct {
	// Group may reach disks, images and run directories. It owns nothing.
	Group int
	// First to Last are uids, and gids of the same numbers, that nobody else has.
	// With Last == 0 VMs run as the daemon's own user.
	First, Last int
	// Taken are ids in the range that are somebody's.
	Taken map[int]bool
	// Problem says why there are none, for the administrator.
	Problem string
}

// ProcessUser is who one VM runs as.
type ProcessUser struct {
	UID, GID int
	Groups   []int
	// Memlock is how many bytes it may lock; 0: what the host allows.
	Memlock int64
}

// userTable knows which VM of this node has which user. A VM's choice follows from
// the IDs of the cluster's VMs alone (places), so that it has the same user on every
// node that shares its disks with this one, and nobody else has it, also while the VM
// is stopped and its files are still that user's.
type userTable struct {
	cfg Users
	mu  sync.Mutex
	of  map[string]int
}

func newUserTable(cfg Users) userTable { return userTable{cfg: cfg, of: map[string]int{}} }

func (t *userTable) on() bool { return t.cfg.Last > 0 }

var errNoUser = errors.New("all users of the range are taken by other VMs; widen vmUsers in the configuration of musterd")

// places are the users that the VMs of the cluster choose, as far as the range goes.
// ids are in the order of their making: each takes the first that is free from a
// number of its own on, so that a later VM never takes an earlier one's.
func (t *userTable) places(ids iter.Seq[string]) map[string]int {
	out, used := map[string]int{}, map[int]bool{}
	size := t.cfg.Last - t.cfg.First + 1
	for id := range ids {
		if len(used) == size {
			break
		}
		for i := range size {
			uid := t.choice(id, i)
			if used[uid] {
				continue
			}
			used[uid] = true
			if t.cfg.Taken[uid] {
				continue
			}
			out[id] = uid
			break
		}
	}
	return out
}

// choice is the user that a VM asks for in a try, from 0.
func (t *userTable) choice(vm string, try int) int {
	size := t.cfg.Last - t.cfg.First + 1
	h := fnv.New32a()
	_, _ = h.Write([]byte(vm))
	return t.cfg.First + (int(h.Sum32()%uint32(size))+try)%size
}

// assign returns the user of a VM, which it keeps until release. What runs has
// what the guard says. Another VM's place is taken only if there is nothing else.
func (t *userTable) assign(vm string, procs map[string]Process, places map[string]int) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	taken := map[int]bool{}
	for id, p := range procs {
		if id != vm && p.State != ProcessExited {
			taken[p.UID] = true
		}
	}
	for id, uid := range t.of {
		if id != vm {
			taken[uid] = true
		}
	}
	free := func(uid int) bool { return !taken[uid] && !t.cfg.Taken[uid] }
	if uid, ok := t.of[vm]; ok && free(uid) {
		return uid, nil
	}
	reserved := map[int]bool{}
	for id, uid := range places {
		if id != vm {
			reserved[uid] = true
		}
	}
	for _, spare := range []bool{true, false} {
		for i := range t.cfg.Last - t.cfg.First + 1 {
			if uid := t.choice(vm, i); free(uid) && !(spare && reserved[uid]) {
				t.of[vm] = uid
				return uid, nil
			}
		}
	}
	return 0, errNoUser
}

// vmIDs are those of all VMs of the cluster, in the order of their making.
func vmIDs(v *configdb.View) iter.Seq[string] {
	return func(yield func(string) bool) {
		for e := range v.Scan(configdb.VMs.SpecPrefix(), "") {
			if id, ok := configdb.VMs.IDOf(e.Key); ok && !yield(id) {
				return
			}
		}
	}
}

// note remembers the user of a VM that runs.
func (t *userTable) note(vm string, uid int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if uid > 0 {
		t.of[vm] = uid
	}
}

func (t *userTable) release(vm string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.of, vm)
}

// get returns the user of a VM, 0 if it has none.
func (t *userTable) get(vm string) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.of[vm]
}

// prober is the user that KVM is tried as; nil for the daemon's own.
func (t *userTable) prober() *syscall.Credential {
	if !t.on() {
		return nil
	}
	c := &syscall.Credential{Uid: uint32(t.cfg.Last), Gid: uint32(t.cfg.Last), Groups: []uint32{uint32(t.cfg.Group)}}
	if gid, err := access.Device(kvmDevice); err == nil && gid != 0 {
		c.Groups = append(c.Groups, uint32(gid))
	}
	return c
}

// UserOf returns the user that a VM of this node runs as, or is about to, and 0 if
// that is the daemon's own.
func (h *Hypervisor) UserOf(vmID string) int { return h.users.get(vmID) }

// user chooses who the VM runs as; nil for the daemon's own user. ok is false if
// the status says what is wrong.
func (s *step) user() (u *ProcessUser, ok bool) {
	t := &s.h.users
	if !t.on() {
		return nil, true
	}
	uid, err := t.assign(s.vm.Meta.ID, s.procs, t.places(vmIDs(s.v)))
	if err != nil {
		s.wait(api.VMStarting, "waiting: "+err.Error())
		return nil, false
	}
	u = &ProcessUser{UID: uid, GID: uid, Groups: []int{t.cfg.Group}}
	if gid, err := access.Device(kvmDevice); err == nil && gid != 0 {
		u.Groups = append(u.Groups, gid)
	}
	return u, true
}

// grant makes what the VM needs that of its user.
func (s *step) grant(ctx context.Context, u *ProcessUser) bool {
	if u == nil {
		return true
	}
	if err := s.grantAll(ctx, u); err != nil {
		s.fail(err.Error())
		return false
	}
	return true
}

// grantVolume lets the VM's QEMU open a volume. It is called before every command
// that names a volume's file, also while the VM runs.
func (s *step) grantVolume(ctx context.Context, volume string) error {
	uid := s.h.users.get(s.vm.Meta.ID)
	if uid == 0 {
		return nil
	}
	if c, ok := s.copies[volume]; ok {
		return s.h.grantFile(s.vm.Meta.ID, c.path)
	}
	return s.h.cfg.Volumes.Grant(ctx, s.v, s.vm.Meta.Project, volume, uid, uid, s.h.users.cfg.Group)
}

// grantImage lets the VM's QEMU read an image.
func (s *step) grantImage(ctx context.Context, name string) error {
	if s.h.users.get(s.vm.Meta.ID) == 0 {
		return nil
	}
	return s.h.cfg.Volumes.GrantImage(ctx, s.v, s.vm.Meta.Project, name, s.h.users.cfg.Group)
}

// grantFile lets the VM's QEMU open a file or device that is no volume's.
func (h *Hypervisor) grantFile(vmID, path string) error {
	uid := h.users.get(vmID)
	if uid == 0 {
		return nil
	}
	if _, err := access.OpenWay(filepath.Dir(path), h.users.cfg.Group); err != nil {
		return err
	}
	return access.Give(path, uid, uid, 0o600)
}

// hand gives the run directory to the VM's user. What an earlier life of QEMU left
// goes: it may be a link to somewhere else. The VM gets the copy of its serial output
// to write; what else this daemon keeps there is closed to it.
func (s *step) hand(p paths, u *ProcessUser) error {
	if err := handDir(p, u, s.h.users.cfg.Group); err != nil {
		return fmt.Errorf("give the run directory of vm %s to user %d: %w", s.vm.Meta.Name, u.UID, err)
	}
	return nil
}

func handDir(p paths, u *ProcessUser, group int) error {
	if _, err := access.OpenWay(filepath.Dir(p.dir), group); err != nil {
		return err
	}
	if err := errors.Join(os.Chown(p.dir, 0, u.GID), os.Chmod(p.dir, vmDirMode)); err != nil {
		return err
	}
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(p.dir, e.Name())
		st, err := os.Lstat(path)
		if err != nil {
			return err
		}
		sys, ok := st.Sys().(*syscall.Stat_t)
		if ok && sys.Uid != 0 || !st.Mode().IsRegular() {
			if err := os.RemoveAll(path); err != nil {
				return err
			}
		}
	}
	f, err := os.OpenFile(p.serialLog, os.O_WRONLY|os.O_CREATE|syscall.O_NOFOLLOW, vmLogMode)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return access.Give(p.serialLog, 0, u.GID, vmLogMode)
}

// handSeed lets the VM read the disk with what its guest is told.
func (s *step) handSeed(p paths, u *ProcessUser) error {
	if u == nil || s.vm.Spec.CloudInit == nil {
		return nil
	}
	return access.Give(p.seed, 0, u.GID, vmSeedMode)
}

// isolationCondition tells the administrator as whom VMs run.
func (h *Hypervisor) isolationCondition() api.Condition {
	c := api.Condition{Type: ConditionIsolation}
	t := &h.users
	if !t.on() {
		c.Reason, c.Message = "Off", "VMs run as the user of musterd"
		if t.cfg.Problem != "" {
			c.Reason, c.Message = "NoUsers", "VMs run as the user of musterd: "+t.cfg.Problem
		}
		return c
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	old := 0
	for _, in := range h.instances {
		if in.rooted.Load() {
			old++
		}
	}
	if old > 0 {
		c.Reason, c.Message = "StartedEarlier", fmt.Sprintf("%d running VMs were started by an earlier version or setting and run as the user of musterd; stop and start them", old)
		return c
	}
	c.OK, c.Reason = true, "UserPerVM"
	c.Message = fmt.Sprintf("every VM runs as a user of its own, %d to %d, in the group %d", t.cfg.First, t.cfg.Last, t.cfg.Group)
	return c
}
