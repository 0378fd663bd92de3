// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package hypervisor

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/hypervisor/accel"
	"github.com/muster-vm/muster/hypervisor/argv"
	"github.com/muster-vm/muster/hypervisor/console"
	"github.com/muster-vm/muster/hypervisor/memory"
	"github.com/muster-vm/muster/internal/contain"
	"github.com/muster-vm/muster/internal/uefi"
	"github.com/muster-vm/muster/reconcile"
)

// Times and limits.
const (
	// QMPDeadline bounds one QMP command, AttachDeadline connecting to a QEMU.
	QMPDeadline    = 2 * time.Second
	AttachDeadline = 3 * time.Second
	// QuietTime is how long a QEMU that did not answer is left alone.
	QuietTime = 10 * time.Second
	// GuardDeadline bounds a call of the guard; a kill waits for the reaping.
	GuardDeadline = 5 * time.Second
	KillDeadline  = 15 * time.Second
	// PortDeadline bounds plugging or unplugging network cards.
	PortDeadline = 8 * time.Second
	// WriteDeadline bounds a transaction.
	WriteDeadline = 5 * time.Second
	// PowerButtonInterval is the pause between two presses of the ACPI power
	// button, StopTimeout when the user is told that the guest ignores it.
	PowerButtonInterval = 10 * time.Second
	StopTimeout         = 60 * time.Second
	// askedOffWindow is how long after the last press an end of the guest is
	// taken for its answer.
	askedOffWindow = 5 * time.Minute
	// MinRestart and MaxRestart bound the pause before a crashed QEMU is
	// started again; StableTime of running resets it.
	MinRestart = time.Second
	MaxRestart = 60 * time.Second
	StableTime = 60 * time.Second
	// ResyncInterval is the slow look at everything, for what no event told.
	ResyncInterval = 30 * time.Second
	// IORetry is the pause between two attempts to continue a guest that was
	// paused because the host's disk is full.
	IORetry = 30 * time.Second
	// PanicTime is how long the panic of a guest is shown at least. A guest may panic
	// and reset itself a hundred times in a second, and each would be two writes.
	PanicTime = 30 * time.Second
	// freshTime is how long a new QEMU may take to open its sockets before
	// somebody is told, attachRetry the pause between looks meanwhile.
	freshTime   = 2 * time.Second
	attachRetry = 20 * time.Millisecond
	// monitorLook is the pause between looks for the monitor of a QEMU that was
	// just started, monitorLate when it is looked at in any case.
	monitorLook = 2 * time.Millisecond
	monitorLate = 500 * time.Millisecond
	// lookSoon is the pause before another look at what has no event.
	lookSoon = 200 * time.Millisecond
	waitLook = 2 * time.Second
	// factsAttempts is how often a report of the facts is tried on fresh state.
	factsAttempts = 4
	// Workers of the loop.
	Workers = 8
	// maxLogTail is how much of QEMU's log goes into a status message.
	maxLogTail = 512
)

// ProcessState is where a guarded process is in its life.
type ProcessState string

// The states.
const (
	ProcessRunning ProcessState = "running"
	ProcessKilling ProcessState = "killing"
	ProcessExited  ProcessState = "exited"
)

// Reasons of an end that the hypervisor treats in their own way; with every
// other reason exit code and signal decide.
const (
	ReasonKill     = "kill request"
	ReasonLease    = "lease expired"
	ReasonStopping = "guard stopping"
)

// StartRequest asks the guard for one QEMU process.
type StartRequest struct {
	VM             string
	Epoch, Session uint64
	Protected      bool
	Argv, Env      []string
	Dir, LogPath   string
	// User is who it runs as; nil: as the guard itself.
	User *ProcessUser
}

// Process is what the guard knows of one VM.
type Process struct {
	VM        string
	Epoch     uint64
	PID       int
	Protected bool
	State     ProcessState
	// Reason, ExitCode and Signal say how it ended.
	Reason           string
	ExitCode, Signal int
	LogPath          string
	// UID is the user it runs as, 0 for the guard's own.
	UID int
}

// Guard starts and parents the QEMU processes.
type Guard interface {
	// Start begins a process unless the session's lease has lapsed or the VM
	// has one already. After an error without Refused() == true the process may
	// still begin, until a Kill that was called later has returned.
	Start(ctx context.Context, r StartRequest) (Process, error)
	// Kill sends SIGKILL and returns when the process is reaped. It is no
	// error if there is none.
	Kill(ctx context.Context, vm string) error
	// Protect says whether the process dies with the lease.
	Protect(ctx context.Context, vm string, on bool) error
	// List returns all processes, also ended ones until Forget or Start.
	List(ctx context.Context) ([]Process, error)
	// Forget drops the record of an ended process. It is no error if there is
	// none.
	Forget(ctx context.Context, vm string) error
}

// Lease tells whether this node may start VMs.
type Lease interface {
	// Current returns the session of the valid lease and the store revision
	// that a start must have seen; ok is false without a valid lease.
	Current() (session, revision uint64, ok bool)
}

// Volumes finds the files of volumes.
type Volumes interface {
	// Resolve returns a volume's path on this node and its format. The error
	// says what is missing if it is not ready or not reachable here.
	Resolve(v *configdb.View, project, name string) (path, format string, err error)
	// ResolveImage does the same for an image.
	ResolveImage(v *configdb.View, project, name string) (path, format string, err error)
	// Grant makes the file that Resolve named the user's, and lets the group
	// readers reach it. It is called before QEMU opens the file.
	Grant(ctx context.Context, v *configdb.View, project, name string, uid, gid, readers int) error
	// Release frees the volume of what processes hold of it that have ended, and locks
	// them out if they have not: nobody but the caller may use it now.
	Release(ctx context.Context, v *configdb.View, project, name string) error
	// GrantImage lets the group readers reach an image, which it may read.
	GrantImage(ctx context.Context, v *configdb.View, project, name string, readers int) error
}

// Ports are the places of network cards in this node's virtual switch.
type Ports interface {
	// Plug makes the tap device of a VM's network card, by its index in
	// spec.nics, and returns its name when the switch has it; offload is whether
	// the switch takes frames with offloaded checksums. It may be repeated.
	Plug(ctx context.Context, vm api.VM, nic int) (device string, offload bool, err error)
	// Unplug removes all of a VM. It is no error if there is none.
	Unplug(ctx context.Context, vmID string) error
	// UnplugCard removes what belongs to one slot of a VM. It is no error if
	// there is nothing.
	UnplugCard(ctx context.Context, vmID string, slot int) error
}

// Config of New.
type Config struct {
	DB               configdb.DB
	NodeID, NodeName string
	// RunDir holds the sockets: it should be on a file system in memory, be
	// private to root, and its path be at most MaxRunDir bytes.
	RunDir  string
	Guard   Guard
	Lease   Lease
	Volumes Volumes
	// halts is api.HaltsToMigrate; tests of post-copy have no QEMU that needs none.
	halts func(accelerator api.Accelerator, qemuMajor int) bool
	// Keys may be nil: then VMs have no volumes in pools of type rbd.
	Keys PoolKeys
	// Ports may be nil: then VMs with network cards do not start.
	Ports Ports
	// Snapshots may be nil: then disks of stopped VMs have none.
	Snapshots DiskSnapshots
	// Quiesce is by the guest agents that this module talks to, if it is nil.
	Quiesce Quiesce
	// Users are the users that VMs run as; with none they run as the daemon's own.
	Users Users
	// Limits may be nil: then limits of VMs are not put into force.
	Limits Limits
	// Streams may be nil: then VMs cannot be migrated.
	Streams Streams
	// Copies may be nil: then VMs move on shared storage only.
	Copies Copies
	// QEMU is the program; qemu-system-x86_64 when empty.
	QEMU string
	// FirmwareDirs have the descriptors of UEFI firmwares; uefi.Dirs() when nil.
	FirmwareDirs []string
	// SysRoot is where proc, sys and dev are; "/" when empty.
	SysRoot string
	Log     *slog.Logger
	// Now is the clock; time.Now when nil.
	Now func() time.Time
	// HostMemory tells total and available memory of the host; its kernel is asked
	// when nil.
	HostMemory func() (total, available api.Size)
	// HostPressure tells how much of the last ten seconds, in percent, the host
	// waited for memory, if its kernel says so; that is asked when nil.
	HostPressure func() (stall float64, ok bool)
	// FactsChanged, if set, is called when Facts has news. It must not block.
	FactsChanged func()
}

// MaxRunDir is the longest RunDir with which the sockets' paths fit.
const MaxRunDir = argv.MaxSocketPath - len("/vm/0123456789ab/serial")

// Hypervisor is the module. Make it with New, then Run it once.
type Hypervisor struct {
	cfg   Config
	log   *slog.Logger
	loop  *reconcile.Loop
	procs processTable
	facts factFinder
	asked asked         // of the goroutine that reports facts
	tell  chan struct{} // asks for a report of the facts
	users userTable
	rests rests

	// gate is held for reading from the last look at this node's fences until the
	// guard has answered a start.
	gate sync.RWMutex

	mu        sync.Mutex
	running   bool
	runCtx    context.Context // of Run; only for goroutines that Run waits for
	tasks     *contain.Group  // of Run
	instances map[string]*instance
	gates     map[string]*gate // of VMs that come over several connections
	strangers map[string]Process
	starting  map[string]api.Size // VM that waits for room → what it needs
	waiting   map[string]string   // volume being deleted → VM that waits for it
	// caughtUpAt is the first revision of which this daemon knew that it was not late; 0: not yet.
	caughtUpAt uint64
	awaiting   map[string]bool // VMs whose start waits for others
	// leaseSince is when the session began, as far as this daemon knows.
	leaseSession uint64
	leaseSince   time.Time

	hurry     chan struct{} // wakes the memory controller
	pressure  memory.Pressure
	agentWake chan struct{} // asks for a look at the guest agents
}

// New checks the configuration and returns a hypervisor that does nothing until
// Run.
func New(cfg Config) (*Hypervisor, error) {
	if !filepath.IsAbs(cfg.RunDir) || len(cfg.RunDir) > MaxRunDir {
		return nil, api.Errorf(api.CodeInvalid, "run directory %q must be absolute and at most %d bytes, or the paths of its sockets get too long", cfg.RunDir, MaxRunDir)
	}
	if cfg.DB == nil || cfg.Guard == nil || cfg.Lease == nil || cfg.Volumes == nil || cfg.NodeID == "" {
		return nil, errors.New("configure the hypervisor: DB, Guard, Lease, Volumes and NodeID are needed")
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.halts == nil {
		cfg.halts = api.HaltsToMigrate
	}
	if cfg.SysRoot == "" {
		cfg.SysRoot = "/"
	}
	if cfg.FirmwareDirs == nil {
		cfg.FirmwareDirs = uefi.Dirs()
	}
	if cfg.HostMemory == nil {
		cfg.HostMemory = hostMeminfo
	}
	if cfg.HostPressure == nil {
		cfg.HostPressure = hostPressure
	}
	h := &Hypervisor{
		cfg: cfg, log: cfg.Log, procs: newProcessTable(cfg.Guard), users: newUserTable(cfg.Users),
		instances: map[string]*instance{}, gates: map[string]*gate{}, strangers: map[string]Process{}, waiting: map[string]string{},
		tell: make(chan struct{}, 1), agentWake: make(chan struct{}, 1),
		starting: map[string]api.Size{}, awaiting: map[string]bool{}, hurry: make(chan struct{}, 1),
	}
	if h.cfg.Quiesce == nil {
		h.cfg.Quiesce = h
	}
	h.loop = reconcile.New(reconcile.Config{
		Name: "hypervisor", DB: cfg.DB, Reconcile: h.reconcile, Workers: Workers, Log: cfg.Log,
		Sources: []reconcile.Source{
			{Prefix: configdb.VMs.SpecPrefix(), IDs: idsOf(configdb.VMs.IDOf)},
			{Prefix: configdb.VMs.StatusPrefix(), IDs: idsOf(configdb.VMs.IDOf)},
			{Prefix: configdb.VMs.StatusPrefix(), IDs: h.heldBackVMs},
			{Prefix: configdb.Bindings.SpecPrefix(), IDs: idsOf(configdb.Bindings.IDOf)},
			{Prefix: configdb.Operations.SpecPrefix(), IDs: idsOf(configdb.Operations.IDOf)},
			{Prefix: configdb.Drills.SpecPrefix(), IDs: idsOf(configdb.Drills.IDOf)},
			{Prefix: configdb.Drills.StatusPrefix(), IDs: idsOf(configdb.Drills.IDOf)},
			{Prefix: configdb.SavedStates.SpecPrefix(), IDs: idsOf(configdb.SavedStates.IDOf)},
			{Prefix: configdb.Operations.StatusPrefix(), IDs: idsOf(configdb.Operations.IDOf)},
			{Prefix: configdb.Arrivals.StatusPrefix(), IDs: idsOf(configdb.Arrivals.IDOf)},
			{Prefix: configdb.Volumes.SpecPrefix(), IDs: h.volumeUsers},
			{Prefix: configdb.Volumes.StatusPrefix(), IDs: h.volumeUsers},
			{Prefix: configdb.Images.SpecPrefix(), IDs: imageSources},
			{Prefix: configdb.Images.StatusPrefix(), IDs: imageSources},
			{Prefix: configdb.Nodes.SpecKey(cfg.NodeID), IDs: h.nodeChanged},
		},
	})
	return h, nil
}

func idsOf(idOf func(string) (string, bool)) func(*configdb.View, configdb.Change) []string {
	return func(_ *configdb.View, c configdb.Change) []string {
		id, ok := idOf(c.Key)
		if !ok {
			return nil
		}
		return []string{id}
	}
}

// volumeUsers names the VMs that attach a volume or wait for its end.
func (h *Hypervisor) volumeUsers(v *configdb.View, c configdb.Change) []string {
	id, ok := configdb.Volumes.IDOf(c.Key)
	if !ok {
		return nil
	}
	var out []string
	for _, by := range configdb.Volumes.Referrers(v, id) {
		if vm, ok := strings.CutPrefix(by, string(api.KindVM)+"/"); ok {
			out = append(out, vm)
		}
	}
	if vol, err := configdb.Volumes.Get(v, id); err == nil && vol.Spec.SourceSnapshot != "" {
		// The VM that it is copied from may have kept a snapshot for it.
		if snap, err := configdb.Snapshots.Get(v, vol.Spec.SourceSnapshot); err == nil {
			out = append(out, snap.Spec.VMID)
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if vm, ok := h.waiting[id]; ok {
		out = append(out, vm)
		if c.Deleted {
			delete(h.waiting, id)
		}
	}
	return out
}

// imageSources names the VM that may have kept a snapshot for an image to be copied
// from.
func imageSources(v *configdb.View, c configdb.Change) []string {
	id, _ := configdb.Images.IDOf(c.Key)
	img, err := configdb.Images.Get(v, id)
	if err != nil || img.Spec.SourceSnapshot == "" {
		return nil
	}
	snap, err := configdb.Snapshots.Get(v, img.Spec.SourceSnapshot)
	if err != nil {
		return nil
	}
	return []string{snap.Spec.VMID}
}

// nodeChanged looks whether the administrator chose another accelerator.
func (h *Hypervisor) nodeChanged(v *configdb.View, _ configdb.Change) []string {
	h.detect(h.wantedAccelerator(v))
	return nil
}

// Run works until the context ends, which is not an error. VMs go on running.
func (h *Hypervisor) Run(ctx context.Context) error {
	if err := os.MkdirAll(filepath.Join(h.cfg.RunDir, "vm"), 0o700); err != nil {
		return fmt.Errorf("make the run directory: %w", err)
	}
	h.mu.Lock()
	if h.running {
		h.mu.Unlock()
		return errors.New("the hypervisor runs already")
	}
	h.tasks, ctx = contain.NewGroup(ctx)
	h.running, h.runCtx = true, ctx
	h.mu.Unlock()
	h.detect(h.wantedAccelerator(h.cfg.DB.Local()))
	h.spawn(h.resync)
	h.spawn(h.balance)
	h.spawn(h.watchAgents)
	err := h.loop.Run(ctx)
	h.tasks.Cancel()
	h.mu.Lock()
	h.running = false
	all := h.instances
	h.instances = map[string]*instance{}
	h.mu.Unlock()
	for _, in := range all {
		in.detach()
	}
	return errors.Join(err, h.tasks.Wait())
}

// spawn starts a goroutine that Run waits for.
func (h *Hypervisor) spawn(f func(ctx context.Context)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.running {
		ctx := h.runCtx
		h.tasks.Go(func() { f(ctx) })
	}
}

// resync looks at everything now and then.
func (h *Hypervisor) resync(ctx context.Context) {
	t := time.NewTicker(ResyncInterval)
	defer t.Stop()
	for {
		h.Wake()
		select {
		case <-t.C:
			if h.facts.get().Problem != "" {
				h.facts.invalidate() // somebody may have mended it
				h.detect(h.wantedAccelerator(h.cfg.DB.Local()))
			}
		case <-ctx.Done():
			return
		}
	}
}

// Wake looks at every VM that is bound here or that the guard knows. Call it
// when the lease was regained or the connection to the guard was made anew.
func (h *Hypervisor) Wake() {
	h.procs.invalidate()
	v := h.cfg.DB.Local()
	bindings, err := configdb.Bindings.List(v)
	if err != nil {
		h.log.Error("a binding cannot be read", "err", err)
	}
	for i := range bindings {
		if bindings[i].Spec.NodeID == h.cfg.NodeID {
			h.loop.Enqueue(bindings[i].Meta.ID)
		}
	}
	h.mu.Lock()
	ctx := h.runCtx
	h.mu.Unlock()
	if ctx == nil {
		return
	}
	procs, err := h.procs.get(ctx)
	if err != nil {
		h.log.Warn("the guard does not answer", "err", err)
	}
	for id := range procs {
		h.loop.Enqueue(id)
	}
	for _, id := range h.procs.tpmVMs() {
		h.loop.Enqueue(id)
	}
}

// GuardEvent tells that the guard reported something about a VM. It does not
// block.
func (h *Hypervisor) GuardEvent(vm string) {
	h.procs.invalidate()
	if of, ok := isTPM(vm); ok {
		vm = of
	}
	h.loop.Enqueue(vm)
}

// Console returns the serial console of a VM that runs on this node.
func (h *Hypervisor) Console(vmID string) (*console.Console, error) {
	h.mu.Lock()
	in := h.instances[vmID]
	h.mu.Unlock()
	if in != nil {
		if c := in.openConsole(); c != nil {
			return c, nil
		}
	}
	name := vmID
	if vm, err := configdb.VMs.Get(h.cfg.DB.Local(), vmID); err == nil {
		name = vm.Meta.Name
	}
	return nil, api.Errorf(api.CodeRefused, "vm %s does not run on node %s now, so it has no console; see muster vm show %s", name, h.cfg.NodeName, name)
}

// paths are the files of one VM.
type paths struct {
	dir, qmp, agent, serial, serialLog, qemuLog, vnc, shot, seed, tpm, tpmLog, hardware string
	// Of a migration; the mark is not in dir, which belongs to the VM's user.
	out, in, nbd, nbdOut, mark string
}

// pathsOf shortens the ID by its hash, because paths of sockets are limited.
func (h *Hypervisor) pathsOf(id string) paths {
	sum := sha256.Sum256([]byte(id))
	short := hex.EncodeToString(sum[:6])
	dir := filepath.Join(h.cfg.RunDir, "vm", short)
	return paths{
		dir: dir, qmp: filepath.Join(dir, "qmp"), agent: filepath.Join(dir, "ga"), serial: filepath.Join(dir, "serial"),
		serialLog: filepath.Join(dir, "log"), qemuLog: filepath.Join(dir, "qemu.log"),
		vnc: filepath.Join(dir, "vnc"), shot: filepath.Join(dir, "shot"), seed: filepath.Join(dir, "seed.iso"),
		tpm: filepath.Join(dir, "tpm"), tpmLog: filepath.Join(dir, "swtpm.log"),
		hardware: filepath.Join(dir, "hardware.json"),
		out:      filepath.Join(dir, "out"), in: filepath.Join(dir, "in"), nbd: filepath.Join(dir, "nbd"), nbdOut: filepath.Join(dir, "nbdout"),
		mark: filepath.Join(h.cfg.RunDir, markDir, short),
	}
}

// AgentSocket is the path of the guest agent's socket of a running VM.
func (h *Hypervisor) AgentSocket(vmID string) string { return h.pathsOf(vmID).agent }

func (h *Hypervisor) wantedAccelerator(v *configdb.View) api.Accelerator {
	n, err := configdb.Nodes.Get(v, h.cfg.NodeID)
	if err != nil || n.Spec.Accelerator == "" {
		return api.AccelAuto
	}
	return n.Spec.Accelerator
}

// detect finds out QEMU and the accelerator in the background, unless that is
// known or under way, and wakes the VMs that wait for it.
func (h *Hypervisor) detect(want api.Accelerator) {
	if !h.facts.begin(want) {
		return
	}
	h.spawn(func(ctx context.Context) {
		r := accel.Detect(ctx, accel.Config{Binary: h.cfg.QEMU, Want: want, Dir: h.cfg.RunDir, Log: h.log, User: h.users.prober()})
		if ctx.Err() != nil {
			return
		}
		h.facts.set(want, r)
		h.log.Info("accelerator chosen", "accelerator", r.Accelerator, "reason", r.Reason, "qemu", r.Version, "problem", r.Problem)
		h.factsChanged()
		select {
		case h.tell <- struct{}{}:
		default:
		}
		h.Wake()
	})
}

func (h *Hypervisor) factsChanged() {
	if h.cfg.FactsChanged != nil {
		h.cfg.FactsChanged()
	}
}
