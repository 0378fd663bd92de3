// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/cephtest"
	"github.com/muster-vm/muster/internal/rbdname"
)

// cephHosts are network namespaces that reach a Ceph by a bridge.
type cephHosts struct {
	bridge string // its address, where Ceph is
	names  []string
	addrs  []string
}

// bridged makes two hosts, and the bridge with an address of this one.
func bridged(t *testing.T) *cephHosts {
	t.Helper()
	pid := os.Getpid()
	net := fmt.Sprintf("10.213.%d.", pid%256)
	br := fmt.Sprintf("mceph%d", pid)
	h := &cephHosts{bridge: net + "1"}
	ip := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	undo := func(args ...string) { t.Cleanup(func() { _ = exec.Command("ip", args...).Run() }) }
	ip("link", "add", br, "type", "bridge")
	undo("link", "del", br)
	ip("addr", "add", h.bridge+"/24", "dev", br)
	ip("link", "set", br, "up")
	for i := range 2 {
		ns, veth, addr := fmt.Sprintf("mceph%d-%d", pid, i), fmt.Sprintf("mcv%d-%d", pid, i), fmt.Sprint(net, 11+i)
		ip("netns", "add", ns)
		undo("netns", "del", ns)
		ip("link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", ns)
		ip("link", "set", veth, "master", br, "up")
		ip("-n", ns, "addr", "add", addr+"/24", "dev", "eth0")
		ip("-n", ns, "link", "set", "eth0", "up")
		ip("-n", ns, "link", "set", "lo", "up")
		h.names, h.addrs = append(h.names, ns), append(h.addrs, addr)
	}
	return h
}

// sealed is what stands for the cluster's key in these tests.
func sealed(label string, key string) []byte { return []byte(label + "\n" + key) }

func openSealed(label string, b []byte) ([]byte, error) {
	key, ok := bytes.CutPrefix(b, []byte(label+"\n"))
	if !ok {
		return nil, errors.New("sealed for something else")
	}
	return key, nil
}

// rbdPool makes a pool of type rbd.
func (k *kit) rbdPool(name string, spec api.CephSpec) api.Pool {
	k.t.Helper()
	p := api.Pool{Meta: api.NewMeta(api.KindPool, "", name), Spec: api.PoolSpec{Type: api.PoolRBD, Ceph: &spec}}
	spec.SealedKey, spec.Key = sealed(api.KeyLabel(p.Meta.ID), spec.Key), ""
	k.txn(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Pools.Create(tx, &p) })
	return p
}

// TestPoolsInCeph has one Ceph for all it looks at: bringing it up takes longer than
// the rest.
func TestPoolsInCeph(t *testing.T) {
	hosts := bridged(t)
	ceph := cephtest.Start(t, hosts.bridge)
	k := newKit(t, "m1", "m2")
	for _, h := range k.nodes {
		h.Service.cfg.OpenKey, h.Service.cfg.NoteKey = openSealed, []byte("the cluster's key for notes, 32 b")
	}
	pool := k.rbdPool("ceph", ceph.Spec)
	left := rbdTmp + k.nodes["m1"].id + "-" + api.NewID() + "-X"
	ceph.Admin(t, "rbd", "create", ceph.Spec.Pool+"/"+left, "--size", "1M")
	wrong := k.rbdWrong(t, ceph)
	k.start("m1", "m2")
	k.untilReady(pool, "m1", "m2")
	t.Run("unfinished work of an earlier life is removed", func(t *testing.T) {
		if out := ceph.Admin(t, "rbd", "ls", ceph.Spec.Pool); out != "" {
			t.Errorf("the pool has %s", out)
		}
	})
	t.Run("an image of notes that was made by half is named", func(t *testing.T) { rbdNotesHalf(t, k, ceph, pool) })
	t.Run("nodes leave notes", func(t *testing.T) { rbdNotesLive(t, k, ceph, pool, hosts) })
	t.Run("volumes live", func(t *testing.T) { rbdVolumes(t, k, ceph, pool) })
	t.Run("a host is locked out", func(t *testing.T) { rbdFences(t, k, ceph, pool, hosts) })
	t.Run("a pool says what is wrong with it", func(*testing.T) {
		for reason, pool := range wrong {
			k.untilNotReady(pool, "m1", reason)
		}
	})
	t.Run("nothing stays of a pool that is removed", func(t *testing.T) {
		k.txn(func(v *configdb.View, tx *configdb.Txn) error {
			p, err := configdb.Pools.Get(v, pool.Meta.ID)
			if err != nil {
				return err
			}
			configdb.Pools.Delete(tx, &p)
			return nil
		})
		for _, h := range k.nodes {
			k.untilGone(configdb.PoolStates.StatusPrefix() + configdb.PoolStateID(pool.Meta.ID, h.id))
		}
		if out := ceph.Admin(t, "rbd", "ls", ceph.Spec.Pool); out != "" {
			t.Errorf("left in the pool: %s", out)
		}
	})
}

// rbdWrong makes pools that cannot work, by the reason that is to be said. One of them
// never answers, and holds up none of the others.
func (k *kit) rbdWrong(t *testing.T, ceph *cephtest.Ceph) map[string]api.Pool {
	t.Helper()
	ceph.Admin(t, "ceph", "auth", "get-or-create", "client.weak", "mon", "allow r")
	weak := ceph.Admin(t, "ceph", "auth", "get-key", "client.weak")
	pools := map[string]api.Pool{}
	for name, c := range map[string]struct {
		change func(*api.CephSpec)
		reason string
	}{
		"user":      {func(s *api.CephSpec) { s.User = "nobody" }, "refuses client.nobody"},
		"weak":      {func(s *api.CephSpec) { s.User, s.Key = "weak", weak }, "profile rbd pool="},
		"pool":      {func(s *api.CephSpec) { s.Pool = "nothing" }, "has no pool nothing; make it with: ceph osd pool create nothing"},
		"namespace": {func(s *api.CephSpec) { s.Namespace = "nothing" }, "has no namespace nothing; make it with: rbd namespace create"},
		"monitor":   {func(s *api.CephSpec) { s.Monitors = []string{"127.0.0.1:1"} }, "check"},
	} {
		spec := ceph.Spec
		c.change(&spec)
		pools[c.reason] = k.rbdPool("wrong-"+name, spec)
	}
	return pools
}

func rbdVolumes(t *testing.T, k *kit, ceph *cephtest.Ceph, pool api.Pool) {
	h := k.nodes["m1"]
	if st := k.state(k.db.Local(), pool, "m1"); st.Total < api.GiB || st.Free <= 0 || st.Free > st.Total {
		t.Errorf("the pool has %s of %s free", st.Free, st.Total)
	}
	img := k.upload(h, "tiny", "ceph", "8M")
	if now := k.untilImage(img.Meta.ID, api.StorageReady); now.Status.Format != "raw" || now.Status.VirtualSize != 8*api.MiB || now.Status.SHA256 == "" {
		t.Errorf("the image is %+v", now.Status)
	}
	want := map[string]struct {
		spec api.VolumeSpec
		size api.Size
	}{
		"clone":  {api.VolumeSpec{Image: "tiny"}, 8 * api.MiB},
		"larger": {api.VolumeSpec{Image: "tiny", Size: 64 * api.MiB}, 64 * api.MiB},
		"empty":  {api.VolumeSpec{Size: api.GiB}, api.GiB},
		"vars":   {api.VolumeSpec{Content: api.ContentUEFI}, 0},
	}
	made := map[string]api.Volume{}
	for name, w := range want {
		w.spec.Pool, w.spec.Node = "ceph", "m2" // every node has all of it
		made[name] = k.volume(name, w.spec)
	}
	for name, w := range want {
		vol := k.untilVolume(made[name].Meta.ID, api.StorageReady)
		if vol.Status.Format != "raw" || w.size != 0 && vol.Status.Size != w.size {
			t.Errorf("volume %s is %+v", name, vol.Status)
		}
		path, format, err := h.Resolve(k.db.Local(), "", name)
		if err != nil || format != "raw" || !rbdname.Is(path) || strings.Contains(path, ceph.Spec.Key) {
			t.Errorf("volume %s is opened as %s, %s, %v", name, path, format, err)
		}
	}
	tpm := k.volume("tpm", api.VolumeSpec{Content: api.ContentTPM, Pool: "ceph", Node: "m1"})
	if now := k.untilVolume(tpm.Meta.ID, api.StorageFailed); !strings.Contains(now.Status.Message, "choose a pool of type dir or shared") {
		t.Errorf("the state of a TPM: %s", now.Status.Message)
	}
	if got := k.rbdContent(t, ceph, made["larger"], 4096); !bytes.Equal(got, bytes.Repeat([]byte("muster! "), 512)) {
		t.Errorf("a clone begins with %q", got[:64])
	}
	if got := k.rbdContent(t, ceph, made["vars"], 64); !bytes.Contains(got, []byte("_FVH")) {
		t.Errorf("UEFI variables begin with %q", got)
	}
	k.wishSize(made["clone"].Meta.ID, 16*api.MiB)
	k.until("enlarged", func(v *configdb.View) bool {
		now, err := configdb.Volumes.Get(v, made["clone"].Meta.ID)
		return err == nil && now.Status.Size == 16*api.MiB
	})
	if out := ceph.Admin(t, "rbd", "info", ceph.Spec.Pool+"/"+rbdVolume+made["clone"].Meta.ID); !strings.Contains(out, "size 16 MiB") || !strings.Contains(out, "exclusive-lock") {
		t.Errorf("after the growth: %s", out)
	}
	for _, vol := range append([]api.Volume{tpm}, made["clone"], made["larger"], made["empty"], made["vars"]) {
		k.deleteVolume(vol.Meta.ID)
		k.untilGone(configdb.Volumes.SpecKey(vol.Meta.ID))
	}
	k.deleteImage(img.Meta.ID)
	k.untilGone(configdb.Images.SpecKey(img.Meta.ID))
	if out := ceph.Admin(t, "rbd", "ls", ceph.Spec.Pool); out != rbdNotes+pool.Meta.ID {
		t.Errorf("left in the pool: %s", out)
	}
	if left := files(t, h.local(pool).path, "tmp"); len(left) > 0 {
		t.Errorf("left on the host: %v", left)
	}
}

// rbdContent reads the beginning of a volume.
func (k *kit) rbdContent(t *testing.T, ceph *cephtest.Ceph, vol api.Volume, n int) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "content")
	ceph.Admin(t, "rbd", "export", "--no-progress", ceph.Spec.Pool+"/"+rbdVolume+vol.Meta.ID, path)
	return read(t, path)[:n]
}

// rbdFences is the storage guard against real QEMUs: nothing of a fenced host ever
// writes again, and another one goes on.
func rbdFences(t *testing.T, k *kit, ceph *cephtest.Ceph, pool api.Pool, hosts *cephHosts) {
	vol := k.volume("disk", api.VolumeSpec{Size: 64 * api.MiB, Pool: "ceph", Node: "m1"})
	k.untilVolume(vol.Meta.ID, api.StorageReady)
	path, _, err := k.nodes["m1"].Resolve(k.db.Local(), "", "disk")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	there := *k.nodes["m2"].driver(pool).(*rbdDriver)
	there.cmd.wrap = []string{"ip", "netns", "exec", hosts.names[0]}
	if addrs, err := (rbdFencer{&there}).Addresses(ctx); err != nil || !slices.Equal(addrs, hosts.addrs[:1]) {
		t.Fatalf("the host that is to be fenced has %v (%v), want %s", addrs, err, hosts.addrs[0])
	}
	guard, err := k.nodes["m1"].Fencer(k.db.Local(), "ceph")
	if err != nil {
		t.Fatal(err)
	}
	if addrs, err := guard.Addresses(ctx); err != nil || !slices.Contains(addrs, hosts.bridge) {
		t.Fatalf("this host has %v (%v), want %s", addrs, err, hosts.bridge)
	}
	lost := startQEMU(t, hosts.names[0], path, ceph.Spec.Key)
	lost.want("write -P 5 0 4096", "wrote 4096")
	if on, err := guard.Fenced(ctx, hosts.addrs[:1]); err != nil || on {
		t.Fatalf("fenced before: %v, %v", on, err)
	}
	done, err := guard.Fence(ctx, hosts.addrs[:1], []string{vol.Meta.ID, api.NewID()}, false, nil)
	if err != nil || done.Epoch == 0 || len(done.Owners) != 1 || !strings.HasPrefix(done.Owners[0], hosts.addrs[0]+":0/") {
		t.Fatalf("Fence: %+v, %v", done, err)
	}
	if on, err := guard.Fenced(ctx, hosts.addrs[:1]); err != nil || !on {
		t.Fatalf("fenced after: %v, %v", on, err)
	}
	if out := ceph.Admin(t, "rbd", "lock", "ls", ceph.Spec.Pool+"/"+rbdVolume+vol.Meta.ID); out != "" {
		t.Errorf("still locked: %s", out)
	}
	heir := startQEMU(t, hosts.names[1], path, ceph.Spec.Key)
	heir.want("read -P 5 0 4096", "read 4096")
	heir.want("write -P 7 0 4096", "wrote 4096")
	lost.want("write -P 6 0 4096", "write failed")
	if err := refusedQEMU(t, hosts.names[0], path, ceph.Spec.Key); !strings.Contains(err, "shutdown") {
		t.Errorf("a new QEMU of the fenced host: %s", err)
	}
	heir.want("read -P 7 0 4096", "read 4096")

	again, err := guard.Fence(ctx, hosts.addrs[:1], []string{vol.Meta.ID}, false, nil)
	if err != nil || again.Epoch < done.Epoch || len(again.Owners) != 0 {
		t.Fatalf("the second Fence: %+v, %v", again, err)
	}
	heir.want("write -P 8 0 4096", "wrote 4096")
	if err := guard.Unfence(ctx, hosts.addrs[:1]); err != nil {
		t.Fatal(err)
	}
	lost.want("write -P 6 0 4096", "write failed") // it was fenced by itself, too
	byOwner, err := guard.Fence(ctx, nil, []string{vol.Meta.ID}, true, nil)
	if err != nil || len(byOwner.Owners) != 1 || !strings.HasPrefix(byOwner.Owners[0], hosts.addrs[1]+":0/") {
		t.Fatalf("Fence of the owner: %+v, %v", byOwner, err)
	}
	heir.want("write -P 9 0 4096", "write failed")
	back := startQEMU(t, hosts.names[0], path, ceph.Spec.Key)
	back.want("read -P 8 0 4096", "read 4096")
	back.want("write -P 1 0 4096", "wrote 4096")
	back.do("quit", nil) // a client that is killed has the volume open for 30 s more
	k.deleteVolume(vol.Meta.ID)
	k.untilGone(configdb.Volumes.SpecKey(vol.Meta.ID))
	if _, err := guard.Fence(ctx, []string{"0.0.0.0"}, nil, false, nil); api.CodeOf(err) != api.CodeInvalid {
		t.Errorf("everybody was fenced: %v", err)
	}
}

// cephQEMU is a QEMU without a guest on another host.
type cephQEMU struct {
	t    *testing.T
	conn net.Conn
	in   *json.Decoder
	mu   sync.Mutex
	said bytes.Buffer
}

func (q *cephQEMU) Write(b []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.said.Write(b)
}

func qemuOn(t *testing.T, host, path, key string, more ...string) *exec.Cmd {
	t.Helper()
	n, err := rbdname.Parse(path)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte(key), 0o600); err != nil {
		t.Fatal(err)
	}
	args := append([]string{
		"netns", "exec", host, "stdbuf", "-o0", "qemu-system-x86_64", "-S", "-nodefaults", "-no-user-config", "-machine", "q35", "-accel", "tcg", "-display", "none", "-m", "64",
		"-object", "secret,id=k,format=base64,file=" + file, "-blockdev", n.Options("k") + ",node-name=d0,cache.direct=on",
	}, more...)
	return exec.Command("ip", args...)
}

func startQEMU(t *testing.T, host, path, key string) *cephQEMU {
	t.Helper()
	q := &cephQEMU{t: t}
	sock := filepath.Join(t.TempDir(), "q")
	cmd := qemuOn(t, host, path, key, "-qmp", "unix:"+sock+",server=on,wait=off")
	cmd.Stdout, cmd.Stderr = q, q
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	var err error
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if q.conn, err = net.Dial("unix", sock); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("QEMU on %s: %v: %s", host, err, q.said.String())
		}
	}
	t.Cleanup(func() { _ = q.conn.Close() })
	q.in = json.NewDecoder(q.conn)
	var hello map[string]any
	if err := q.in.Decode(&hello); err != nil {
		t.Fatal(err)
	}
	q.do("qmp_capabilities", nil)
	return q
}

// do runs one command of QMP.
func (q *cephQEMU) do(cmd string, args map[string]any) {
	q.t.Helper()
	_ = q.conn.SetDeadline(time.Now().Add(2 * time.Minute))
	ask := map[string]any{"execute": cmd}
	if args != nil {
		ask["arguments"] = args
	}
	if err := json.NewEncoder(q.conn).Encode(ask); err != nil {
		q.t.Fatal(err)
	}
	for {
		var m struct {
			Return, Error json.RawMessage
			Event         string
		}
		if err := q.in.Decode(&m); err != nil {
			q.t.Fatalf("QMP %s: %v", cmd, err)
		}
		if m.Error != nil {
			q.t.Fatalf("QMP %s: %s", cmd, m.Error)
		}
		if m.Event == "" {
			return
		}
	}
}

// want runs a command of qemu-io on the disk, and looks for what it says.
func (q *cephQEMU) want(io, say string) {
	q.t.Helper()
	q.mu.Lock()
	q.said.Reset()
	q.mu.Unlock()
	q.do("human-monitor-command", map[string]any{"command-line": `qemu-io d0 "` + io + `"`})
	var said string
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		q.mu.Lock()
		said = q.said.String()
		q.mu.Unlock()
		if strings.Contains(said, say) && !strings.Contains(said, "Pattern verification failed") {
			return
		}
		if strings.Contains(said, "write failed") || strings.Contains(said, "read failed") || strings.Contains(said, "verification failed") {
			break // "rbd request failed" comes before
		}
	}
	q.t.Fatalf("%s: want %q, got %s", io, say, said)
}

// refusedQEMU starts one that cannot open its disk.
func refusedQEMU(t *testing.T, host, path, key string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := qemuOn(t, host, path, key)
	timed := exec.CommandContext(ctx, cmd.Path, cmd.Args[1:]...)
	out, err := timed.CombinedOutput()
	if err == nil || ctx.Err() != nil {
		t.Fatalf("QEMU opened its disk, or did not end: %v: %s", err, out)
	}
	return string(out)
}
