// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// refused checks that err is a validation error about field.
func refused(t *testing.T, err error, field string) {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) {
		t.Fatalf("got %v, want a refusal of %s", err, field)
	}
	if e.Code != CodeInvalid || e.Field != field {
		t.Errorf("got code %q field %q (%v), want invalid %s", e.Code, e.Field, err, field)
	}
	if len(err.Error()) > 1000 {
		t.Errorf("the error repeats the input: %d bytes", len(err.Error()))
	}
}

func accepted(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Errorf("refused: %v", err)
	}
}

func TestNamesAreDNSLabels(t *testing.T) {
	long := strings.Repeat("a", 63)
	for _, ok := range []string{"a", "0", "web1", "a-b", "a--b", long, "123"} {
		accepted(t, ValidName("f", ok))
	}
	for _, bad := range []string{
		"", long + "a", "A", "Web", "-a", "a-", ".", "..", "../etc", "a/../b", "a/b", "a.b", "a_b", " a", "a ", "a\n", "\na",
		"a\x00", "ä", "a\u0301", "%2e%2e", strings.Repeat("x", 1<<20), "a\\b", "\xff", "a\r\nSet-Cookie: x",
	} {
		refused(t, ValidName("f", bad), "f")
	}
}

func labels(n int) map[string]string {
	m := map[string]string{}
	for i := range n {
		m[fmt.Sprintf("k%d", i)] = "v"
	}
	return m
}

func TestMetaValidate(t *testing.T) {
	long := strings.Repeat("v", 63)
	for name, c := range map[string]struct {
		change func(*Meta)
		field  string
	}{
		"plain":              {func(*Meta) {}, ""},
		"most labels":        {func(m *Meta) { m.Labels = labels(64) }, ""},
		"longest label":      {func(m *Meta) { m.Labels = map[string]string{long: long} }, ""},
		"empty label value":  {func(m *Meta) { m.Labels = map[string]string{"a": ""} }, ""},
		"label with a path":  {func(m *Meta) { m.Labels = map[string]string{"example.com/a_b-c": "x"} }, ""},
		"name missing":       {func(m *Meta) { m.Name = "" }, "meta.name"},
		"name of a parent":   {func(m *Meta) { m.Name = "../x" }, "meta.name"},
		"project missing":    {func(m *Meta) { m.Project = "" }, "meta.project"},
		"project with slash": {func(m *Meta) { m.Project = "a/b" }, "meta.project"},
		"too many labels":    {func(m *Meta) { m.Labels = labels(65) }, "meta.labels"},
		"label key empty":    {func(m *Meta) { m.Labels = map[string]string{"": "x"} }, "meta.labels"},
		"label key long":     {func(m *Meta) { m.Labels = map[string]string{long + "v": "x"} }, "meta.labels"},
		"label key with =":   {func(m *Meta) { m.Labels = map[string]string{"a=b": "x"} }, "meta.labels"},
		"label key newline":  {func(m *Meta) { m.Labels = map[string]string{"a\n": "x"} }, "meta.labels"},
		"label value long":   {func(m *Meta) { m.Labels = map[string]string{"a": long + "v"} }, "meta.labels.a"},
	} {
		t.Run(name, func(t *testing.T) {
			m := Meta{Name: "a", Project: "p"}
			c.change(&m)
			if c.field == "" {
				accepted(t, m.Validate())
				return
			}
			refused(t, m.Validate(), c.field)
		})
	}
}

// spec is a case of some spec's Validate after SetDefaults.
type spec struct {
	name  string
	spec  Spec
	field string // empty: accepted
}

func runSpecs(t *testing.T, cases []spec) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			c.spec.SetDefaults()
			err := c.spec.Validate()
			if c.field == "" {
				accepted(t, err)
				return
			}
			refused(t, err, c.field)
		})
	}
}

func TestVMSpec(t *testing.T) {
	disks := func(n int) []VMDisk {
		var out []VMDisk
		for i := range n {
			out = append(out, VMDisk{Volume: fmt.Sprintf("v%d", i)})
		}
		return out
	}
	disk := func(d VMDisk) *VMSpec { return &VMSpec{Disks: []VMDisk{{Size: MiB}, d}} }
	runSpecs(t, []spec{
		{"empty gets defaults", &VMSpec{}, ""},
		{"largest", &VMSpec{CPUs: 255, Memory: 8 * TiB, Disks: disks(24), HA: HARestart, Power: PowerPaused}, ""},
		{"smallest", &VMSpec{CPUs: 1, Memory: 16 * MiB}, ""},
		{"negative CPUs", &VMSpec{CPUs: -1}, "spec.cpus"},
		{"too many CPUs", &VMSpec{CPUs: 513}, "spec.cpus"},
		{"absurd CPUs", &VMSpec{CPUs: 1 << 62}, "spec.cpus"},
		{"negative memory", &VMSpec{Memory: -1}, "spec.memory"},
		{"most negative memory", &VMSpec{Memory: -1 << 63}, "spec.memory"},
		{"little memory", &VMSpec{Memory: 16*MiB - 1}, "spec.memory"},
		{"absurd memory", &VMSpec{Memory: 1<<63 - 1}, "spec.memory"},
		{"over the most memory", &VMSpec{Memory: 8*TiB + MiB}, "spec.memory"},
		{"uneven memory", &VMSpec{Memory: 16*MiB + 1}, "spec.memory"},
		{"HA in capitals", &VMSpec{HA: "Restart"}, "spec.ha"},
		{"huge HA", &VMSpec{HA: HAPolicy(strings.Repeat("x", 1<<20))}, "spec.ha"},
		{"unknown power", &VMSpec{Power: "on"}, "spec.power"},
		{"too many disks", &VMSpec{Disks: disks(25)}, "spec.disks"},
		{"a volume twice", &VMSpec{Disks: []VMDisk{{Volume: "a"}, {Volume: "a"}}}, "spec.disks[1].volume"},
		{"two unnamed disks", &VMSpec{Disks: []VMDisk{{Size: MiB}, {Size: MiB}}}, ""},
		{"empty disk", disk(VMDisk{}), "spec.disks[1]"},
		{"volume of a parent", disk(VMDisk{Volume: "../v"}), "spec.disks[1].volume"},
		{"image of a parent", disk(VMDisk{Image: "../i"}), "spec.disks[1].image"},
		{"pool of a parent", disk(VMDisk{Size: MiB, Pool: "../p"}), "spec.disks[1].pool"},
		{"small disk", disk(VMDisk{Size: MiB - 1}), "spec.disks[1].size"},
		{"negative disk", disk(VMDisk{Size: -GiB}), "spec.disks[1].size"},
		{"negative disk of an image", disk(VMDisk{Image: "i", Size: -GiB}), "spec.disks[1].size"},
		{"absurd disk", disk(VMDisk{Size: 1<<63 - 1}), "spec.disks[1].size"},
		{"uneven disk", disk(VMDisk{Size: MiB + 512}), "spec.disks[1].size"},
		{"disk of an image", disk(VMDisk{Image: "i"}), ""},
		{"nic", &VMSpec{NICs: []VMNIC{{Network: "lan", MAC: "52:54:00:12:34:56", Address: "10.0.0.5"}}}, ""},
		{"nic of a parent", &VMSpec{NICs: []VMNIC{{Network: "../lan"}}}, "spec.nics[0].network"},
		{"nic with a multicast MAC", &VMSpec{NICs: []VMNIC{{Network: "lan", MAC: "01:00:5e:00:00:01"}}}, "spec.nics[0].mac"},
		{"nic with an odd address", &VMSpec{NICs: []VMNIC{{Network: "lan", Address: "10.0.0.05"}}}, "spec.nics[0].address"},
		{"too many nics", &VMSpec{NICs: make([]VMNIC, MaxNICs+1)}, "spec.nics"},
		{"largest disk", disk(VMDisk{Size: 256 * TiB}), ""},
	})
}

func TestVMDefaults(t *testing.T) {
	s := VMSpec{}
	s.SetDefaults()
	if s.CPUs != 1 || s.Memory != 512*MiB || s.HA != HANone || s.Power != PowerStopped {
		t.Errorf("defaults are %+v", s)
	}
	given := VMSpec{CPUs: 3, Memory: GiB, HA: HARestart, Power: PowerRunning}
	s = given
	s.SetDefaults()
	if s.CPUs != given.CPUs || s.Memory != given.Memory || s.HA != given.HA || s.Power != given.Power {
		t.Errorf("defaults replaced what was given: %+v", s)
	}
}

func TestNodeSpec(t *testing.T) {
	runSpecs(t, []spec{
		{"empty gets defaults", &NodeSpec{}, ""},
		{"witness with tcg", &NodeSpec{Role: RoleWitness, Accelerator: AccelTCG, ReservedMemory: 8 * TiB}, ""},
		{"unknown role", &NodeSpec{Role: "leader"}, "spec.role"},
		{"unknown accelerator", &NodeSpec{Accelerator: "hvf"}, "spec.accelerator"},
		{"negative memory", &NodeSpec{ReservedMemory: -1}, "spec.reservedMemory"},
		{"absurd memory", &NodeSpec{ReservedMemory: 8*TiB + 1}, "spec.reservedMemory"},
	})
	s := NodeSpec{}
	s.SetDefaults()
	if s.Role != RoleVoter || s.Accelerator != AccelAuto || s.ReservedMemory != 512*MiB {
		t.Errorf("defaults are %+v", s)
	}
}

func TestPoolSpec(t *testing.T) {
	deep := "/" + strings.Repeat("d", 1023)
	runSpecs(t, []spec{
		{"empty is a dir pool", &PoolSpec{}, ""},
		{"shared", &PoolSpec{Type: PoolShared, Path: "/srv/pool"}, ""},
		{"longest path", &PoolSpec{Path: deep}, ""},
		{"unknown type", &PoolSpec{Type: "nfs", Path: "/x"}, "spec.type"},
		{"shared without path", &PoolSpec{Type: PoolShared}, "spec.path"},
		{"relative", &PoolSpec{Path: "pool"}, "spec.path"},
		{"with ..", &PoolSpec{Path: "/srv/../etc"}, "spec.path"},
		{"trailing slash", &PoolSpec{Path: "/srv/"}, "spec.path"},
		{"double slash", &PoolSpec{Path: "//srv"}, "spec.path"},
		{"the root", &PoolSpec{Path: "/"}, "spec.path"},
		{"too long", &PoolSpec{Path: deep + "d"}, "spec.path"},
		{"with a NUL", &PoolSpec{Path: "/srv/a\x00b"}, "spec.path"},
		{"with a line break", &PoolSpec{Path: "/srv/a\nb"}, "spec.path"},
		{"dir with Ceph", &PoolSpec{Path: "/srv/a", Ceph: &CephSpec{}}, "spec.ceph"},
		{"rbd without Ceph", &PoolSpec{Type: PoolRBD}, "spec.ceph"},
	})
	const key = "AQBXrRlnAAAAABAA4iz5Cw0+0YcB7bfzTMGrKw=="
	ceph := func(change func(*CephSpec)) *PoolSpec {
		c := CephSpec{Pool: "vms", Monitors: []string{"10.0.0.1", "[fd00::1]:6789", "mon.example.org"}, User: "client.muster", Key: key}
		change(&c)
		return &PoolSpec{Type: PoolRBD, Ceph: &c}
	}
	whole := ceph(func(*CephSpec) {})
	runSpecs(t, []spec{
		{"rbd", whole, ""},
		{"rbd, IPv6 without a port", ceph(func(c *CephSpec) { c.Monitors = []string{"fd00::1"} }), ""},
		{"rbd, the key is there already", ceph(func(c *CephSpec) { c.Key = "" }), ""},
		{"rbd with a path", &PoolSpec{Type: PoolRBD, Path: "/srv/a", Ceph: &CephSpec{}}, "spec.path"},
		{"rbd without pool", ceph(func(c *CephSpec) { c.Pool = "" }), "spec.ceph.pool"},
		{"rbd, an option in the pool", ceph(func(c *CephSpec) { c.Pool = "p:conf=/etc/shadow" }), "spec.ceph.pool"},
		{"rbd, an option in the namespace", ceph(func(c *CephSpec) { c.Namespace = "a/b" }), "spec.ceph.namespace"},
		{"rbd without user", ceph(func(c *CephSpec) { c.User = "" }), "spec.ceph.user"},
		{"rbd, an option in the user", ceph(func(c *CephSpec) { c.User = "u@h" }), "spec.ceph.user"},
		{"rbd without monitors", ceph(func(c *CephSpec) { c.Monitors = nil }), "spec.ceph.monitors"},
		{"rbd, a monitor with an option", ceph(func(c *CephSpec) { c.Monitors = []string{"h,x=y"} }), "spec.ceph.monitors"},
		{"rbd, port 0", ceph(func(c *CephSpec) { c.Monitors = []string{"h:0"} }), "spec.ceph.monitors"},
		{"rbd, too many monitors", ceph(func(c *CephSpec) { c.Monitors = make([]string, 17) }), "spec.ceph.monitors"},
		{"rbd, a keyring instead of a key", ceph(func(c *CephSpec) { c.Key = "[client.muster] key = x" }), "spec.ceph.key"},
	})
	if whole.SetDefaults(); whole.Ceph.User != "muster" || !slices.Equal(whole.Ceph.Monitors, []string{"10.0.0.1:3300", "[fd00::1]:6789", "mon.example.org:3300"}) {
		t.Errorf("defaults are %+v", whole.Ceph)
	}
}

func TestImageSpec(t *testing.T) {
	sum := strings.Repeat("ab", 32)
	runSpecs(t, []spec{
		{"upload", &ImageSpec{}, ""},
		{"import", &ImageSpec{Pool: "fast", Path: "/tmp/a.qcow2", Node: "n1", SHA256: sum}, ""},
		{"sum in capitals", &ImageSpec{SHA256: strings.ToUpper(sum)}, ""},
		{"pool of a parent", &ImageSpec{Pool: "../x"}, "spec.pool"},
		{"node of a parent", &ImageSpec{Node: "../x"}, "spec.node"},
		{"relative path", &ImageSpec{Path: "a.qcow2"}, "spec.path"},
		{"path with ..", &ImageSpec{Path: "/tmp/../etc/shadow"}, "spec.path"},
		{"path with a NUL", &ImageSpec{Path: "/tmp/a\x00"}, "spec.path"},
		{"endless path", &ImageSpec{Path: "/" + strings.Repeat("x", 1<<20)}, "spec.path"},
		{"short sum", &ImageSpec{SHA256: sum[2:]}, "spec.sha256"},
		{"long sum", &ImageSpec{SHA256: sum + "00"}, "spec.sha256"},
		{"sum of other letters", &ImageSpec{SHA256: strings.Repeat("xy", 32)}, "spec.sha256"},
	})
	s := ImageSpec{}
	s.SetDefaults()
	if s.Pool != LocalPool {
		t.Errorf("default pool is %q", s.Pool)
	}
}

func TestVolumeSpec(t *testing.T) {
	runSpecs(t, []spec{
		{"empty disk", &VolumeSpec{Size: GiB}, ""},
		{"clone", &VolumeSpec{Image: "i"}, ""},
		{"neither", &VolumeSpec{}, "spec.size"},
		{"negative", &VolumeSpec{Size: -MiB}, "spec.size"},
		{"absurd", &VolumeSpec{Size: 256*TiB + MiB}, "spec.size"},
		{"uneven", &VolumeSpec{Size: MiB + 1}, "spec.size"},
		{"image of a parent", &VolumeSpec{Image: "../i"}, "spec.image"},
		{"pool of a parent", &VolumeSpec{Size: MiB, Pool: ".."}, "spec.pool"},
		{"node of a parent", &VolumeSpec{Size: MiB, Node: "../n"}, "spec.node"},
	})
}

func TestTokenSpec(t *testing.T) {
	runSpecs(t, []spec{
		{"empty is a viewer", &TokenSpec{}, ""},
		{"operator", &TokenSpec{Role: RoleOperator}, ""},
		{"join", &TokenSpec{Use: TokenJoin}, ""},
		{"unknown use", &TokenSpec{Use: "root"}, "spec.use"},
		{"unknown role", &TokenSpec{Role: "Administrator"}, "spec.role"},
		{"unknown join role", &TokenSpec{Use: TokenJoin, JoinRole: "leader"}, "spec.joinRole"},
	})
	api, join := TokenSpec{}, TokenSpec{Use: TokenJoin}
	api.SetDefaults()
	join.SetDefaults()
	if api.Role != RoleViewer || join.JoinRole != RoleVoter || join.Role != "" {
		t.Errorf("defaults give %+v and %+v: the least powerful role is meant", api, join)
	}
}

func TestPrepare(t *testing.T) {
	vm := VM{Meta: Meta{Name: "a"}}
	accepted(t, vm.Prepare())
	if vm.Meta.Project != DefaultProject || vm.Spec.CPUs != 1 {
		t.Errorf("prepared to %+v", vm)
	}
	vm.Meta.Name = "A"
	refused(t, vm.Prepare(), "meta.name")
	vm.Meta.Name, vm.Spec.CPUs = "a", -4
	refused(t, vm.Prepare(), "spec.cpus")
	b := Binding{Meta: Meta{Name: "a"}} // a spec without rules of its own
	accepted(t, b.Prepare())
}

func TestNewTask(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.FixedZone("x", 3600))
	target := Meta{ID: "id", Name: "web", Project: "p", Generation: 7}
	k := NewTask(ActionVMStart, KindVM, target, "me", time.Minute, now)
	if !IsID(k.Meta.Name) || k.Meta.Name != k.Meta.ID || k.Meta.Project != "p" {
		t.Errorf("meta %+v", k.Meta)
	}
	if k.Spec.TargetGeneration != 7 || !k.Spec.Deadline.Equal(now.Add(time.Minute)) || k.Spec.Deadline.Location() != time.UTC {
		t.Errorf("spec %+v", k.Spec)
	}
	for p, final := range map[TaskPhase]bool{TaskPending: false, TaskRunning: false, TaskSucceeded: true, TaskFailed: true, TaskCancelled: true} {
		if p.Final() != final {
			t.Errorf("%s final: %v", p, p.Final())
		}
	}
}
