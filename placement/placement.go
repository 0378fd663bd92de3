// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package placement

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

const (
	// OverheadPerVM is what QEMU itself takes beside the guest's memory.
	OverheadPerVM = api.OverheadPerVM
	// Weights of the score, in which 1000 is best: the fraction of memory that
	// stays free counts three times as much as few VMs.
	weightMemory = 3
	weightCount  = 1
)

// Request asks for a node.
type Request struct {
	VM api.VM
	// Exclude maps IDs of nodes that must not be chosen to the reason.
	Exclude map[string]string
	// Copied are the IDs of volumes that are copied to the node if it has their
	// pool.
	Copied []string
	// Only is the name of the one node to consider, an explicit choice.
	Only string
	// Idle: it is bound there and does not run, so that memory is not asked for.
	Idle bool
}

// Decision is the chosen node.
type Decision struct {
	NodeID string
	Node   string // its name
}

// Choose returns the best node that fits. It fails with code unplaceable and
// one reason per node if none does, and with code not_found or refused if the
// request names something that does not exist or does not go together.
//
// For a VM that is bound already and about to start again, ask with Only set
// to its node: its own share is not counted twice.
func Choose(v *configdb.View, r Request) (Decision, error) {
	f, err := load(v, r.VM.Meta.ID)
	if err != nil {
		return Decision{}, fmt.Errorf("place vm %q: %w", r.VM.Meta.Name, err)
	}
	f.copied = r.Copied
	needs, m, err := f.asks(v, &r.VM)
	if err != nil {
		return Decision{}, err
	}
	return f.choose(r, needs, m)
}

// asks is what the VM needs of a node.
func (f *fleet) asks(v *configdb.View, vm *api.VM) ([]need, *machine, error) {
	needs, err := f.needs(v, vm)
	if err != nil {
		return nil, nil, err
	}
	m, err := f.machine(v, vm)
	return needs, m, err
}

// choose is the one rule by which a node is chosen.
func (f *fleet) choose(r Request, needs []need, m *machine) (Decision, error) {
	var best *host
	var bestScore, bestTie uint64
	var reasons []string
	found := r.Only == ""
	for _, h := range f.hosts {
		if r.Only != "" && h.node.Meta.Name != r.Only {
			continue
		}
		found = true
		why := h.unfit(r, needs)
		if h.canRun() {
			why = append(append(why, m.lacking(h)...), m.savedLacking(h)...)
		}
		if len(why) > 0 {
			reasons = append(reasons, h.node.Meta.Name+": "+strings.Join(why, ", "))
			continue
		}
		score, tie := h.score(&r.VM), tieBreak(r.VM.Meta.ID, h.node.Meta.ID)
		if best == nil || score > bestScore || (score == bestScore && tie > bestTie) {
			best, bestScore, bestTie = h, score, tie
		}
	}
	switch {
	case best != nil:
		return Decision{NodeID: best.node.Meta.ID, Node: best.node.Meta.Name}, nil
	case !found:
		return Decision{}, api.Errorf(api.CodeNotFound, "node %q does not exist", r.Only)
	case len(reasons) == 0:
		reasons = []string{"the cluster has no nodes"}
	}
	e := api.Errorf(api.CodeUnplaceable, "no node can take vm %q: %s", r.VM.Meta.Name, strings.Join(reasons, "; "))
	if len(f.hosts) > 0 && f.tooSmall(r.VM.Spec.Memory) {
		e.Field = "spec.memory"
	}
	return Decision{}, e
}

// tooSmall reports that no node could take a VM of a size even if it ran nothing
// else.
func (f *fleet) tooSmall(memory api.Size) bool {
	return !slices.ContainsFunc(f.hosts, func(h *host) bool {
		return h.node.Spec.Role != api.RoleWitness && memory+OverheadPerVM <= h.node.Status.Memory-h.node.Spec.ReservedMemory
	})
}

// Reserve makes concurrent decisions for one node conflict. v must be the view
// on which the node was chosen. It also requires that the node's spec
// (maintenance, reserved memory) is still the same.
func Reserve(v *configdb.View, tx *configdb.Txn, nodeID string) {
	used := api.Size(0)
	if f, err := load(v, ""); err == nil {
		for _, h := range f.hosts {
			if h.node.Meta.ID == nodeID {
				used = h.used
			}
		}
	}
	reserve(v, tx, nodeID, used)
}

// fleet is what placement knows of the cluster.
type fleet struct {
	hosts []*host // in order of name
	pools map[string]api.Pool
	// copied are volumes whose place does not matter.
	copied []string
}

// host is one node with its load.
type host struct {
	node  api.Node
	used  api.Size // by the VMs bound to it
	vms   int
	bound []*api.VM                      // those that use memory, but for the one to be placed
	state map[string]api.PoolStateStatus // by pool ID
	net   *api.SwitchStateStatus         // nil: not reported
}

// load reads the cluster; the VM with ID without is left out of the sums.
func load(v *configdb.View, without string) (*fleet, error) {
	bindings, err := configdb.Bindings.List(v)
	if err != nil {
		return nil, err
	}
	return loadWith(v, bindings, func(id string) (api.VM, error) { return configdb.VMs.Get(v, id) }, without)
}

// loadWith is load for a caller who has read bindings and VMs.
func loadWith(v *configdb.View, bindings []api.Binding, vmOf func(id string) (api.VM, error), without string) (*fleet, error) {
	nodes, err := configdb.Nodes.List(v)
	pools, err2 := configdb.Pools.List(v)
	states, err3 := configdb.PoolStates.List(v)
	switches, err4 := configdb.SwitchStates.List(v)
	if err := errors.Join(err, err2, err3, err4); err != nil {
		return nil, err
	}
	f := &fleet{pools: map[string]api.Pool{}}
	byID := map[string]*host{}
	for _, n := range nodes {
		h := &host{node: n, state: map[string]api.PoolStateStatus{}}
		f.hosts, byID[n.Meta.ID] = append(f.hosts, h), h
	}
	slices.SortFunc(f.hosts, func(a, b *host) int { return strings.Compare(a.node.Meta.Name, b.node.Meta.Name) })
	for _, p := range pools {
		f.pools[p.Meta.Name] = p
	}
	for i := range switches {
		if h := byID[switches[i].Spec.NodeID]; h != nil {
			h.net = &switches[i].Status
		}
	}
	for _, st := range states {
		if h := byID[st.Spec.NodeID]; h != nil {
			h.state[st.Spec.PoolID] = st.Status
		}
	}
	coming, err := arriving(v)
	if err != nil {
		return nil, err
	}
	for _, b := range bindings {
		h := byID[b.Spec.NodeID]
		if to := byID[coming[b.Meta.ID]]; to != nil && to != h && b.Meta.ID != without {
			// It takes memory at both ends until the operation is over.
			vm, err := vmOf(b.Meta.ID)
			if err != nil && api.CodeOf(err) != api.CodeNotFound {
				return nil, err
			}
			to.vms++
			to.used += vm.Status.HeldMemory(&vm.Spec) + OverheadPerVM
			to.bound = append(to.bound, &vm)
		}
		if h == nil || b.Meta.ID == without {
			continue
		}
		vm, err := vmOf(b.Meta.ID)
		if api.CodeOf(err) == api.CodeNotFound && err != nil {
			continue
		}
		if err != nil {
			return nil, err // an unreadable VM may use memory: do not guess
		}
		h.vms++
		if usesMemory(&vm) || reverting(v, b.Meta.ID) {
			h.used += vm.Status.HeldMemory(&vm.Spec) + OverheadPerVM
			h.bound = append(h.bound, &vm)
		}
	}
	return f, nil
}

// arriving maps the VMs that are being migrated to the IDs of their targets.
func arriving(v *configdb.View) (map[string]string, error) {
	ops, err := configdb.Operations.List(v)
	out := map[string]string{}
	for i := range ops {
		if m := ops[i].Spec.Migration; m != nil {
			out[ops[i].Meta.ID] = m.NodeID
		}
	}
	return out, err
}

// usesMemory reports whether a bound VM takes memory now or is about to.
func usesMemory(vm *api.VM) bool {
	if vm.Spec.Power != api.PowerStopped && vm.Spec.Power != api.PowerSuspended {
		return true
	}
	switch vm.Status.Phase {
	case api.VMStarting, api.VMRunning, api.VMPaused, api.VMStopping:
		return true
	}
	return false
}

// canRun reports whether the node is one whose machine is worth a look.
func (h *host) canRun() bool {
	return h.node.Spec.Role != api.RoleWitness && h.node.Status.Phase == api.NodeReady && h.node.Status.Fencing == "" && h.node.Status.CutOff == nil
}

// reverting reports whether a stopped VM is being reverted to a snapshot: it may
// be about to run.
func reverting(v *configdb.View, vmID string) bool {
	op, err := configdb.Operations.Get(v, vmID)
	return err == nil && op.Spec.Action == api.ActionVMRevert
}

// free is what VMs may still take.
func (h *host) free() api.Size {
	return h.node.Status.Memory - h.node.Spec.ReservedMemory - h.used
}

// unfit returns why a node cannot take the VM; empty if it can.
func (h *host) unfit(r Request, needs []need) (why []string) {
	n := &h.node
	if reason, ok := r.Exclude[n.Meta.ID]; ok {
		if reason == "" {
			reason = "excluded"
		}
		why = append(why, reason)
	}
	switch {
	case n.Spec.Role == api.RoleWitness:
		return append(why, "is a witness and runs no VMs")
	case n.Status.Fencing != "":
		return append(why, "is silent and is being switched off")
	case n.Status.CutOff != nil:
		return append(why, "is cut off from the network")
	case n.Status.Phase != api.NodeReady:
		phase := string(n.Status.Phase)
		if phase == "" {
			phase = "not ready"
		}
		return append(why, "is "+phase)
	}
	if n.Spec.Maintenance || n.Meta.Deleting() {
		why = append(why, "maintenance")
	}
	if c, ok := api.FindCondition(n.Status.Conditions, api.ConditionConfigDB); ok && !c.OK {
		why = append(why, c.Message)
	}
	if n.Status.QEMUVersion == "" {
		why = append(why, "QEMU cannot be used there")
	}
	if want, free := r.VM.Status.HeldMemory(&r.VM.Spec)+OverheadPerVM, h.free(); want > free && !r.Idle {
		why = append(why, fmt.Sprintf("needs %s, has %s free", want, max(free, 0)))
	}
	for _, reason := range h.unconnected(&r.VM) {
		if !slices.Contains(why, reason) {
			why = append(why, reason)
		}
	}
	for _, need := range needs {
		if reason := need.unmet(h); reason != "" && !slices.Contains(why, reason) {
			why = append(why, reason)
		}
	}
	return why
}

// unconnected returns why networks of the VM are not usable on the node.
func (h *host) unconnected(vm *api.VM) (why []string) {
	for _, nic := range vm.Spec.NICs {
		if h.net == nil {
			return []string{"has not reported on its virtual switch"}
		}
		ok, reason := h.net.Realised(nic.Network)
		switch {
		case !h.net.Ready:
			return []string{"virtual switch: " + reason}
		case !ok:
			why = append(why, fmt.Sprintf("network %q: %s", nic.Network, reason))
		}
	}
	return why
}

// score is higher for a better node: weightMemory × free fraction after the
// placement + weightCount × few VMs, each out of 1000.
func (h *host) score(vm *api.VM) uint64 {
	total := max(h.node.Status.Memory-h.node.Spec.ReservedMemory, 1)
	left := max(h.free()-vm.Spec.Memory-OverheadPerVM, 0)
	// In MiB, so that the product cannot overflow.
	memory := uint64(left/api.MiB) * 1000 / uint64(max(total/api.MiB, 1))
	return weightMemory*memory + weightCount*1000/uint64(1+h.vms)
}

// tieBreak spreads equal nodes by a stable hash.
func tieBreak(vmID, nodeID string) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(vmID + "/" + nodeID))
	// FNV of strings that differ at their end differs mostly in low bits.
	sum := binary.BigEndian.AppendUint64(nil, h.Sum64())
	h.Reset()
	_, _ = h.Write(sum)
	return h.Sum64()
}

// need is what one disk asks of a node.
type need struct {
	pool api.Pool
	// pin is the name of the only node that has the data; "" for any.
	pin, what string
}

func (n need) unmet(h *host) string {
	if n.pin != "" && h.node.Meta.Name != n.pin {
		return n.what + " is on node " + n.pin
	}
	if f, ok := h.node.Status.FenceOf(n.pool.Meta.ID); ok {
		return fmt.Sprintf("is locked out of pool %s until nothing of what ran there is left", f.Pool)
	}
	st, ok := h.state[n.pool.Meta.ID]
	switch {
	case !ok:
		return fmt.Sprintf("has no pool %q", n.pool.Meta.Name)
	case !st.Ready:
		return fmt.Sprintf("pool %q is not ready there (%s)", n.pool.Meta.Name, st.Reason)
	}
	return ""
}

// needs turns the VM's disks into demands.
func (f *fleet) needs(v *configdb.View, vm *api.VM) ([]need, error) {
	seen := map[string]need{}
	for i, d := range vm.Spec.Disks {
		n, err := f.need(v, vm, d, fmt.Sprintf("spec.disks[%d]", i))
		if err != nil {
			return nil, err
		}
		seen[n.pool.Meta.ID+"/"+n.pin] = n
	}
	machine, err := f.machineNeeds(v, vm)
	if err != nil {
		return nil, err
	}
	for _, n := range machine {
		seen[n.pool.Meta.ID+"/"+n.pin] = n
	}
	var out []need
	for _, k := range slices.Sorted(maps.Keys(seen)) {
		out = append(out, seen[k])
	}
	return out, nil
}

func (f *fleet) need(v *configdb.View, vm *api.VM, d api.VMDisk, field string) (need, error) {
	if d.Volume != "" {
		vol, err := configdb.Volumes.Find(v, vm.Meta.Project, d.Volume)
		if err == nil {
			return f.volumeNeed(vol, field)
		}
		if api.CodeOf(err) != api.CodeNotFound || (d.Image == "" && d.Size == 0) {
			return need{}, err // not found, and not a name for a new disk either
		}
	}
	pool, err := f.pool(d.Pool, field+".pool")
	if err != nil || d.Image == "" {
		return need{pool: pool}, err
	}
	img, err := configdb.Images.Find(v, vm.Meta.Project, d.Image)
	if err != nil {
		return need{}, err
	}
	n := need{pool: pool, what: fmt.Sprintf("image %q", img.Meta.Name)}
	if img.Spec.Pool != pool.Meta.Name {
		return n, &api.Error{Code: api.CodeRefused, Field: field + ".pool", Detail: fmt.Sprintf("image %q is in pool %q, and a linked clone must be in the pool of its image; choose that pool", img.Meta.Name, img.Spec.Pool)}
	}
	if img.Meta.Deleting() {
		return n, &api.Error{Code: api.CodeRefused, Field: field + ".image", Detail: fmt.Sprintf("image %q is being deleted", img.Meta.Name)}
	}
	if pool.Spec.Type == api.PoolDir {
		n.pin = img.Spec.Node
	}
	return n, nil
}

func (f *fleet) volumeNeed(vol api.Volume, field string) (need, error) {
	pool, err := f.pool(vol.Spec.Pool, field+".volume")
	if err != nil {
		return need{}, err
	}
	n := need{pool: pool, what: fmt.Sprintf("volume %q", vol.Meta.Name)}
	if vol.Meta.Deleting() {
		return n, &api.Error{Code: api.CodeRefused, Field: field + ".volume", Detail: fmt.Sprintf("volume %q is being deleted", vol.Meta.Name)}
	}
	if pool.Spec.Type == api.PoolDir && !slices.Contains(f.copied, vol.Meta.ID) {
		n.pin = vol.Spec.Node
	}
	return n, nil
}

func (f *fleet) pool(name, field string) (api.Pool, error) {
	if name == "" {
		name = api.LocalPool
	}
	p, ok := f.pools[name]
	if !ok {
		return p, &api.Error{Code: api.CodeNotFound, Field: field, Detail: fmt.Sprintf("pool %q does not exist", name)}
	}
	return p, nil
}
