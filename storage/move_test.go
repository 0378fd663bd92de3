// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/greeting"
)

// wires connect the hosts of a kit. Each connection passes through bend, if set.
type wires struct {
	k    *kit
	from *host
	bend func(net.Conn) net.Conn
}

func (w *wires) Stream(ctx context.Context, nodeID string) (net.Conn, error) {
	for _, h := range w.k.nodes {
		if h.id != nodeID {
			continue
		}
		here, there := net.Pipe()
		go h.ServeStream(context.WithoutCancel(ctx), there, w.from.id)
		if w.bend != nil {
			return w.bend(here), nil
		}
		return here, nil
	}
	return nil, errors.New("no such node")
}

// wired lets a host reach the others.
func (k *kit) wired(name string, bend func(net.Conn) net.Conn) {
	k.nodes[name].cfg.Streams = &wires{k: k, from: k.nodes[name], bend: bend}
}

// moveKit is two nodes with the pools local and fast (dir) and, if asked for, nfs
// (shared), and a stopped VM on m1.
type moveKit struct {
	*kit
	vm   api.VM
	pool map[string]api.Pool
}

func newMoveKit(t *testing.T, shared ...string) *moveKit {
	t.Helper()
	t.Parallel()
	k := &moveKit{kit: newKit(t, "m1", "m2"), pool: map[string]api.Pool{}}
	fast := serviceDir(t)
	k.pool["local"] = k.kit.pool("local", api.PoolSpec{Type: api.PoolDir})
	k.pool["fast"] = k.kit.pool("fast", api.PoolSpec{Type: api.PoolDir, Path: filepath.Join(fast, "fast")})
	for _, name := range shared {
		k.pool[name] = k.kit.pool(name, api.PoolSpec{Type: api.PoolShared, Path: serviceDir(t)})
	}
	for n, h := range k.nodes { // the same path is another directory on each host
		h.mounts = map[string]string{filepath.Join(fast, "fast"): filepath.Join(fast, n)}
		k.wired(n, nil)
	}
	k.start("m1", "m2")
	for _, p := range k.pool {
		k.untilReady(p, "m1", "m2")
	}
	vm := api.VM{Meta: api.NewMeta(api.KindVM, "", "web1"), Spec: api.VMSpec{CPUs: 1, Memory: api.GiB, Power: api.PowerStopped}}
	vm.Status = api.VMStatus{Phase: api.VMStopped, Node: "m1", Epoch: 1, ObservedGeneration: 1}
	b := api.Binding{Meta: api.Meta{ID: vm.Meta.ID, Name: "web1"}, Spec: api.BindingSpec{NodeID: k.nodes["m1"].id, Node: "m1", Epoch: 1}}
	k.txn(func(_ *configdb.View, tx *configdb.Txn) error {
		return errors.Join(configdb.VMs.Create(tx, &vm), configdb.Bindings.CreateUnnamed(tx, &b))
	})
	k.vm = vm
	return k
}

// disk makes a volume of the VM on m1 and writes something into it.
func (k *moveKit) disk(name string, spec api.VolumeSpec) (api.Volume, string) {
	k.t.Helper()
	spec.Node = "m1"
	vol := k.volume(name, spec)
	k.txn(func(_ *configdb.View, tx *configdb.Txn) error {
		configdb.Volumes.Refer(tx, vol.Meta.ID, api.KindVM, k.vm.Meta.ID)
		return nil
	})
	vol = k.untilVolume(vol.Meta.ID, api.StorageReady)
	path, _, err := k.nodes["m1"].Resolve(k.db.Local(), "", name)
	if err != nil {
		k.t.Fatal(err)
	}
	if vol.Status.Format == formatQcow2 {
		qemuIO(k.t, path, "write -P 5 1M 64k")
	}
	return vol, path
}

// wish adds the operation that moves volumes to a pool of a node.
func (k *moveKit) wish(node, pool string, volumes ...api.Volume) api.Operation {
	k.t.Helper()
	op := api.Operation{Meta: api.NewMeta(api.KindOperation, "", "web1"), Spec: api.OperationSpec{
		Action: api.ActionVMMove, VM: "web1", TaskID: api.NewID(), NodeID: k.nodes[node].id, Epoch: 1,
		Move: &api.MoveSpec{Node: node, FromNodeID: k.nodes["m1"].id, From: "m1"},
	}}
	op.Meta.ID = k.vm.Meta.ID
	for _, vol := range volumes {
		op.Spec.Move.Volumes = append(op.Spec.Move.Volumes, api.VolumeMove{ID: vol.Meta.ID, Pool: pool, Whole: vol.Spec.Image != ""})
	}
	k.txn(func(_ *configdb.View, tx *configdb.Txn) error { return configdb.Operations.CreateUnnamed(tx, &op) })
	return op
}

// untilOver waits for the last word of the operation, and removes it as the task
// service does.
func (k *moveKit) untilOver(phase api.TaskPhase) api.OperationStatus {
	k.t.Helper()
	var op api.Operation
	k.until("the move is "+string(phase), func(v *configdb.View) bool {
		op, _ = configdb.Operations.Get(v, k.vm.Meta.ID)
		if op.Status.Phase.Final() && op.Status.Phase != phase {
			k.t.Fatalf("%+v", op.Status)
		}
		return op.Status.Phase == phase
	})
	k.drop()
	return op.Status
}

// drop removes the operation, whatever became of it.
func (k *moveKit) drop() {
	k.t.Helper()
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		op, err := configdb.Operations.Get(v, k.vm.Meta.ID)
		if err == nil {
			configdb.Operations.DeleteUnnamed(tx, &op)
		}
		return api.IgnoreNotFound(err)
	})
}

// untilFiles waits until of all pools exactly the given files of volumes are left, by
// path.
func (k *moveKit) untilFiles(want ...string) {
	k.t.Helper()
	var have []string
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) { // files do not tell when they go
		have = have[:0]
		for _, root := range k.roots() {
			for _, dir := range []string{"volumes", "tmp"} {
				for _, f := range files(k.t, root, dir) {
					have = append(have, filepath.Join(root, dir, f))
				}
			}
		}
		if len(have) == len(want) && subset(have, want) {
			return
		}
	}
	k.t.Fatalf("files are left: %v, want %v", have, want)
}

func subset(some, of []string) bool {
	for _, s := range some {
		if !strings.Contains(strings.Join(of, "\n")+"\n", s+"\n") {
			return false
		}
	}
	return true
}

func (k *moveKit) roots() []string {
	var out []string
	if p, ok := k.pool["nfs"]; ok {
		out = append(out, p.Spec.Path)
	}
	for _, h := range k.nodes {
		out = append(out, h.poolPath(k.pool["local"]), h.poolPath(k.pool["fast"]))
	}
	return out
}

// at checks what the database says of a volume, and returns its file.
func (k *moveKit) at(vol api.Volume, node, pool string) (api.Volume, string) {
	k.t.Helper()
	v := k.db.Local()
	now, err := configdb.Volumes.Get(v, vol.Meta.ID)
	if err != nil || now.Spec.Pool != pool || now.Spec.Node != node || now.Status.Phase != api.StorageReady {
		k.t.Fatalf("%+v %+v, %v", now.Spec, now.Status, err)
	}
	for name, p := range k.pool {
		_, has := v.Get(configdb.Pools.RefPrefix(p.Meta.ID) + "volume/" + vol.Meta.ID)
		if has != (name == pool) {
			k.t.Errorf("pool %s is referred to: %v", name, has)
		}
	}
	return now, volumePath(k.nodes[node].poolPath(k.pool[pool]), vol.Meta.ID)
}

func TestVolumesMoveAsTheyAre(t *testing.T) {
	for _, c := range []struct{ name, from, node, pool string }{
		{"to another pool of the node", "local", "m1", "fast"},
		{"to a pool of all nodes", "local", "m1", "nfs"},
		{"out of a pool of all nodes", "nfs", "m1", "local"},
		{"out of a pool of all nodes, on another node", "nfs", "m2", "local"},
		{"to another node", "local", "m2", "local"},
		{"to another pool of another node", "local", "m2", "fast"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var shared []string
			if c.from == "nfs" || c.pool == "nfs" {
				shared = []string{"nfs"}
			}
			k := newMoveKit(t, shared...)
			vol, path := k.disk("data", api.VolumeSpec{Pool: c.from, Size: 8 * api.MiB})
			tpm, tpmPath := k.disk("tpm", api.VolumeSpec{Pool: c.from, Content: api.ContentTPM})
			if err := os.WriteFile(tpmPath, []byte("sealed"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := k.nodes["m1"].CreateSnapshot(t.Context(), k.db.Local(), "", "data", "kept"); err != nil {
				t.Fatal(err)
			}
			qemuIO(t, path, "write -P 6 1M 64k")
			was := read(t, path)
			k.wish(c.node, c.pool, vol, tpm)
			st := k.untilOver(api.TaskSucceeded)
			if st.Progress != 100 || !strings.Contains(st.Message, "2 volumes are in pool "+c.pool+" of node "+c.node) {
				t.Errorf("%+v", st)
			}
			_, now := k.at(vol, c.node, c.pool)
			_, nowTPM := k.at(tpm, c.node, c.pool)
			k.untilFiles(now, nowTPM)
			if !bytes.Equal(read(t, now), was) || string(read(t, nowTPM)) != "sealed" {
				t.Error("the files are not what they were")
			}
			if has, err := k.nodes[c.node].HasSnapshot(t.Context(), k.db.Local(), "", "data", "kept"); err != nil || !has {
				t.Errorf("its snapshot: %v, %v", has, err)
			}
			if info, _ := os.Stat(now); info.Mode().Perm() != volumeMode {
				t.Errorf("mode %v", info.Mode())
			}
			b, err := configdb.Bindings.Get(k.db.Local(), k.vm.Meta.ID)
			vm, verr := configdb.VMs.Get(k.db.Local(), k.vm.Meta.ID)
			epoch := map[string]uint64{"m1": 1, "m2": 2}[c.node]
			if err != nil || verr != nil || b.Spec.Node != c.node || b.Spec.NodeID != k.nodes[c.node].id || b.Spec.Epoch != epoch || vm.Status.Node != c.node || vm.Status.Epoch != epoch || vm.Status.Phase != api.VMStopped {
				t.Errorf("%+v %+v, %v %v", b.Spec, vm.Status, err, verr)
			}
		})
	}
}

// A clone of an image that stays behind becomes a whole disk, by the node that has
// the image.
func TestAMovedCloneIsIndependent(t *testing.T) {
	for node, pool := range map[string]string{"m1": "fast", "m2": "local"} {
		t.Run(node, func(t *testing.T) {
			k := newMoveKit(t)
			img := k.upload(k.nodes["m1"], "tiny", "local", "8M")
			vol, path := k.disk("root", api.VolumeSpec{Pool: "local", Image: "tiny"})
			whole := filepath.Join(t.TempDir(), "whole")
			qemu(t, "convert", "-f", "qcow2", "-O", "qcow2", path, whole)
			k.wish(node, pool, vol)
			k.untilOver(api.TaskSucceeded)
			now, file := k.at(vol, node, pool)
			k.untilFiles(file)
			sameContent(t, whole, file)
			info, err := k.nodes[node].img.info(t.Context(), file, formatQcow2)
			if err != nil || info.Backing != "" || now.Spec.Image != "" || now.Spec.Size != 8*api.MiB {
				t.Errorf("%+v, %+v, %v", info, now.Spec, err)
			}
			if by := configdb.Images.Referrers(k.db.Local(), img.Meta.ID); len(by) > 0 {
				t.Errorf("the image is held by %v", by)
			}
		})
	}
}

// Whatever stops a move, everything is where it was, and the reason is said.
func TestAMoveThatFailsChangesNothing(t *testing.T) {
	t.Run("a full pool", func(t *testing.T) {
		k := newMoveKit(t)
		small := k.kit.pool("small", api.PoolSpec{Type: api.PoolDir, Path: smallDisk(t, "2m")})
		k.untilReady(small, "m1")
		vol, path := k.disk("data", api.VolumeSpec{Pool: "local", Size: 8 * api.MiB})
		noise := filepath.Join(t.TempDir(), "noise")
		b := make([]byte, 4<<20)
		_, _ = rand.NewChaCha8([32]byte{4}).Read(b)
		if err := os.WriteFile(noise, b, 0o600); err != nil {
			t.Fatal(err)
		}
		qemuIO(t, path, "write -s "+noise+" 2M 4M")
		k.wish("m1", "small", vol)
		st := k.untilOver(api.TaskFailed)
		if st.Code != api.CodeStorageFull || !strings.Contains(st.Message, `pool "small"`) || !strings.Contains(st.Message, "where it was") {
			t.Errorf("%+v", st)
		}
		k.at(vol, "m1", "local")
		k.untilFiles(path)
		if left := append(files(t, small.Spec.Path, "tmp"), files(t, small.Spec.Path, "volumes")...); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
	t.Run("a header that is not to be believed", func(t *testing.T) {
		k := newMoveKit(t)
		vol, path := k.disk("data", api.VolumeSpec{Pool: "local", Size: 8 * api.MiB})
		qemu(t, "rebase", "-u", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", path)
		for _, node := range []string{"m1", "m2"} {
			k.wish(node, "fast", vol)
			if st := k.untilOver(api.TaskFailed); st.Code != api.CodeRefused || !strings.Contains(st.Message, "do not trust that vm") {
				t.Errorf("%+v", st)
			}
			k.untilFiles(path)
		}
	})
	t.Run("a process that has the disk open", func(t *testing.T) {
		k := newMoveKit(t)
		vol, path := k.disk("data", api.VolumeSpec{Pool: "local", Size: 8 * api.MiB})
		cmd := exec.Command("qemu-io", "-f", "qcow2", path)
		in, _ := cmd.StdinPipe()
		out, _ := cmd.StdoutPipe()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = in.Close(); _ = cmd.Wait() }()
		if _, err := io.ReadFull(out, make([]byte, len("qemu-io> "))); err != nil {
			t.Fatal(err)
		}
		k.wish("m2", "local", vol)
		if st := k.untilOver(api.TaskFailed); st.Code != api.CodeConflict || !strings.Contains(st.Message, "in use by another process") {
			t.Errorf("%+v", st)
		}
		k.untilFiles(path)
	})
	t.Run("a file of nobody in its place", func(t *testing.T) {
		k := newMoveKit(t)
		vol, path := k.disk("data", api.VolumeSpec{Pool: "local", Size: 8 * api.MiB})
		alien := volumePath(k.nodes["m2"].poolPath(k.pool["local"]), vol.Meta.ID)
		if err := os.WriteFile(alien, []byte("of another life"), 0o600); err != nil {
			t.Fatal(err)
		}
		k.wish("m2", "local", vol)
		if st := k.untilOver(api.TaskFailed); !strings.Contains(st.Message, "belongs to no migration or move") {
			t.Errorf("%+v", st)
		}
		k.untilFiles(path, alien)
		if string(read(t, alien)) != "of another life" {
			t.Error("it was overwritten")
		}
	})
	t.Run("a VM that was bound anew", func(t *testing.T) {
		k := newMoveKit(t)
		vol, path := k.disk("data", api.VolumeSpec{Pool: "local", Size: 8 * api.MiB})
		k.txn(func(v *configdb.View, tx *configdb.Txn) error {
			b, err := configdb.Bindings.Get(v, k.vm.Meta.ID)
			b.Spec.Epoch++
			return errors.Join(err, configdb.Bindings.UpdateSpec(v, tx, &b))
		})
		k.wish("m1", "fast", vol)
		if st := k.untilOver(api.TaskFailed); st.Code != api.CodeConflict {
			t.Errorf("%+v", st)
		}
		k.untilFiles(path)
	})
}

// cut ends a connection after so many bytes, and tells.
type cut struct {
	net.Conn
	left int
	then func()
}

func (c *cut) Read(b []byte) (int, error) {
	if c.left <= 0 {
		c.then()
		return 0, io.ErrUnexpectedEOF
	}
	n, err := c.Conn.Read(b[:min(len(b), c.left)])
	c.left -= n
	return n, err
}

// Each daemon may end at any moment: the next life goes on, or what there is of the
// copy goes.
func TestAMoveSurvivesTheEndOfADaemon(t *testing.T) {
	begin := func(t *testing.T, shared ...string) (*moveKit, api.Volume, string) {
		k := newMoveKit(t, shared...)
		vol, path := k.disk("data", api.VolumeSpec{Pool: "local", Size: 8 * api.MiB})
		return k, vol, path
	}
	arrived := func(k *moveKit, vol api.Volume) {
		k.t.Helper()
		k.untilOver(api.TaskSucceeded)
		_, file := k.at(vol, "m2", "local")
		k.untilFiles(file)
		if out := qemuIO(k.t, file, "read -P 5 1M 64k"); strings.Contains(out, "failed") {
			k.t.Error(out)
		}
	}
	t.Run("a stream that breaks is begun anew", func(t *testing.T) {
		k, vol, _ := begin(t)
		cuts := 0
		k.nodes["m2"].stop()
		k.restart("m2", func(s *Service) {
			s.cfg.Streams = &wires{k: k.kit, from: k.nodes["m2"], bend: func(c net.Conn) net.Conn {
				if cuts++; cuts > 2 {
					return c
				}
				return &cut{c, 10_000 * cuts, func() {}}
			}}
		})
		k.wish("m2", "local", vol)
		arrived(k, vol)
		if cuts != 3 {
			t.Errorf("%d streams", cuts)
		}
	})
	t.Run("the target while it copies", func(t *testing.T) {
		k, vol, _ := begin(t)
		broke := make(chan struct{}, 1)
		hold := make(chan struct{})
		k.nodes["m2"].stop()
		k.restart("m2", func(s *Service) {
			s.cfg.Streams = &wires{k: k.kit, from: k.nodes["m2"], bend: func(c net.Conn) net.Conn {
				return &cut{c, 10_000, func() { broke <- struct{}{}; <-hold }}
			}}
		})
		k.wish("m2", "local", vol)
		<-broke
		// What a killed daemon leaves in tmp goes at the next start.
		half := filepath.Join(k.nodes["m2"].poolPath(k.pool["local"]), "tmp", k.nodes["m2"].id+"."+vol.Meta.ID+".half")
		if err := os.WriteFile(half, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
		close(hold)
		k.nodes["m2"].stop()
		k.wired("m2", nil)
		streams := k.nodes["m2"].cfg.Streams
		k.restart("m2", func(s *Service) { s.cfg.Streams = streams })
		arrived(k, vol)
	})
	t.Run("the target before the commit", func(t *testing.T) {
		k, vol, path := begin(t)
		k.nodes["m2"].stop()
		k.wish("m2", "local", vol)
		m, ok := k.nodes["m2"].ownMove(k.db.Local(), k.vm.Meta.ID)
		if !ok {
			t.Fatal("no move")
		}
		if err := m.bring(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		k.at(vol, "m1", "local")
		here := volumePath(k.nodes["m2"].poolPath(k.pool["local"]), vol.Meta.ID)
		k.untilFiles(path, path+copyMark, here, here+copyMark)
		streams := k.nodes["m2"].cfg.Streams
		k.restart("m2", func(s *Service) { s.cfg.Streams = streams })
		arrived(k, vol)
	})
	t.Run("the target for good", func(t *testing.T) {
		k, vol, path := begin(t)
		k.nodes["m2"].stop()
		k.wish("m2", "local", vol)
		m, _ := k.nodes["m2"].ownMove(k.db.Local(), k.vm.Meta.ID)
		if err := m.bring(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		k.drop() // the task service: its node is lost
		if err := m.commit(t.Context()); !errors.Is(err, errUnwanted) {
			t.Errorf("a commit after the end: %v", err)
		}
		k.at(vol, "m1", "local")
		k.restart("m2", nil) // it comes back after all
		k.untilFiles(path)
	})
	t.Run("the source before it has removed its file", func(t *testing.T) {
		k, vol, _ := begin(t)
		k.wish("m2", "local", vol)
		k.until("it is committed", func(v *configdb.View) bool {
			now, err := configdb.Volumes.Get(v, vol.Meta.ID)
			return err == nil && now.Spec.Node == "m2"
		})
		k.nodes["m1"].stop()
		k.drop()
		k.restart("m1", nil)
		_, file := k.at(vol, "m2", "local")
		k.untilFiles(file)
	})
	t.Run("in a pool of all nodes", func(t *testing.T) {
		k, vol, path := begin(t, "nfs")
		k.nodes["m1"].stop()
		k.wish("m1", "nfs", vol)
		m, _ := k.nodes["m1"].ownMove(k.db.Local(), k.vm.Meta.ID)
		if err := m.bring(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		k.drop()
		k.restart("m1", nil)
		k.untilFiles(path)
	})
}

func TestAMoveCanBeGivenUp(t *testing.T) {
	k := newMoveKit(t)
	vol, path := k.disk("data", api.VolumeSpec{Pool: "local", Size: 8 * api.MiB})
	flows := make(chan struct{}, 1)
	hold := make(chan struct{})
	k.nodes["m2"].stop()
	k.restart("m2", func(s *Service) {
		s.cfg.Streams = &wires{k: k.kit, from: k.nodes["m2"], bend: func(c net.Conn) net.Conn {
			return &cut{c, 10_000, func() { flows <- struct{}{}; <-hold }}
		}}
	})
	k.wish("m2", "local", vol)
	<-flows
	k.txn(func(v *configdb.View, tx *configdb.Txn) error {
		op, err := configdb.Operations.Get(v, k.vm.Meta.ID)
		op.Spec.Cancel = true
		return errors.Join(err, configdb.Operations.UpdateSpec(v, tx, &op))
	})
	close(hold)
	k.untilOver(api.TaskCancelled)
	k.at(vol, "m1", "local")
	k.untilFiles(path)
}

// A node gets a volume only for an operation of its own, and a file that another
// node has not cleaned up is left to it.
func TestWhoMayHaveAVolume(t *testing.T) {
	k := newMoveKit(t, "nfs")
	vol, path := k.disk("data", api.VolumeSpec{Pool: "local", Size: 8 * api.MiB})
	k.nodes["m2"].stop()
	op := k.wish("m2", "local", vol)
	m1, m2 := k.nodes["m1"], k.nodes["m2"]
	hello := streamHello{Operation: op.Meta.ID, Task: op.Spec.TaskID, Volume: vol.Meta.ID}
	if _, _, err := m1.admit(hello, m2.id); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]struct {
		host  *host
		hello streamHello
		peer  string
		code  api.Code
	}{
		"another node":       {m1, hello, m1.id, api.CodeForbidden},
		"of another task":    {m1, streamHello{op.Meta.ID, api.NewID(), vol.Meta.ID}, m2.id, api.CodeNotFound},
		"of no operation":    {m1, streamHello{api.NewID(), op.Spec.TaskID, vol.Meta.ID}, m2.id, api.CodeNotFound},
		"another volume":     {m1, streamHello{op.Meta.ID, op.Spec.TaskID, api.NewID()}, m2.id, api.CodeForbidden},
		"from another place": {m2, hello, m2.id, api.CodeConflict},
	} {
		if _, _, err := c.host.admit(c.hello, c.peer); api.CodeOf(err) != c.code {
			t.Errorf("%s: %v", name, err)
		}
	}
	nfs := filepath.Join(k.pool["nfs"].Spec.Path, "volumes", vol.Meta.ID+".qcow2")
	foreign := nfs + copyMark + "." + api.NewID()
	if err := os.WriteFile(foreign, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err := m1.placeMarked(path, nfs, k.pool["nfs"], func() error { return nil })
	if !errors.Is(err, errBroken) || !strings.Contains(err.Error(), foreign) || there(nfs) {
		t.Errorf("%v", err)
	}
}

func FuzzFrames(f *testing.F) {
	var b bytes.Buffer
	_ = writeFrame(&b, piece{at: 4, b: []byte("abc")})
	_ = writeFrame(&b, piece{at: 16})
	f.Add(b.Bytes(), int64(16))
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255}, int64(16))
	f.Add([]byte{255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 1, 7}, int64(-1))
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		end := int64(0)
		err := readFrames(bytes.NewReader(b), size, func(p piece) error {
			if p.at < end || len(p.b) == 0 || p.at+int64(len(p.b)) > size {
				t.Fatalf("%d bytes at %d of %d, behind %d", len(p.b), p.at, size, end)
			}
			end = p.at + int64(len(p.b))
			return nil
		})
		if err == nil && size < 0 {
			t.Fatal("a file of less than nothing")
		}
	})
}

func FuzzStreamWords(f *testing.F) {
	f.Add([]byte("wait\nfile 4096\n"))
	f.Add([]byte("none refused it is not here\n"))
	f.Add([]byte("later not_found wait\n"))
	f.Add([]byte("file -1\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		size, err := awaitFile(bufio.NewReaderSize(bytes.NewReader(b), greeting.MaxLine))
		if err == nil && (size < 0 || size > 2*maxVirtualSize) || err != nil && size != 0 {
			t.Fatal(size, err)
		}
	})
}
