// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

//go:build linux

package access

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
)

const (
	user   = 70123
	group  = 70000
	enough = 0o600
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// reads tells whether a real process of the user with the group reads a file.
func reads(t *testing.T, path string, groups ...uint32) bool {
	t.Helper()
	cmd := exec.Command("/bin/cat", path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user, Groups: groups}}
	cmd.Dir = "/"
	return cmd.Run() == nil
}

func stat(t *testing.T, path string) *syscall.Stat_t {
	t.Helper()
	st, err := os.Stat(path)
	must(t, err)
	return st.Sys().(*syscall.Stat_t)
}

func TestOpenWayLetsTheGroupThroughAndNobodyElse(t *testing.T) {
	root := t.TempDir()
	must(t, os.Chmod(root, 0o700))
	dir := filepath.Join(root, "a", "b")
	must(t, os.MkdirAll(dir, 0o700))
	file := filepath.Join(dir, "file")
	must(t, os.WriteFile(file, []byte("x"), 0o644))
	if reads(t, file, group) {
		t.Fatal("it was open before")
	}
	changed, err := OpenWay(dir, group)
	must(t, err)
	if len(changed) < 3 || changed[0] != dir {
		t.Fatalf("changed %v", changed)
	}
	if !reads(t, file, group) {
		t.Error("the group cannot read the file")
	}
	if reads(t, file) || reads(t, file, group+1) {
		t.Error("others can read the file, too")
	}
	cmd := exec.Command("/bin/ls", dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user, Groups: []uint32{group}}}
	if cmd.Run() == nil {
		t.Error("the group can list the directory")
	}
	if changed, err = OpenWay(dir, group); err != nil || len(changed) != 0 {
		t.Errorf("the second time it changed %v, %v", changed, err)
	}
	// Another group gets an entry of its own, and the first keeps its own.
	if _, err := OpenWay(dir, group+1); err != nil || !reads(t, file, group) || !reads(t, file, group+1) {
		t.Errorf("two groups: %v", err)
	}
}

func TestOpenWayFollowsLinksToTheRealPlace(t *testing.T) {
	root := t.TempDir()
	real := filepath.Join(root, "real")
	must(t, os.Mkdir(real, 0o700))
	must(t, os.WriteFile(filepath.Join(real, "file"), nil, 0o644))
	link := filepath.Join(root, "link")
	must(t, os.Symlink(real, link))
	_, err := OpenWay(link, group)
	must(t, err)
	if !reads(t, filepath.Join(link, "file"), group) {
		t.Fatal("not readable through the link")
	}
}

func TestMaskThatHoldsOthersBackIsNotOpened(t *testing.T) {
	a := acl{{tagUserObj, 7, anyID}, {tagUser, 7, 5}, {tagGroupObj, 0, anyID}, {tagMask, 4, anyID}, {tagOther, 0, anyID}}
	if _, _, err := a.withSearch(group); err == nil {
		t.Fatal("user 5 would get the right to search")
	}
	a[1].perm = 4
	got, has, err := a.withSearch(group)
	want := acl{{tagUserObj, 7, anyID}, {tagUser, 4, 5}, {tagGroupObj, 0, anyID}, {tagGroup, 1, group}, {tagMask, 5, anyID}, {tagOther, 0, anyID}}
	if err != nil || has || !reflect.DeepEqual(got, want) {
		t.Fatalf("%v, %v, %v", got, has, err)
	}
	back, err := decodeACL(got.encode())
	if err != nil || !reflect.DeepEqual(back, want) {
		t.Fatalf("%v, %v", back, err)
	}
	for _, bad := range [][]byte{nil, {2, 0, 0}, {1, 0, 0, 0}, append(a.encode(), 1)} {
		if _, err := decodeACL(bad); err == nil {
			t.Errorf("%v accepted", bad)
		}
	}
}

func TestGive(t *testing.T) {
	dir := t.TempDir()
	_, err := OpenWay(dir, group)
	must(t, err)
	must(t, os.Chmod(dir, 0o711))
	path := filepath.Join(dir, "disk")
	must(t, os.WriteFile(path, []byte("x"), 0o644))
	must(t, Give(path, user, user, enough))
	if st := stat(t, path); st.Uid != user || st.Gid != user || st.Mode&0o777 != enough {
		t.Fatalf("%+v", st)
	}
	must(t, Give(path, user+1, user+1, enough)) // another user takes it over
	if st := stat(t, path); st.Uid != user+1 {
		t.Fatalf("%+v", st)
	}

	secret := filepath.Join(dir, "secret")
	must(t, os.WriteFile(secret, nil, 0o600))
	link, hard := filepath.Join(dir, "link"), filepath.Join(dir, "hard")
	must(t, os.Symlink(secret, link))
	must(t, os.Link(secret, hard))
	for path, says := range map[string]string{
		link: "neither", hard: "2 names", dir: "neither", filepath.Join(dir, "none"): "no such file",
	} {
		if err := Give(path, user, user, enough); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if st := stat(t, secret); st.Uid != 0 {
		t.Error("what a link points to was given away")
	}
}

func TestCanOpenAsksAsThatUser(t *testing.T) {
	dir, err := os.MkdirTemp("", "access")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o711))
	path := filepath.Join(dir, "f")
	must(t, os.WriteFile(path, nil, 0o600))
	if CanOpen(path, user, user) == nil {
		t.Fatal("a user opens root's file")
	}
	must(t, os.Chown(path, user, 0))
	must(t, CanOpen(path, user, user))
	if CanOpen(path, user+1, user+1) == nil {
		t.Fatal("another user opens the file")
	}
	must(t, os.WriteFile(filepath.Join(dir, "g"), nil, 0o600)) // this process is still root
}

func TestDevice(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kvm")
	must(t, os.WriteFile(path, nil, 0o600))
	for _, tt := range []struct {
		gid, mode int
		want      int
		fails     bool
	}{{0, 0o666, 0, false}, {108, 0o660, 108, false}, {0, 0o660, 0, true}, {108, 0o640, 0, true}, {0, 0o600, 0, true}} {
		must(t, os.Chown(path, 0, tt.gid))
		must(t, os.Chmod(path, os.FileMode(tt.mode)))
		gid, err := Device(path)
		if gid != tt.want || (err != nil) != tt.fails {
			t.Errorf("%s: %d, %v", fmt.Sprintf("gid %d mode %o", tt.gid, tt.mode), gid, err)
		}
	}
}
