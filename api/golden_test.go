// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the golden files anew")

var goldenTime = time.Date(2026, 2, 3, 4, 5, 6, 789, time.UTC)

func goldenMeta(k Kind) Meta {
	deleting := goldenTime.Add(time.Hour)
	return Meta{
		ID: "0193c0de-0000-7000-8000-000000000001", Kind: k, Name: "web1", Project: "default", Owner: "vm/0193c0de-0000-7000-8000-000000000002",
		Labels: map[string]string{"tier": "front", "app": "shop"}, Revision: 12, StatusRevision: 13, Generation: 3,
		CreatedAt: goldenTime, DeletingAt: &deleting, Finalizers: []string{"hypervisor", "storage"},
	}
}

type goldens struct {
	cluster    Cluster
	node       Node
	vm         VM
	binding    Binding
	operation  Operation
	arrival    Arrival
	evacuation Evacuation
	drill      Drill
	reboot     Reboot
	rolling    RollingReboot
	image      Image
	volume     Volume
	pool       Pool
	poolState  PoolState
	task       Task
	token      Token
	snapshot   Snapshot
	saved      SavedState
}

// goldenObjects has every field of every kind set, so that a renamed or lost
// field shows.
func goldenObjects() goldens {
	cond := []Condition{{Type: "Ready", OK: true, Reason: "Up", Message: "all is <well> & good", Since: goldenTime}}
	state := PoolStateStatus{Node: "n1", Ready: true, Reason: "r", Notes: "n", Stamp: "stamp", Addresses: []string{"10.0.0.1"}, HostBoot: "b", Total: TiB, Free: GiB}
	at := goldenTime
	return goldens{
		cluster: Cluster{Meta: goldenMeta(KindCluster), Spec: ClusterSpec{
			CACert: "PEM\n", SealedCAKey: []byte{0, 1, 255}, Life: 1, CertificateSeconds: 3600,
			Gossip:       &GossipKeys{Primary: []byte{2}, Next: []byte{3}, Previous: []byte{4}, Removed: 5},
			Rotation:     &CARotation{Phase: CATrust, CACert: "PEM2\n", SealedCAKey: []byte{2}, Bridge: "PEM3\n", Actor: "me", StartedAt: goldenTime},
			History:      HistorySettings{MaxAgeSeconds: 7200, MaxBytes: 2 * MiB},
			HA:           HASettings{Failures: 2, Admission: AdmissionRefuse, StorageHeartbeat: HeartbeatOff},
			RestoredFrom: &Origin{ClusterID: "c", Cluster: "old", Life: 2, Revision: 3, Time: goldenTime},
			Backup:       BackupSettings{EveryMinutes: 60, Keep: 3, Disabled: true},
			FeatureLevel: 2, FeatureLevelHold: true,
		}},
		node: Node{
			Meta: goldenMeta(KindNode),
			Spec: NodeSpec{Address: "10.0.0.1:7600", Role: RoleVoter, Maintenance: true, Accelerator: AccelTCG, ReservedMemory: GiB, MigrationBandwidth: MiB},
			Status: NodeStatus{
				ObservedGeneration: 3, Phase: NodeReady, Version: "0.1", FeatureLevels: &FeatureLevels{Min: 1, Max: 2}, BootID: "b", HostBoot: "h", Absence: &Absence{Action: RebootHost, Since: goldenTime, Until: &at}, LostAt: &at, LostTerm: 4, LostAction: "a", Failover: "l", Fencing: "f", CutOff: &CutOff{Since: goldenTime, Isolated: true}, Stopping: true, StorageFences: []StorageFence{{ID: "f", PoolID: "p", Pool: "ceph", Reason: "r", Term: 4, BeganAt: goldenTime, InForceAt: &at, Addresses: []string{"10.0.0.1"}, Epoch: 7, Owners: []string{"10.0.0.1:0/1"}, Failover: "l"}}, SystemUUID: "u", Accelerator: AccelTCG,
				AcceleratorReason: "asked for", QEMUVersion: "7.2", GuardLevel: "softdog", CPUs: 8, Memory: 32 * GiB, Message: "m", Conditions: cond,
				Certificate: &CertificateStatus{
					Serial: "a1", NotBefore: goldenTime, NotAfter: goldenTime, RenewsAt: goldenTime, Signer: "f1", Trusts: []string{"f1", "f2"}, Message: "m",
				},
			},
		},
		vm: VM{
			Meta: goldenMeta(KindVM),
			Spec: goldenMachine(VMSpec{
				CPUs: 2, Memory: GiB, Disks: []VMDisk{{Volume: "v", Image: "i", Size: 10 * GiB, Pool: "local", Slot: 1, Limit: DiskLimit{IOPS: 1, IOPSRead: 2, IOPSWrite: 3, BPS: 4, BPSRead: 5, BPSWrite: 6, Burst: 7, BurstSeconds: 8}}},
				NICs:    []VMNIC{{Network: "lan", MAC: "52:54:00:12:34:56", Address: "10.0.0.5", Slot: 2, Link: LinkDown, Limit: NICLimit{BPSIn: MiB, BPSOut: 2 * MiB, Burst: 3, BurstSeconds: 4}}},
				MaxCPUs: 8, MaxMemory: 4 * GiB, MemoryMin: 512 * MiB, Boot: &VMBoot{Memory: GiB, MaxMemory: 4 * GiB, MaxCPUs: 8, DiskPorts: 4, NICPorts: 2, Queues: 2, Cards: []VMCard{{Slot: 2, MTU: 1450, ROM: true}}},
				HA: HARestart, Recovery: &VMRecovery{Priority: PriorityHigh, StartAttempts: 5, EndPolicy: EndPolicy{
					OnCrash: EndRestart, OnPanic: EndStop, OnWatchdog: EndPause, AgentSilenceSeconds: 60, OnAgentSilence: EndRestart, RestartLimit: 3, RestartWindowSeconds: 3600, RestartDelaySeconds: 10,
				}, StartAfter: StartAfter{After: []string{"db1"}, AfterCondition: AfterHealthy, AfterDelaySeconds: 10, AfterWaitSeconds: 300}, Failback: Failback{Failback: FailbackReturn, FailbackAfterMinutes: 30}}, Power: PowerRunning, ForceStop: true, Reboots: 5,
				Display: DisplayNone,
				CloudInit: &CloudInit{
					Format: CloudInitNoCloud, Hostname: "inside", User: "ops", SSHKeys: []string{"ssh-ed25519 AAAA me"}, Password: "p", PasswordHash: "$6$s$h",
					Network: CloudInitDHCP, UserData: "#cloud-config\n", VendorData: "#cloud-config\n",
				},
				Limits: &VMLimits{CPUWeight: 50, CPUMax: 150, CPUSet: "0-3,8", MemoryMax: 2 * GiB, IOWeight: 200},
			}),
			Status: VMStatus{
				ObservedGeneration: 3, Phase: VMRunning, Node: "n1", Epoch: 2, PID: 42, StartedAt: &at, Accelerator: "kvm", CPU: "host", Hardware: &VMSpec{CPUs: 2, Memory: GiB},
				Memory:       &VMMemory{Target: GiB, Reason: "r", Silent: true},
				Agent:        &VMAgent{Version: "7.2", Hostname: "inside", OS: "Debian 12", Addresses: []string{"10.0.0.5"}},
				StorageGuard: true, RebootsDone: 5, Crashes: 1, Message: "m", Conditions: cond,
				Tries:    &VMTries{Epoch: 2, Generation: 3, Begun: 4, Failed: 3, GivenUp: true, At: &at, Nodes: []string{"n"}, Rounds: 1},
				Restarts: &VMRestarts{Times: []time.Time{at}, Due: &at, Cause: EndPanic, Reason: "r", Left: LeftGaveUp},
				Awaits:   &VMAwaits{Epoch: 2, VMs: []string{"db1"}, Until: &at},
			},
		},
		binding: Binding{Meta: goldenMeta(KindBinding), Spec: BindingSpec{NodeID: "n", Node: "n1", Epoch: 2, Protected: true, Resumes: &Resumption{Process: 1, Epoch: 2}, BroughtBy: "t", StorageGuard: &StorageGuard{Epoch: 2, Pools: []string{"p"}}, RecoveredFrom: &RecoveredFrom{NodeID: "n2", Node: "m2", Epoch: 2}}},
		operation: Operation{
			Meta: goldenMeta(KindOperation),
			Spec: OperationSpec{
				Action: "vm.test", VM: "web1", TaskID: "t", NodeID: "n", Epoch: 2, SnapshotID: "s", Start: true, Cancel: true,
				Migration: &MigrationSpec{NodeID: "n2", Node: "m2", MaxDowntimeMillis: 100, Bandwidth: MiB, Volumes: []string{"v"}, Channels: 4, PostCopy: true},
				Move:      &MoveSpec{Node: "m2", FromNodeID: "n1", From: "m1", Volumes: []VolumeMove{{ID: "v", Pool: "local", Whole: true}}},
			},
			Status: OperationStatus{Phase: TaskFailed, Progress: 50, Message: "m", Code: CodeTimeout, Begun: true, Channels: 4, PostCopy: true, PostCopying: true, Machine: &SavedMachine{Type: "pc-q35-7.2", CPU: "max", Accelerator: AccelTCG, QEMUVersion: "7.2.22", CloudInit: CloudInitNoCloud}},
		},
		arrival: Arrival{
			Meta:   goldenMeta(KindArrival),
			Spec:   ArrivalSpec{TaskID: "t", NodeID: "n", Epoch: 3},
			Status: ArrivalStatus{Phase: ArrivalFailed, Message: "m", Code: CodeTimeout, Channels: 4, PostCopy: true},
		},
		evacuation: Evacuation{
			Meta:   goldenMeta(KindEvacuation),
			Spec:   EvacuationSpec{TaskID: "t", Node: "m1", Level: EvacuateStop, Parallel: 2, MoveStopped: true, ForceStopSeconds: 60, Stay: true, LeaveStopped: true, Actor: "me", Cancel: true},
			Status: EvacuationStatus{Phase: TaskFailed, Progress: 50, Message: "m", Code: CodeTimeout, Total: 3, Stopped: []string{"v"}},
		},
		drill: Drill{
			Meta: goldenMeta(KindDrill),
			Spec: DrillSpec{TaskID: "t", VM: "web1", NodeID: "n1", Node: "m1", Epoch: 2, Generation: 3, Schedule: "daily 03:00", Due: &at, BegunAt: at, Actor: "me", Cancel: true},
			Status: DrillStatus{
				Phase: TaskFailed, Message: "m", Code: CodeTimeout, PID: 7, Ended: &DrillEnd{PID: 7, Reason: "kill request", Signal: 9, At: at}, Refusal: "r",
				NodeID: "n2", Node: "m2", Epoch: 3, MovedAt: &at, Failover: "f", DoneAt: &at, SucceededAt: &at,
			},
		},
		reboot: Reboot{
			Meta: goldenMeta(KindReboot),
			Spec: RebootSpec{
				TaskID: "t", Node: "m1", Action: RebootHost, Evacuate: EvacuateRequest{Level: EvacuateStop, Parallel: 2, MoveStopped: true, ForceStopSeconds: 60},
				NoEvacuate: true, WithinSeconds: 900, KeepMaintenance: true, Actor: "me", Cancel: true,
			},
			Status: RebootStatus{
				Step: RebootLeaving, Phase: TaskRunning, Progress: 60, Message: "m", Code: CodeTimeout, Outcome: TaskFailed, HostBoot: "h", CommandedAt: &at,
				Refusal: "r", Stopped: []string{"v"},
			},
		},
		rolling: RollingReboot{
			Meta: goldenMeta(KindRollingReboot),
			Spec: RollingRebootSpec{
				TaskID: "t", Nodes: []RollingNode{{ID: "n", Node: "m1", HostBoot: "h", Maintenance: true}},
				Evacuate: EvacuateRequest{Level: EvacuateStop, Parallel: 2, MoveStopped: true, ForceStopSeconds: 60}, NoEvacuate: true, WithinSeconds: 900, Actor: "me", Cancel: true,
			},
			Status: RollingRebootStatus{
				Phase: TaskFailed, Progress: 50, Message: "m", Code: CodeTimeout, Checked: true, Current: "n", Done: []string{"m1"}, Failed: "m2", Left: []string{"m3"}, WaitsSince: &at,
			},
		},
		image: Image{
			Meta: goldenMeta(KindImage),
			Spec: ImageSpec{Pool: "local", Path: "/a", Node: "n1", SHA256: strings.Repeat("ab", 32), SourceVolume: "v", SourceSnapshot: "s"},
			Status: ImageStatus{
				ObservedGeneration: 3, Phase: StorageReady, Format: "qcow2", VirtualSize: GiB, Size: MiB, SHA256: strings.Repeat("ab", 32),
				Progress: 100, Message: "m", Conditions: cond,
			},
		},
		volume: Volume{
			Meta:   goldenMeta(KindVolume),
			Spec:   VolumeSpec{Pool: "local", Image: "i", Size: GiB, SourceVolume: "s", SourceSnapshot: "t", Node: "n1", Content: ContentTPM},
			Status: VolumeStatus{ObservedGeneration: 3, Phase: StorageReady, Format: "qcow2", Size: GiB, Progress: 50, Message: "m", Conditions: cond},
		},
		pool: Pool{
			Meta: goldenMeta(KindPool), Spec: PoolSpec{Type: PoolShared, Path: "/srv", Ceph: &CephSpec{Pool: "vms", Namespace: "n", Monitors: []string{"10.0.0.1:3300"}, User: "muster", Key: "k", KeySet: true, SealedKey: []byte{1}}}, Status: PoolStatus{Nodes: []PoolStateStatus{state}, Capabilities: []PoolCapability{CapShared}},
		},
		poolState: PoolState{Meta: goldenMeta(KindPoolState), Spec: PoolStateSpec{PoolID: "p", NodeID: "n"}, Status: state},
		task: Task{
			Meta: goldenMeta(KindTask),
			Spec: TaskSpec{
				Action: ActionVMStart, TargetKind: KindVM, TargetID: "t", Target: "web1", TargetGeneration: 3, TargetEpoch: 2,
				TargetReboots: 5, Actor: "me", Deadline: goldenTime,
			},
			Status: TaskStatus{Phase: TaskFailed, Progress: 50, Message: "m", Code: CodeTimeout, StartedAt: &at, FinishedAt: &at},
		},
		snapshot: Snapshot{
			Meta: goldenMeta(KindSnapshot),
			Spec: SnapshotSpec{VM: "web1", VMID: "v", Memory: true, Description: "d", Temporary: true, Parent: "p"},
			Status: SnapshotStatus{
				Phase: SnapshotReady, Message: "m", Tag: "t", Disks: []SnapshotDisk{{Volume: "v", VolumeID: "id", Slot: 1, Size: GiB}}, Hardware: &VMSpec{CPUs: 2, Memory: GiB},
				Machine: &SavedMachine{Type: "pc-q35-7.2", CPU: "max", Accelerator: AccelTCG, QEMUVersion: "7.2.22", CloudInit: CloudInitNoCloud},
				Power:   PowerRunning, MemorySize: MiB, Consistency: ConsistencyMemory, TakenAt: &at, Current: true, Undo: true,
			},
		},
		saved: SavedState{
			Meta: goldenMeta(KindSavedState),
			Spec: SavedStateSpec{
				Tag: "t", Disks: []SnapshotDisk{{Volume: "v", VolumeID: "id", Slot: 1, Size: GiB}}, Hardware: &VMSpec{CPUs: 2, Memory: GiB}, SnapshotID: "s", Size: MiB,
				Machine: &SavedMachine{Type: "pc-q35-7.2", CPU: "max", Accelerator: AccelTCG, QEMUVersion: "7.2.22", CloudInit: CloudInitNoCloud},
				SavedAt: goldenTime, Discard: true,
			},
			Status: SavedStateStatus{Message: "m"},
		},
		token: Token{
			Meta: goldenMeta(KindToken),
			Spec: TokenSpec{
				Use: TokenJoin, Role: RoleViewer, JoinRole: RoleWitness, Hash: "h", ExpiresAt: goldenTime, UsedBy: "n", UsedKey: "k",
			},
		},
	}
}

func TestGoldenEncodings(t *testing.T) {
	g := goldenObjects()
	golden(t, g.cluster)
	golden(t, g.node)
	golden(t, g.vm)
	golden(t, g.binding)
	golden(t, g.operation)
	golden(t, g.arrival)
	golden(t, g.evacuation)
	golden(t, g.drill)
	golden(t, g.reboot)
	golden(t, g.rolling)
	golden(t, g.image)
	golden(t, g.volume)
	golden(t, g.pool)
	golden(t, g.poolState)
	golden(t, g.task)
	golden(t, g.token)
	golden(t, goldenFacts())
	golden(t, goldenBaseline())
	golden(t, g.snapshot)
	golden(t, g.saved)
}

// stored is one golden file.
type stored struct {
	Spec   json.RawMessage `json:"spec"`
	Status json.RawMessage `json:"status"`
}

func golden[S, T any](t *testing.T, o Object[S, T]) {
	t.Helper()
	t.Run(string(o.Meta.Kind), func(t *testing.T) {
		everyFieldSet(t, reflect.ValueOf(o), "")
		spec, err := o.EncodeSpec()
		if err != nil {
			t.Fatal(err)
		}
		status, err := o.EncodeStatus()
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join("testdata", "golden", string(o.Meta.Kind)+"-v1.json")
		if *update {
			b, err := json.MarshalIndent(stored{spec, status}, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, append(b, '\n'), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var file stored
		if err := json.Unmarshal(b, &file); err != nil {
			t.Fatal(err)
		}
		if got, want := spec, compact(t, file.Spec); !bytes.Equal(got, want) {
			t.Errorf("spec is encoded as\n%s\nwant\n%s", got, want)
		}
		if got, want := status, compact(t, file.Status); !bytes.Equal(got, want) {
			t.Errorf("status is encoded as\n%s\nwant\n%s", got, want)
		}
		// What a release wrote is read as it was, but for the revisions, which
		// are never stored.
		var back Object[S, T]
		newer, err := back.Decode(file.Spec, file.Status)
		if err != nil || newer {
			t.Fatalf("decode: newer %v, %v", newer, err)
		}
		want := o
		want.Meta.Revision, want.Meta.StatusRevision = 0, 0
		if !reflect.DeepEqual(back, want) {
			t.Errorf("read back as\n%+v\nwant\n%+v", back, want)
		}
		newerSchema(t, o, file)
	})
}

// newerSchema checks that a later version's value is read and reported.
func newerSchema[S, T any](t *testing.T, o Object[S, T], file stored) {
	t.Helper()
	later := func(raw json.RawMessage, inner string) []byte {
		var m map[string]any
		if err := json.Unmarshal(raw, &m); err != nil {
			t.Fatal(err)
		}
		m["schema"], m["invented"] = Schema+1, []int{1}
		m[inner].(map[string]any)["invented"] = map[string]any{"a": 1}
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var back Object[S, T]
	newer, err := back.Decode(later(file.Spec, "spec"), later(file.Status, "status"))
	if err != nil || !newer {
		t.Errorf("a later version's value: newer %v, %v", newer, err)
	}
	if back.Meta.ID != o.Meta.ID || !reflect.DeepEqual(back.Spec, o.Spec) {
		t.Errorf("a later version's value was read as %+v", back)
	}
}

func compact(t *testing.T, raw json.RawMessage) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := json.Compact(&b, raw); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// everyFieldSet fails for a field that the golden object leaves out.
func everyFieldSet(t *testing.T, v reflect.Value, path string) {
	t.Helper()
	if v.Type() == reflect.TypeFor[time.Time]() {
		return
	}
	for i := range v.NumField() {
		name := path + "." + v.Type().Field(i).Name
		f := v.Field(i)
		if f.Kind() == reflect.Struct && f.NumField() == 0 {
			continue
		}
		if f.IsZero() {
			t.Errorf("the golden object does not set %s", name)
		}
		if f.Kind() == reflect.Slice && f.Len() > 0 {
			f = f.Index(0)
		}
		if f.Kind() == reflect.Struct {
			everyFieldSet(t, f, name)
		}
	}
}

func TestDecodeRefusesBrokenValues(t *testing.T) {
	good := `{"schema":1,"meta":{},"spec":{}}`
	for name, c := range map[string]struct{ spec, status string }{
		"no spec":         {"", ""},
		"truncated spec":  {good[:20], ""},
		"no schema":       {`{"meta":{},"spec":{}}`, ""},
		"schema 0":        {`{"schema":0}`, ""},
		"negative schema": {`{"schema":-1}`, ""},
		"wrong type":      {`{"schema":1,"spec":{"cpus":"x"}}`, ""},
		"broken status":   {good, `{`},
	} {
		var vm VM
		var status []byte
		if c.status != "" {
			status = []byte(c.status)
		}
		if _, err := vm.Decode([]byte(c.spec), status); err == nil {
			t.Errorf("%s: read as %+v", name, vm)
		}
	}
	var vm VM
	if _, err := vm.Decode([]byte(good), nil); err != nil {
		t.Errorf("a spec without status: %v", err)
	}
}
