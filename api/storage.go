// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"encoding/hex"
	"path/filepath"
	"strings"
	"unicode"
)

// Pool is a place for images and volumes.
type Pool = Object[PoolSpec, PoolStatus]

// PoolType is how a pool keeps its data.
type PoolType string

// The pool types. A dir pool is one directory on each node, with that node's
// own content; a shared pool is one directory that every node sees; an rbd pool is in
// a Ceph cluster that every node reaches.
const (
	PoolDir    PoolType = "dir"
	PoolShared PoolType = "shared"
	PoolRBD    PoolType = "rbd"
)

// LocalPool is the name of the dir pool that init creates.
const LocalPool = "local"

// PoolSpec is the definition.
type PoolSpec struct {
	Type PoolType `json:"type" enum:"dir,shared,rbd"`
	// Path is absolute and the same on every node. For the pool "local" it is
	// empty, which means <data-dir>/pool.
	Path string `json:"path,omitempty"`
	// Ceph is for type rbd.
	Ceph *CephSpec `json:"ceph,omitempty"`
}

// SetDefaults implements Spec.
func (s *PoolSpec) SetDefaults() {
	if s.Ceph != nil {
		s.Ceph.setDefaults()
	}
	if s.Type == "" {
		s.Type = PoolDir
	}
}

// Validate implements Spec.
func (s *PoolSpec) Validate() error {
	switch s.Type {
	case PoolDir, PoolShared:
		if s.Ceph != nil {
			return Invalid("spec.ceph", "is for pools of type rbd; leave it out, or give that type")
		}
	case PoolRBD:
		switch {
		case s.Path != "":
			return Invalid("spec.path", "is for pools of type dir and shared; a pool of type rbd is in a Ceph cluster and has none")
		case s.Ceph == nil:
			return Invalid("spec.ceph", "is missing; give pool, monitors, user and key of the Ceph cluster")
		}
		return s.Ceph.validate()
	default:
		return Invalid("spec.type", "is %q; give dir, shared or rbd", clip(string(s.Type)))
	}
	if s.Path == "" {
		if s.Type == PoolShared {
			return Invalid("spec.path", "is missing; give the absolute path of the directory that every node sees")
		}
		return nil
	}
	if !validPath(s.Path) || s.Path == "/" {
		return Invalid("spec.path", "%q must be an absolute, clean path of at most %d characters, none of them a control character, and not /", clip(s.Path), maxPath)
	}
	return nil
}

// maxPath is the longest path that a user may name.
const maxPath = 1024

// validPath refuses control characters too: a NUL ends a path for the system
// but not for us, and a line break forges lines of logs.
func validPath(p string) bool {
	return len(p) <= maxPath && filepath.IsAbs(p) && filepath.Clean(p) == p && !strings.ContainsFunc(p, unicode.IsControl)
}

// validNode checks the name of a node that may be left out.
func validNode(name string) error {
	if name == "" {
		return nil
	}
	return ValidName("spec.node", name)
}

// PoolStatus is composed when a pool is read, from the PoolState of each node.
type PoolStatus struct {
	Nodes []PoolStateStatus `json:"nodes,omitempty"`
	// Capabilities are what pools of this type can do.
	Capabilities []PoolCapability `json:"capabilities,omitempty"`
}

// PoolState is one node's view of one pool; its ID is "<pool id>.<node id>".
type PoolState = Object[PoolStateSpec, PoolStateStatus]

// PoolStateSpec says which pool and node it is about.
type PoolStateSpec struct {
	PoolID string `json:"poolID"`
	NodeID string `json:"nodeID"`
}

// PoolStateStatus is written by the storage module of the node.
type PoolStateStatus struct {
	Node  string `json:"node"`
	Ready bool   `json:"ready"`
	// Reason says why the pool is not ready here and what to do.
	Reason string `json:"reason,omitempty"`
	// Notes says which notes of the storage heartbeat have failed here for 30 s or more,
	// of a pool that is ready, and what to do.
	Notes string `json:"notes,omitempty"`
	// Stamp is the random value that this node wrote into a shared pool's
	// directory; other nodes must find it there.
	Stamp string `json:"stamp,omitempty"`
	// Addresses under which a pool that can lock hosts out has seen this node since
	// its host was booted, sorted.
	Addresses []string `json:"addresses,omitempty"`
	// HostBoot is the boot of the host that the addresses are of (boot_id of Linux);
	// empty: of an earlier one.
	HostBoot string `json:"hostBoot,omitempty"`
	// Total and Free bytes of the file system, written in steps of at least
	// 5 % so that an idle cluster writes nothing.
	Total Size `json:"total,omitempty"`
	Free  Size `json:"free,omitempty"`
}

// Image is a disk image that volumes are cloned from. Its file never changes.
type Image = Object[ImageSpec, ImageStatus]

// ImageSpec is the wish.
type ImageSpec struct {
	// Pool is the name of the pool; "local" when empty.
	Pool string `json:"pool,omitempty"`
	// Path, if set, is a file on the node Node to import; otherwise the
	// content is uploaded.
	Path string `json:"path,omitempty"`
	// Node is the name of the node that imports and, in a dir pool, keeps the
	// image. Set by the node that takes the request when empty.
	Node string `json:"node,omitempty"`
	// SHA256 of the content as 64 hexadecimal digits, if the user gave one.
	SHA256 string `json:"sha256,omitempty"`
	// SourceVolume, if set, is the name of a volume whose content becomes the
	// image's, as a snapshot of its VM has it: SourceSnapshot is the name of that,
	// stored as its ID. One that is taken for the copy is temporary. A volume of no
	// VM needs none.
	SourceVolume   string `json:"sourceVolume,omitempty" doc:"name of a volume to copy the content from"`
	SourceSnapshot string `json:"sourceSnapshot,omitempty" doc:"snapshot of the VM that has the volume; without one, a temporary one is taken of the VM as it is"`
}

// SetDefaults implements Spec.
func (s *ImageSpec) SetDefaults() {
	if s.Pool == "" {
		s.Pool = LocalPool
	}
}

// Validate implements Spec.
func (s *ImageSpec) Validate() error {
	if err := ValidName("spec.pool", s.Pool); err != nil {
		return err
	}
	if s.Path != "" && !validPath(s.Path) {
		return Invalid("spec.path", "%q must be an absolute, clean path on the node, of at most %d characters and none of them a control character", clip(s.Path), maxPath)
	}
	if err := validNode(s.Node); err != nil {
		return err
	}
	if s.SHA256 != "" {
		if b, err := hex.DecodeString(s.SHA256); err != nil || len(b) != 32 {
			return Invalid("spec.sha256", "must be 64 hexadecimal digits")
		}
	}
	return s.validateSource()
}

// validateSource checks where the content comes from.
func (s *ImageSpec) validateSource() error {
	switch {
	case s.SourceVolume == "" && s.SourceSnapshot != "":
		return Invalid("spec.sourceSnapshot", "is of the VM of a volume; name the volume in spec.sourceVolume")
	case s.SourceVolume == "":
		return nil
	case s.Path != "":
		return Invalid("spec.path", "cannot be given with spec.sourceVolume; the content comes from one of them")
	case s.SHA256 != "":
		return Invalid("spec.sha256", "is of content that is uploaded or imported; the SHA-256 of a copied volume is known when it is copied")
	}
	if err := ValidName("spec.sourceVolume", s.SourceVolume); err != nil || s.SourceSnapshot == "" {
		return err
	}
	return ValidName("spec.sourceSnapshot", s.SourceSnapshot)
}

// Awaits reports whether the content of the image is uploaded.
func (s *ImageSpec) Awaits() bool { return s.Path == "" && s.SourceVolume == "" }

// StoragePhase is where an image or volume is in its life.
type StoragePhase string

// The phases.
const (
	StoragePending   StoragePhase = "pending"
	StorageImporting StoragePhase = "importing"
	StorageReady     StoragePhase = "ready"
	StorageFailed    StoragePhase = "failed"
	StorageDeleting  StoragePhase = "deleting"
)

// ImageStatus is written by the storage module of the node spec.node.
type ImageStatus struct {
	ObservedGeneration uint64       `json:"observedGeneration,omitempty"`
	Phase              StoragePhase `json:"phase,omitempty"`
	// Format is what qemu-img found: qcow2 or raw.
	Format string `json:"format,omitempty"`
	// VirtualSize is what a guest sees, Size what the file takes.
	VirtualSize Size   `json:"virtualSize,omitempty"`
	Size        Size   `json:"size,omitempty"`
	SHA256      string `json:"sha256,omitempty"`
	// Progress of an import in percent.
	Progress   int         `json:"progress,omitempty"`
	Message    string      `json:"message,omitempty"`
	Conditions []Condition `json:"conditions,omitempty"`
}

// Volume is a virtual disk that one VM may attach.
type Volume = Object[VolumeSpec, VolumeStatus]

// VolumeSpec is the wish.
type VolumeSpec struct {
	// Pool is the name of the pool; "local" when empty.
	Pool string `json:"pool,omitempty"`
	// Image is the name of the image to clone; empty for an empty disk.
	Image string `json:"image,omitempty"`
	// Size a guest sees. With an image, 0 means the image's.
	Size Size `json:"size,omitempty"`
	// SourceVolume is the name of a volume that the content is copied from, as a
	// snapshot of its VM has it: SourceSnapshot is the ID of that. With an image,
	// which must be the source's own, only what differs from the image is copied.
	SourceVolume   string `json:"sourceVolume,omitempty" readOnly:"true"`
	SourceSnapshot string `json:"sourceSnapshot,omitempty" readOnly:"true"`
	// Node is the name of the node that creates and deletes the file and, in a
	// dir pool, keeps it.
	Node string `json:"node,omitempty"`
	// Content is what else than a disk it is: the state of a VM's machine, made
	// with the VM. Its size follows from that.
	Content VolumeContent `json:"content,omitempty" enum:"uefi,uefi-secure,tpm" readOnly:"true"`
}

// VolumeContent is the state of a VM's machine that a volume keeps.
type VolumeContent string

// The contents: UEFI variables (qcow2), those that begin with the keys for
// Secure Boot, and the state of a TPM (raw, as swtpm keeps it).
const (
	ContentUEFI       VolumeContent = "uefi"
	ContentUEFISecure VolumeContent = "uefi-secure"
	ContentTPM        VolumeContent = "tpm"
)

// SetDefaults implements Spec.
func (s *VolumeSpec) SetDefaults() {
	if s.Pool == "" {
		s.Pool = LocalPool
	}
}

// Validate implements Spec.
func (s *VolumeSpec) Validate() error {
	d := VMDisk{Image: s.Image, Size: s.Size, Pool: s.Pool}
	if s.Content != "" {
		return s.validateContent()
	}
	if s.Image == "" && s.Size == 0 {
		return Invalid("spec.size", "is missing; give the size of an empty volume, such as 10G, or an image to clone")
	}
	if err := d.validate("spec"); err != nil {
		return err
	}
	return validNode(s.Node)
}

func (s *VolumeSpec) validateContent() error {
	if err := oneOf("spec.content", s.Content, ContentUEFI, ContentUEFISecure, ContentTPM); err != nil {
		return err
	}
	if s.Image != "" || s.Size != 0 {
		return Invalid("spec.content", "is %s, which goes with neither an image nor a size", s.Content)
	}
	if err := ValidName("spec.pool", s.Pool); err != nil {
		return err
	}
	return validNode(s.Node)
}

// VolumeStatus is written by the storage module of the node spec.node.
type VolumeStatus struct {
	ObservedGeneration uint64       `json:"observedGeneration,omitempty"`
	Phase              StoragePhase `json:"phase,omitempty"`
	Format             string       `json:"format,omitempty"`
	Size               Size         `json:"size,omitempty"`
	// Progress of a copy in percent.
	Progress   int         `json:"progress,omitempty"`
	Message    string      `json:"message,omitempty"`
	Conditions []Condition `json:"conditions,omitempty"`
}

// Shared reports whether every node sees the same content of the pool.
func (s *PoolSpec) Shared() bool { return s.Type != PoolDir }

// PoolCapability is something that only some types of pools can do.
type PoolCapability string

// The capabilities.
const (
	// CapShared: every node sees the same content, so that VMs restart and migrate
	// without a copy.
	CapShared PoolCapability = "shared"
	// CapSnapshots: VMs have snapshots, are suspended to disk, reverted and cloned.
	CapSnapshots PoolCapability = "snapshots"
	// CapMoves: volumes are moved to other pools and nodes.
	CapMoves PoolCapability = "moves"
	// CapTPM: the state of a TPM can be kept.
	CapTPM PoolCapability = "tpm"
	// CapFencing: the pool itself can lock out a host that is lost.
	CapFencing PoolCapability = "fencing"
)

// Capabilities of the type. Linked clones of images and enlarging, also while the VM
// runs, are what all can do.
func (s *PoolSpec) Capabilities() []PoolCapability {
	switch s.Type {
	case PoolRBD:
		return []PoolCapability{CapShared, CapFencing}
	case PoolShared:
		return []PoolCapability{CapShared, CapSnapshots, CapMoves, CapTPM}
	}
	return []PoolCapability{CapSnapshots, CapMoves, CapTPM}
}
