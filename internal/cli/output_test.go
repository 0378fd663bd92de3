// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

var update = flag.Bool("update", false, "rewrite golden files and the reference")

var goldenNow = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// goldenObjects are one or two objects of every kind, some of them hostile.
var goldenObjects = map[api.Kind][]string{
	api.KindVM: {
		`{"meta":{"id":"01931e6c-7a52-7c3e-9b1f-2f6f0d6c3a11","kind":"vm","name":"web1","project":"default","labels":{"env":"prod","app":"web"},"revision":12,"generation":3,"createdAt":"2026-11-21T11:55:00Z"},
		  "spec":{"cpus":2,"memory":536870912,"ha":"restart","power":"running","disks":[{"volume":"web1-disk1","image":"tiny","pool":"local","size":10737418240}],"nics":[{"network":"lab","mac":"52:54:00:12:34:56","address":"10.20.0.7"},{"network":"office"}]},
		  "status":{"observedGeneration":2,"phase":"running","node":"m1","epoch":2,"pid":4711,"startedAt":"2026-11-21T11:59:30Z","accelerator":"kvm","message":"runs\u001b[2J\u001b]0;owned\u0007 well",
		  "conditions":[{"type":"Protected","ok":false,"reason":"GuardMissing","message":"start muster-guard on m1","since":"2026-11-21T11:00:00Z"}]}}`,
		`{"meta":{"name":"a-vm-with-a-rather-long-name","createdAt":"2024-01-01T00:00:00Z","deletingAt":"2026-11-21T11:59:00Z","finalizers":["hypervisor"]},"spec":{"cpus":1,"memory":17179869184,"ha":"none"},"status":{"phase":"stopped"}}`},
	api.KindImage: {`{"meta":{"name":"tiny","createdAt":"2026-11-20T12:00:00Z"},"spec":{"pool":"local","node":"m1"},"status":{"phase":"importing","progress":40,"format":"qcow2","virtualSize":1610612736,"size":1048576}}`},
	api.KindSnapshot: {`{"meta":{"name":"before-upgrade","kind":"snapshot","createdAt":"2026-11-21T11:00:00Z"},"spec":{"vm":"web1","memory":true,"description":"as\u001b[2J installed","parent":"base"},"status":{"phase":"ready","disks":[{"volume":"web1-disk0","volumeID":"x","slot":1,"size":1073741824}],"power":"running","memorySize":86822912,"consistency":"memory","takenAt":"2026-11-21T11:00:05Z","current":true}}`,
		`{"meta":{"name":"lost","kind":"snapshot","createdAt":"2026-11-21T11:00:00Z"},"spec":{"vm":"web1"},"status":{"phase":"failed","message":"it was interrupted"}}`},
	api.KindVolume: {`{"meta":{"name":"web1-disk1","owner":"vm/01931e6c","createdAt":"2026-11-21T11:00:00Z"},"spec":{"pool":"shared","image":"tiny","size":10737418240},"status":{"phase":"ready"}}`},
	api.KindPool: {`{"meta":{"name":"local","createdAt":"2026-11-21T11:00:00Z"},"spec":{"type":"dir"},"status":{"nodes":[{"node":"m1","ready":true,"free":1073741824,"total":2147483648},{"node":"m2","ready":false,"reason":"the directory does not exist; create it"}]}}`,
		`{"meta":{"name":"nfs","createdAt":"2026-11-21T11:00:00Z"},"spec":{"type":"shared","path":"/mnt/nfs"},"status":{"nodes":[{"node":"m1","ready":true,"free":1073741824,"total":2147483648},{"node":"m2","ready":true,"notes":"it cannot read the note of node m1: torn\u001b[2J","free":1073741824,"total":2147483648}]}}`},
	api.KindNode:    {`{"meta":{"name":"m1","createdAt":"2026-11-21T11:00:00Z"},"spec":{"address":"10.76.0.11:7600","role":"voter","maintenance":true,"reservedMemory":536870912},"status":{"phase":"ready","version":"0.1.0","cpus":8,"memory":17179869184,"accelerator":"tcg","acceleratorReason":"KVM ran no guest within 5 s","qemuVersion":"7.2.0","guardLevel":"process only"}}`},
	api.KindNetwork: {`{"meta":{"name":"lab","kind":"network","createdAt":"2026-11-21T11:00:00Z"},"spec":{"type":"vxlan","vni":100},"status":{"nodes":[{"node":"m1","ready":true},{"node":"m2","ready":false,"reason":"Open vSwitch does not run"}]}}`},
	api.KindIPPool:  {`{"meta":{"name":"lab","kind":"ippool","createdAt":"2026-11-21T11:00:00Z"},"spec":{"network":"lab","cidr":"10.20.0.0/24","gateway":"10.20.0.1","start":"10.20.0.10","dns":["10.20.0.53","9.9.9.9"],"domain":"lab.example"},"status":{"total":245,"used":3}}`},
	api.KindUplink:  {`{"meta":{"name":"up1","kind":"uplink","createdAt":"2026-11-21T11:00:00Z"},"spec":{"node":"m1","nic":"eth1"},"status":{"ready":true,"message":"no carrier"}}`},
	api.KindTask:    {`{"meta":{"id":"01931e6c-7a52-7c3e-9b1f-2f6f0d6c3a11","createdAt":"2026-11-21T11:59:58Z"},"spec":{"action":"vm.start","targetKind":"vm","targetID":"x","target":"web1","actor":"admin"},"status":{"phase":"failed","progress":30,"message":"QEMU ended:\nno memory","code":"internal"}}`},
	api.KindToken: {`{"meta":{"name":"ci","createdAt":"2026-11-21T11:00:00Z"},"spec":{"use":"api","role":"operator","expiresAt":"2026-11-21T18:00:00Z"},"status":{}}`,
		`{"meta":{"name":"join-1","createdAt":"2026-11-21T11:00:00Z"},"spec":{"use":"join","joinRole":"voter","expiresAt":"2026-11-21T12:30:00Z","usedBy":"01931e6c-7a52"},"status":{}}`},
	api.KindEvent: {`{"meta":{"id":"01931e6c-7a52-7c3e-9b1f-2f6f0d6c3a11","name":"01931e6c-7a52-7c3e-9b1f-2f6f0d6c3a11","createdAt":"2026-11-21T11:58:00Z"},"spec":{"type":"vm.recovered","severity":"warning","targetKind":"vm","target":"web1","node":"m3","message":"vm web1 was moved from the lost node m1 to node m3","details":{"from":"m1","to":"m3"}}}`,
		`{"meta":{"id":"01931e6c-7a52-7c3e-9b1f-2f6f0d6c3a12","createdAt":"2026-11-21T11:59:00Z"},"spec":{"type":"audit.vm.start","severity":"info","actor":"ci","source":"10.0.0.9","message":"ci: start vm\u001b[2J web1"}}`},
	api.KindAlert: {`{"meta":{"id":"612124cb-a05a-8054-9589-97ca508a9b37","name":"612124cb-a05a-8054-9589-97ca508a9b37","createdAt":"2026-11-21T11:50:00Z"},"spec":{"rule":"node-lost","severity":"critical","targetKind":"node","target":"m1","acknowledgedBy":"ann"},"status":{"phase":"firing","message":"node m1 is lost since 11:55:00 UTC; restarted elsewhere: web1 on m3","pendingAt":"2026-11-21T11:55:00Z","firingAt":"2026-11-21T11:55:03Z","sent":["ops/firing/01990000-0000-7000-8000-000000000001"]}}`},
	api.KindRule: {`{"meta":{"name":"busy","createdAt":"2026-11-21T11:00:00Z"},"spec":{"check":"metric","severity":"warning","threshold":95.5,"metric":"muster_node_cpu_percent","forSeconds":600}}`,
		`{"meta":{"name":"node-lost","createdAt":"2026-11-21T11:00:00Z"},"spec":{"check":"node-lost","severity":"critical","disabled":true}}`},
	api.KindReceiver: {`{"meta":{"name":"ops","createdAt":"2026-11-21T11:00:00Z"},"spec":{"type":"smtp","minSeverity":"warning","address":"mail.example.org:587","from":"muster@example.org","to":["ops@example.org"],"tls":"starttls","user":"muster"},"status":{"phase":"failing","queued":2,"lastError":"451 try later","lastSent":"2026-11-21T10:00:00Z"}}`},
	api.KindPowerDevice: {`{"meta":{"name":"bmc1","createdAt":"2026-11-21T11:00:00Z"},"spec":{"node":"m1","driver":"ipmi","address":"10.0.9.1","user":"fence","passwordSet":true,"timeoutSeconds":8,"privilege":"operator"}}`,
		`{"meta":{"name":"bmc2","createdAt":"2026-11-21T11:00:00Z"},"spec":{"node":"m2","order":1,"driver":"redfish","address":"bmc2.example.org","port":4443,"user":"fence","timeoutSeconds":4,"systemID":"437XR","fingerprint":"5f0c","disabled":true}}`},
	api.KindPowerAction: {`{"meta":{"name":"01931e6c-7a52-7c3e-9b1f-2f6f0d6c3a11","createdAt":"2026-11-21T11:58:00Z"},"spec":{"node":"m3","action":"off","trigger":"ha","actor":"ha","via":"m1","reason":"no lease was renewed for 5.1 s","at":"2026-11-21T11:58:00Z"},"status":{"phase":"confirmed","message":"read back\u001b[2J","endedAt":"2026-11-21T11:58:02Z","steps":[{"at":"2026-11-21T11:58:00Z","device":"bmc3","do":"connect","ok":true,"answer":"session opened","milliseconds":40},{"at":"2026-11-21T11:58:01Z","device":"bmc3","do":"off","ok":false,"answer":"busy","milliseconds":3}]}}`},
	api.KindFailover: {`{"meta":{"id":"01931e6c-7a52-7c3e-9b1f-2f6f0d6c3a11","name":"01931e6c-7a52-7c3e-9b1f-2f6f0d6c3a11","createdAt":"2026-11-21T11:58:00Z","revision":512,"statusRevision":520},"spec":{"nodeID":"n3","node":"m3","guardLevel":"softdog","cause":"lease","leaderID":"n1","leader":"m1","term":7,"at":"2026-11-21T11:58:00Z","silentMillis":13204,"since":"grant","rules":{"leaseMillis":10000,"driftPerMille":10,"killMillis":2000,"marginMillis":1000}},"status":{"readmittedAt":"2026-11-21T11:59:00Z","readmittedTerm":7}}`,
		`{"meta":{"id":"01931e6c-7a52-7c3e-9b1f-2f6f0d6c3a12","name":"01931e6c-7a52-7c3e-9b1f-2f6f0d6c3a12","createdAt":"2026-11-21T11:59:00Z","revision":612},"spec":{"nodeID":"n3","node":"m3","cause":"power","leaderID":"n1","leader":"m1","term":7,"at":"2026-11-21T11:59:02Z","silentMillis":5100,"since":"grant","rules":{"leaseMillis":10000,"driftPerMille":10,"killMillis":2000,"marginMillis":1000},"power":{"action":"act","beganAt":"2026-11-21T11:59:00Z","endedAt":"2026-11-21T11:59:02Z","steps":[{"at":"2026-11-21T11:59:01Z","device":"bmc3","do":"off","ok":true,"answer":"accepted\u001b[2J","milliseconds":3}]}},"status":{}}`},
	api.KindDrill: {`{"meta":{"id":"01931e6c-7a52-7c3e-9b1f-2f6f0d6c3a11","name":"canary1","createdAt":"2026-11-20T03:00:00Z"},"spec":{"taskID":"t","vm":"canary1","node":"m1","epoch":4,"generation":2,"schedule":"daily 03:00","due":"2026-11-21T03:00:00Z","begunAt":"2026-11-21T03:00:04Z","actor":"drill"},"status":{"phase":"succeeded","message":"failed over from node m1 to node m2","pid":4711,"ended":{"pid":4711,"reason":"kill request","signal":9,"at":"2026-11-21T03:00:05Z"},"node":"m2","epoch":5,"movedAt":"2026-11-21T03:00:05Z","failover":"01931e6c-7a52-7c3e-9b1f-2f6f0d6c3a12","doneAt":"2026-11-21T03:00:06.25Z","succeededAt":"2026-11-21T03:00:06.25Z"}}`,
		`{"meta":{"name":"canary2","createdAt":"2026-11-20T03:00:00Z"},"spec":{"vm":"canary2","node":"m1","due":"2026-11-21T03:00:00Z","begunAt":"2026-11-21T04:00:00Z"},"status":{"phase":"cancelled","message":"left out: node m3 is lost\u001b[2J","doneAt":"2026-11-21T04:00:00Z"}}`},
	api.KindUser: {`{"meta":{"name":"ann","createdAt":"2026-11-21T11:00:00Z"},"spec":{"role":"operator","fullName":"Ann\u001b[31m Onym","sshKeys":["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFvKrZdGm0YVJ8oCjO3b4bq3wq0n0C0XbH4V2l0Y5Q2B ann@home"]}}`,
		`{"meta":{"name":"bob","createdAt":"2026-11-21T11:00:00Z"},"spec":{"role":"viewer","disabled":true}}`},
}

func testApp(out, errOut *bytes.Buffer) *app {
	return &app{Streams: Streams{In: strings.NewReader(""), Out: out, Err: errOut, Getenv: func(string) string { return "" }, Now: func() time.Time { return goldenNow }}}
}

// TestTablesAndSectionsMatchTheirGoldenFiles fixes what people see.
func TestTablesAndSectionsMatchTheirGoldenFiles(t *testing.T) {
	for _, k := range kinds() {
		t.Run(string(k.kind), func(t *testing.T) {
			var out, errOut bytes.Buffer
			a := testApp(&out, &errOut)
			l := &client.List{}
			for _, o := range goldenObjects[k.kind] {
				l.Items = append(l.Items, json.RawMessage(o))
			}
			if len(l.Items) == 0 {
				t.Fatal("no golden object")
			}
			if err := a.printList(k, l); err != nil {
				t.Fatal(err)
			}
			for _, o := range l.Items {
				fmt.Fprintln(&out, "----")
				if err := a.printObject(k, o); err != nil {
					t.Fatal(err)
				}
			}
			if strings.ContainsAny(out.String(), "\x1b\a") {
				t.Errorf("control characters in %q", out.String())
			}
			golden(t, filepath.Join("testdata", "golden", string(k.kind)+".txt"), out.String())
		})
	}
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (go test ./internal/cli -update rewrites it); got:\n%s", path, got)
	}
}

// TestTheReferenceIsUpToDate compares docs/reference/cli.md with the commands.
func TestTheReferenceIsUpToDate(t *testing.T) {
	if a, b := Reference(), Reference(); a != b {
		t.Fatal("the reference differs from run to run")
	}
	golden(t, filepath.Join("..", "..", "docs", "reference", "cli.md"), Reference())
}

func TestEveryCommandHasHelpAndExamples(t *testing.T) {
	var out, errOut bytes.Buffer
	root := testApp(&out, &errOut).root()
	for _, group := range root.Commands() {
		if group.Name() == "completion" || group.Name() == "help" || group.Hidden {
			continue
		}
		for _, c := range append(group.Commands(), group) {
			if c.Short == "" {
				t.Errorf("%s has no help", c.CommandPath())
			}
			if !c.HasSubCommands() && c.Example == "" {
				t.Errorf("%s has no example", c.CommandPath())
			}
		}
	}
}

func TestColourOnlyOnATerminalWithoutNoColor(t *testing.T) {
	for _, c := range []struct {
		name    string
		tty     bool
		noColor string
		want    bool
	}{{"terminal", true, "", true}, {"NO_COLOR", true, "1", false}, {"pipe", false, "", false}} {
		var out, errOut bytes.Buffer
		a := testApp(&out, &errOut)
		a.OutTTY, a.Getenv = c.tty, func(string) string { return c.noColor }
		tab := &table{head: []string{"NAME", "STATUS", "AGE"}}
		tab.add("web1", "running", "5m")
		if err := a.printTable(tab, ""); err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(out.String(), green+"running"+plain+"  5m"); got != c.want {
			t.Errorf("%s: colour %t, want %t: %q", c.name, got, c.want, out.String())
		}
	}
}

func TestCleanRemovesWhatSteersATerminal(t *testing.T) {
	for in, want := range map[string]string{
		"plain":                    "plain",
		"a\x1b[31mred\x1b[0m":      "ared",
		"a\x1b]0;title\x07b":       "ab",
		"a\x1b]8;;http://x\x1b\\b": "ab",
		"a\x1b]never ended":        "a",
		"a\u009b31mb":              "ab",
		"a\x1b(Bb":                 "ab",
		"line\nbreak\ttab":         "line break tab",
		"bell\a\x7f\b":             "bell",
		"rtl\u202egnp.exe":         "rtlgnp.exe",
		"broken\xff":               "broken\ufffd",
		"end\x1b":                  "end",
		"grüße":                    "grüße",
	} {
		if got := clean(in); got != want {
			t.Errorf("clean(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzCleanLeavesNoControlCharacter(f *testing.F) {
	f.Add("a\x1b[31m\x9b\xc2\x9bx")
	f.Fuzz(func(t *testing.T, s string) {
		for _, r := range clean(s) {
			if r < 0x20 || r >= 0x7f && r < 0xa0 {
				t.Fatalf("clean(%q) leaves %q", s, r)
			}
		}
	})
}

func TestAgesAndTimes(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 5 * time.Second: "5s", 5 * time.Minute: "5m", 26 * time.Hour: "1d", 47 * time.Hour: "1d",
		90 * 24 * time.Hour: "90d", 800 * 24 * time.Hour: "2y",
	} {
		if got := age(goldenNow.Add(-d), goldenNow); got != want {
			t.Errorf("age of %s = %q, want %q", d, got, want)
		}
	}
	if got := age(time.Time{}, goldenNow); got != "-" {
		t.Errorf("age of nothing = %q", got)
	}
}

func TestProgressIsABarOnATerminalAndLinesElsewhere(t *testing.T) {
	var out, errOut bytes.Buffer
	a := testApp(&out, &errOut)
	p := a.newProgress("vm.create web1")
	for _, n := range []int{0, 5, 10, 50, 50, 80} {
		p.update(n, "cloning")
	}
	p.clear()
	want := "muster: vm.create web1: cloning\nmuster: vm.create web1: 50% cloning\nmuster: vm.create web1: 80% cloning\n"
	if errOut.String() != want {
		t.Errorf("plain progress:\n%s", errOut.String())
	}
	errOut.Reset()
	a.ErrTTY = true
	p = a.newProgress("vm.create web1")
	p.update(50, "cloning\x1b[2J")
	p.clear()
	if got := errOut.String(); got != "\r\x1b[Kvm.create web1 [############............]  50% 0.0 s cloning\r\x1b[K" {
		t.Errorf("bar: %q", got)
	}
	errOut.Reset()
	a.flags.quiet = true
	p.update(60, "x")
	if errOut.Len() > 0 {
		t.Errorf("--quiet shows %q", errOut.String())
	}
}

func TestHistoryIsJoinedWithoutLossAfterAReconnect(t *testing.T) {
	for _, c := range []struct{ printed, history, want string }{
		{"counter 7\n", "boot\ncounter 7\ncounter 8\n", "counter 8\n"},
		{"counter 7\n", "boot\ncounter 7\n", ""},
		{"counter 7\n", "boot 2\ncounter 1\n", "boot 2\ncounter 1\n"},
		{"x\n", "x\nx\n", "x\n"},
	} {
		if got := string(after([]byte(c.printed), []byte(c.history))); got != c.want {
			t.Errorf("after(%q, %q) = %q, want %q", c.printed, c.history, got, c.want)
		}
	}
}
