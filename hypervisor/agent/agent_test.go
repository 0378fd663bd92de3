// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/muster-vm/muster/api"
)

// guest is an agent under test, with as many lives as there are connections.
type guest struct {
	t *testing.T
	// say returns what is sent in answer to a command, the line end included;
	// nothing for silence. It may be changed while the guest runs.
	mu       sync.Mutex
	say      func(command string, args json.RawMessage) string
	before   string // sent ahead of each answer to a sync
	mute     bool   // no answer to a sync
	frozen   bool
	heard    []string
	dials    int
	password string
}

const allCommands = `{"return":{"version":"7.2.0","supported_commands":[
 {"name":"guest-ping","enabled":true},{"name":"guest-get-osinfo","enabled":true},{"name":"guest-get-host-name","enabled":true},
 {"name":"guest-network-get-interfaces","enabled":true},{"name":"guest-get-fsinfo","enabled":true},{"name":"guest-exec","enabled":true},
 {"name":"guest-exec-status","enabled":true},{"name":"guest-set-user-password","enabled":true},{"name":"guest-fsfreeze-status","enabled":true},
 {"name":"guest-fsfreeze-freeze","enabled":true},{"name":"guest-fsfreeze-thaw","enabled":true},{"name":"guest-file-open","enabled":false}]}}`

// honest answers as qemu-ga does.
func (g *guest) honest(command string, args json.RawMessage) string {
	switch command {
	case "guest-info":
		all := strings.ReplaceAll(allCommands, "\n", "")
		if g.frozen { // as qemu-ga does
			all = strings.ReplaceAll(all, `"guest-get-fsinfo","enabled":true`, `"guest-get-fsinfo","enabled":false`)
		}
		return all + "\n"
	case "guest-get-osinfo":
		return `{"return":{"id":"debian","name":"Debian","pretty-name":"Debian 12","version":"12","kernel-release":"6.1","machine":"x86_64"}}` + "\n"
	case "guest-get-host-name":
		return `{"return":{"host-name":"inside"}}` + "\n"
	case "guest-network-get-interfaces":
		return `{"return":[{"name":"lo","ip-addresses":[{"ip-address":"127.0.0.1","prefix":8}]},{"name":"eth0","hardware-address":"52:54:00:00:00:01","ip-addresses":[{"ip-address":"10.0.0.7","prefix":24},{"ip-address":"fe80::1","prefix":64}]}]}` + "\n"
	case "guest-get-fsinfo":
		return `{"return":[{"name":"vda2","mountpoint":"/","type":"ext4","used-bytes":1000,"total-bytes":4000,"disk":[]}]}` + "\n"
	case "guest-exec":
		return `{"return":{"pid":7}}` + "\n"
	case "guest-exec-status":
		return fmt.Sprintf(`{"return":{"exited":true,"exitcode":3,"out-data":%q,"err-data":%q}}`, base64.StdEncoding.EncodeToString([]byte("out\x00")), base64.StdEncoding.EncodeToString([]byte("err"))) + "\n"
	case "guest-fsfreeze-status":
		return fmt.Sprintf(`{"return":%q}`, map[bool]string{true: "frozen", false: "thawed"}[g.frozen]) + "\n"
	case "guest-fsfreeze-freeze":
		g.frozen = true
		return `{"return":2}` + "\n"
	case "guest-fsfreeze-thaw":
		g.frozen = false
		return `{"return":2}` + "\n"
	case "guest-set-user-password":
		var in struct{ Username, Password string }
		if err := json.Unmarshal(args, &in); err != nil {
			g.t.Error(err)
		}
		g.password = in.Username + ":" + in.Password
		return `{"return":{}}` + "\n"
	}
	return `{"error":{"class":"CommandNotFound","desc":"no such command"}}` + "\n"
}

func (g *guest) dial(context.Context) (net.Conn, error) {
	ours, theirs := net.Pipe()
	g.mu.Lock()
	g.dials++
	g.mu.Unlock()
	go g.live(theirs)
	return ours, nil
}

func (g *guest) live(c net.Conn) {
	defer func() { _ = c.Close() }()
	in := bufio.NewReader(c)
	for {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return
		}
		var r struct {
			Execute   string          `json:"execute"`
			Arguments json.RawMessage `json:"arguments"`
		}
		if err := json.Unmarshal(bytes.TrimLeft(line, "\xff"), &r); err != nil {
			g.t.Errorf("the agent was sent %q: %v", line, err)
			return
		}
		g.mu.Lock()
		g.heard = append(g.heard, r.Execute)
		answer := ""
		switch {
		case r.Execute == "guest-sync-delimited" && g.mute:
		case r.Execute == "guest-sync-delimited":
			var a struct{ ID int64 }
			_ = json.Unmarshal(r.Arguments, &a)
			answer = g.before + fmt.Sprintf("\xff{\"return\": %d}\n", a.ID)
		default:
			answer = g.say(r.Execute, r.Arguments)
		}
		g.mu.Unlock()
		if _, err := c.Write([]byte(answer)); err != nil {
			return
		}
	}
}

func (g *guest) set(f func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f()
}

func (g *guest) count(command string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := 0
	for _, h := range g.heard {
		if h == command {
			n++
		}
	}
	return n
}

func newGuest(t *testing.T) (*guest, *Agent, *bytes.Buffer) {
	t.Helper()
	g := &guest{t: t}
	g.say = g.honest
	var log bytes.Buffer
	a := New(Config{VM: "web1", Dial: g.dial, Log: slog.New(slog.NewTextHandler(&log, nil))})
	a.SetOpen(true)
	t.Cleanup(a.Close)
	return g, a, &log
}

func soon(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestWhatAnAgentKnows(t *testing.T) {
	changed := 0
	g, a, _ := newGuest(t)
	a.cfg.Changed = func() { changed++ }
	if !a.Due() {
		t.Error("an agent that was never asked is not due")
	}
	for range 2 {
		if err := a.Check(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	k := a.Known()
	if !k.Connected || !k.Answering || k.Problem != "" || k.Version != "7.2.0" || k.Hostname != "inside" || k.OS.Name != "Debian 12" || k.CheckedAt == nil {
		t.Errorf("%+v", k)
	}
	if slices.Contains(k.Commands, "guest-file-open") || !slices.Contains(k.Commands, "guest-exec") {
		t.Errorf("commands %v", k.Commands)
	}
	if len(k.Interfaces) != 2 || k.Interfaces[1].MAC != "52:54:00:00:00:01" || k.Interfaces[1].Addresses[0] != "10.0.0.7/24" {
		t.Errorf("interfaces %+v", k.Interfaces)
	}
	if s := a.Summary(); s == nil || len(s.Addresses) != 1 || s.Addresses[0] != "10.0.0.7" || s.OS != "Debian 12" {
		t.Errorf("summary %+v", s)
	}
	if changed != 1 || a.Due() {
		t.Errorf("%d changes, due %v", changed, a.Due())
	}
	if g.dials != 1 {
		t.Errorf("%d connections", g.dials)
	}
	fs, err := a.FileSystems(t.Context())
	if err != nil || len(fs) != 1 || fs[0].Mount != "/" || fs[0].Used != 1000 || fs[0].Total != 4000 {
		t.Errorf("%+v, %v", fs, err)
	}
}

func TestGuestWithoutAnAgentIsNotAsked(t *testing.T) {
	g, a, _ := newGuest(t)
	a.SetOpen(false)
	if a.Due() {
		t.Error("due")
	}
	if _, err := a.FileSystems(t.Context()); api.CodeOf(err) != api.CodeRefused || !strings.Contains(err.Error(), "qemu-guest-agent") {
		t.Error(err)
	}
	if k := a.Known(); k.Connected || k.Answering || k.Problem == "" {
		t.Errorf("%+v", k)
	}
	if g.dials != 0 {
		t.Errorf("%d connections", g.dials)
	}
}

func TestSilentAgentIsLeftAloneForLongerAndLonger(t *testing.T) {
	synctest.Test(t, silentAgentIsLeftAloneForLongerAndLonger)
}

func silentAgentIsLeftAloneForLongerAndLonger(t *testing.T) {
	g, a, _ := newGuest(t)
	now := time.Now()
	a.cfg.Now = func() time.Time { return now }
	g.mute = true
	var waits []time.Duration
	for range 7 {
		if err := a.Check(soon(t, 20*time.Millisecond)); api.CodeOf(err) != api.CodeTimeout {
			t.Fatal(err)
		}
		began := now
		for !a.Due() {
			now = now.Add(time.Second)
		}
		waits = append(waits, now.Sub(began))
	}
	if waits[0] != MinRetry || waits[1] != 2*MinRetry || waits[6] != MaxRetry {
		t.Error(waits)
	}
	if len(g.heard) != 7 || g.count("guest-sync-delimited") != 7 {
		t.Errorf("an agent that does not answer was sent %v", g.heard)
	}
	k := a.Known()
	if !k.Connected || k.Answering || !strings.Contains(k.Problem, "did not answer") {
		t.Errorf("%+v", k)
	}
	g.set(func() { g.mute = false })
	if err := a.Check(t.Context()); err != nil || !a.Known().Answering {
		t.Error(err)
	}
}

func TestLateAnswerIsThrownAway(t *testing.T) { synctest.Test(t, lateAnswerIsThrownAway) }

func lateAnswerIsThrownAway(t *testing.T) {
	g, a, _ := newGuest(t)
	g.before = `{"return":{"version":"stale"}}` + "\n" + "garbage \xff{\"return\": 1}\n\xff{]\n"
	if err := a.Check(t.Context()); err != nil || a.Known().Version != "7.2.0" {
		t.Fatal(a.Known().Version, err)
	}
	// The answer to a command that has given up comes while the next one waits.
	g.set(func() {
		g.say = func(string, json.RawMessage) string { return "" }
	})
	if err := a.session(soon(t, 50*time.Millisecond), func(ctx context.Context, c *conn) error {
		return c.command(ctx, "guest-get-fsinfo", nil, nil)
	}); api.CodeOf(err) != api.CodeTimeout {
		t.Fatal(err)
	}
	g.set(func() { g.say = g.honest })
	if fs, err := a.FileSystems(t.Context()); err != nil || len(fs) != 1 {
		t.Error(fs, err)
	}
}

func TestFloodsAndNonsenseAreContained(t *testing.T) {
	for name, answer := range map[string]string{
		"no end":           strings.Repeat("x", MaxReply+2*readBuffer),
		"too long":         `{"return":"` + strings.Repeat("x", MaxReply) + "\"}\n",
		"too deep":         strings.Repeat("[", 1000) + strings.Repeat("]", 1000) + "\n",
		"half":             `{"return":{"vers` + "\n",
		"nothing":          "\n",
		"neither":          "{}\n",
		"null":             `{"return":null}` + "\n",
		"other type":       `{"return":[1,2]}` + "\n",
		"two answers":      `{"return":3} {"return":4}` + "\n",
		"number too large": `{"return":{"version":1e999}}` + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			g, a, _ := newGuest(t)
			g.say = func(string, json.RawMessage) string { return answer }
			err := a.Check(soon(t, 10*time.Second))
			if err == nil || len(err.Error()) > 1000 {
				t.Fatalf("%.200v", err)
			}
			if k := a.Known(); k.Answering || k.Version != "" {
				t.Errorf("%+v", k)
			}
			g.set(func() { g.say = g.honest })
			if err := a.Check(t.Context()); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
	t.Run("flood before the sync", func(t *testing.T) {
		g, a, _ := newGuest(t)
		g.before = strings.Repeat("y", MaxReply+1)
		if err := a.Check(soon(t, 10*time.Second)); err == nil || !strings.Contains(err.Error(), "without the answer") {
			t.Error(err)
		}
	})
}

func TestLiesAreCutToSize(t *testing.T) {
	g, a, _ := newGuest(t)
	var nics, fs, commands []string
	for i := range 1000 {
		nics = append(nics, fmt.Sprintf(`{"name":"e%d\u001b[31m\u202e\n","hardware-address":"zz","ip-addresses":[%s{"ip-address":"10.0.0.1","prefix":24}]}`, i,
			strings.Repeat(`{"ip-address":"evil","prefix":999},`, 40)))
		fs = append(fs, `{"mountpoint":"`+strings.Repeat("/é", 500)+`","used-bytes":1e30,"total-bytes":-5}`)
		commands = append(commands, fmt.Sprintf(`{"name":"guest-x%d","enabled":true}`, i), `{"name":"Rm -Rf","enabled":true}`)
	}
	g.say = func(command string, args json.RawMessage) string {
		switch command {
		case "guest-info":
			return `{"return":{"version":"\u0007v\u009b","supported_commands":[{"name":"guest-get-fsinfo","enabled":true},{"name":"guest-network-get-interfaces","enabled":true},` + strings.Join(commands, ",") + "]}}\n"
		case "guest-network-get-interfaces":
			return `{"return":[` + strings.Join(nics, ",") + "]}\n"
		case "guest-get-fsinfo":
			return `{"return":[` + strings.Join(fs, ",") + "]}\n"
		}
		return g.honest(command, args)
	}
	if err := a.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	k := a.Known()
	if k.Version != "v" || len(k.Commands) > maxCommands || slices.Contains(k.Commands, "Rm -Rf") || len(k.Interfaces) != maxInterfaces {
		t.Errorf("%q, %d commands, %d interfaces", k.Version, len(k.Commands), len(k.Interfaces))
	}
	if n := k.Interfaces[3]; n.Name != "e3[31m" || n.MAC != "" || len(n.Addresses) != 0 {
		t.Errorf("%+q", n)
	}
	list, err := a.FileSystems(t.Context())
	if err != nil || len(list) != maxFileSystems || len(list[0].Mount) > MaxString || list[0].Used != 0 || list[0].Total != 0 {
		t.Errorf("%d %v", len(list), err)
	}
}

func TestExec(t *testing.T) { synctest.Test(t, exec) }

func exec(t *testing.T) {
	g, a, _ := newGuest(t)
	r, err := a.Exec(t.Context(), api.GuestExec{Command: []string{"/bin/x", "y"}, Seconds: 5})
	if err != nil || r.ExitCode != 3 || string(r.Stdout) != "out\x00" || string(r.Stderr) != "err" {
		t.Fatalf("%+v, %v", r, err)
	}
	g.set(func() {
		g.say = func(command string, args json.RawMessage) string {
			if command == "guest-exec-status" {
				return `{"return":{"exited":false}}` + "\n"
			}
			return g.honest(command, args)
		}
	})
	if _, err := a.Exec(t.Context(), api.GuestExec{Command: []string{"/bin/sleep"}, Seconds: 1}); api.CodeOf(err) != api.CodeTimeout || !strings.Contains(err.Error(), "process 7") {
		t.Errorf("a command without an end: %v", err)
	}
	big := base64.StdEncoding.EncodeToString(make([]byte, api.MaxExecOutput+1))
	g.set(func() {
		g.say = func(command string, args json.RawMessage) string {
			if command == "guest-exec-status" {
				return `{"return":{"exited":true,"signal":9,"out-data":"` + big + "\"}}\n"
			}
			return g.honest(command, args)
		}
	})
	r, err = a.Exec(t.Context(), api.GuestExec{Command: []string{"/bin/x"}, Seconds: 5})
	if err != nil || !r.Truncated || len(r.Stdout) != api.MaxExecOutput || r.ExitCode != 137 || r.Signal != 9 {
		t.Errorf("%d bytes, %+v, %v", len(r.Stdout), r.ExitCode, err)
	}
	a.execs = MaxExecs
	if _, err := a.Exec(t.Context(), api.GuestExec{Command: []string{"/bin/x"}, Seconds: 5}); api.CodeOf(err) != api.CodeRefused {
		t.Errorf("one command too many: %v", err)
	}
}

func TestPasswordIsInNoErrorAndNoLog(t *testing.T) {
	const secret = "correct horse"
	g, a, log := newGuest(t)
	if err := a.SetPassword(t.Context(), "root", secret); err != nil || g.password != "root:"+base64.StdEncoding.EncodeToString([]byte(secret)) {
		t.Fatal(g.password, err)
	}
	g.set(func() {
		g.say = func(string, json.RawMessage) string {
			return `{"error":{"class":"GenericError","desc":"chpasswd: root:correct horse is a bad password"}}` + "\n"
		}
	})
	err := a.SetPassword(t.Context(), "root", secret)
	if api.CodeOf(err) != api.CodeRefused || strings.Contains(err.Error(), "horse") || strings.Contains(log.String(), "horse") {
		t.Error(err, log)
	}
	g.set(func() {
		g.say = func(command string, _ json.RawMessage) string {
			return `{"return":{"version":"1","supported_commands":[]}}` + "\n"
		}
	})
	if err := a.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	was := g.count("guest-set-user-password")
	if err := a.SetPassword(t.Context(), "root", secret); api.CodeOf(err) != api.CodeUnsupported || g.count("guest-set-user-password") != was {
		t.Errorf("an agent that cannot: %v", err)
	}
}

func TestFrozenGuestIsThawed(t *testing.T) { synctest.Test(t, frozenGuestIsThawed) }

func frozenGuestIsThawed(t *testing.T) {
	g, a, _ := newGuest(t)
	n, until, err := a.Freeze(t.Context(), time.Minute)
	if err != nil || n != 2 || time.Until(until) < 50*time.Second {
		t.Fatal(n, until, err)
	}
	if _, _, err := a.Freeze(t.Context(), time.Minute); api.CodeOf(err) != api.CodeRefused || !strings.Contains(err.Error(), "frozen already") || g.count("guest-fsfreeze-freeze") != 1 {
		t.Errorf("frozen twice: %v", err)
	}
	if _, err := a.FileSystems(t.Context()); api.CodeOf(err) != api.CodeRefused || !strings.Contains(err.Error(), "thaw them first") {
		t.Errorf("a question to a frozen guest: %v", err)
	}
	if err := a.Check(t.Context()); err != nil || !a.Known().Frozen || g.count("guest-fsfreeze-thaw") != 0 {
		t.Errorf("a look at a frozen guest: %v", err)
	}
	if n, err := a.Thaw(t.Context()); err != nil || n != 2 || g.frozen || a.Known().Frozen {
		t.Error(n, err)
	}

	// By itself, when its time is over.
	if _, _, err := a.Freeze(t.Context(), 30*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	wait(t, "thawed by itself", func() bool { return !a.Known().Frozen })
	if g.count("guest-fsfreeze-thaw") != 2 {
		t.Errorf("%d thaws", g.count("guest-fsfreeze-thaw"))
	}

	// By its end.
	if _, _, err := a.Freeze(t.Context(), time.Minute); err != nil {
		t.Fatal(err)
	}
	a.Close()
	if g.frozen {
		t.Error("left frozen by Close")
	}

	// By the next life of the daemon.
	g.frozen = true
	b := New(Config{VM: "web1", Dial: g.dial, Log: slog.New(slog.DiscardHandler)})
	defer b.Close()
	b.SetOpen(true)
	if err := b.Check(t.Context()); err != nil || g.frozen || b.Known().Frozen {
		t.Errorf("found frozen: %v", err)
	}
	if _, err := b.FileSystems(t.Context()); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestFreezeWithoutAnAnswerIsUndone(t *testing.T) { synctest.Test(t, freezeWithoutAnAnswerIsUndone) }

func freezeWithoutAnAnswerIsUndone(t *testing.T) {
	g, a, _ := newGuest(t)
	g.say = func(command string, args json.RawMessage) string {
		if command == "guest-fsfreeze-freeze" {
			g.frozen = true
			return "" // it froze, and nobody heard
		}
		return g.honest(command, args)
	}
	if err := a.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := a.Freeze(soon(t, 50*time.Millisecond), time.Minute); api.CodeOf(err) != api.CodeTimeout {
		t.Fatal(err)
	}
	wait(t, "undone", func() bool { g.mu.Lock(); defer g.mu.Unlock(); return !g.frozen })
	wait(t, "forgotten", func() bool { return !a.Known().Frozen })
}

func wait(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not %s", what)
		}
	}
}

func TestCloseEndsACallUnderWay(t *testing.T) { synctest.Test(t, closeEndsACallUnderWay) }

func closeEndsACallUnderWay(t *testing.T) {
	g, a, _ := newGuest(t)
	g.mute = true
	ended := make(chan error, 1)
	go func() { ended <- a.Check(context.Background()) }()
	wait(t, "asked", func() bool { return g.count("guest-sync-delimited") > 0 })
	began := time.Now()
	a.Close()
	if err := <-ended; err == nil || time.Since(began) > 0 {
		t.Errorf("%v after %s", err, time.Since(began))
	}
}

// FuzzReplies: whatever a guest sends, nothing that is kept is out of bounds.
func FuzzReplies(f *testing.F) {
	g := &guest{}
	for _, c := range []string{"guest-info", "guest-get-osinfo", "guest-network-get-interfaces", "guest-get-fsinfo", "guest-exec-status", "guest-fsfreeze-status"} {
		f.Add([]byte(g.honest(c, nil)), []byte(g.honest("guest-info", nil)), []byte("\xff"))
	}
	f.Add([]byte("{\"return\":[[[[[[[[[[[[[[[[[[[[\n"), []byte(`{"error":{"class":"GenericError","desc":"\u001b]0;x\u0007"}}`+"\n"), []byte("\xff\xff{\"return\":0}\n"))
	f.Fuzz(func(t *testing.T, answer, info, before []byte) {
		g := &guest{t: t, before: string(before)}
		g.say = func(command string, _ json.RawMessage) string {
			if command == "guest-info" {
				return string(info) + "\n"
			}
			return string(answer) + "\n"
		}
		a := New(Config{VM: "web1", Dial: g.dial, Log: slog.New(slog.DiscardHandler)})
		defer a.Close()
		a.SetOpen(true)
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		_ = a.Check(ctx)
		fs, _ := a.FileSystems(ctx)
		b, err := json.Marshal(fs)
		if err != nil || len(fs) > maxFileSystems {
			t.Fatal(len(fs), err)
		}
		k := a.Known()
		text, err := json.Marshal(k)
		if err != nil || len(k.Commands) > maxCommands || len(k.Interfaces) > maxInterfaces || len(k.Version) > MaxString || len(k.Hostname) > MaxString {
			t.Fatalf("%v %s", err, text)
		}
		for _, s := range []string{string(b), string(text), k.Problem} {
			if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 }) {
				t.Fatalf("control characters in %q", s)
			}
		}
		var st execStatus
		var refused *CommandError
		if err := decode(answer, "guest-exec-status", &st); err == nil {
			if r := ended(&st); len(r.Stdout) > api.MaxExecOutput || len(r.Stderr) > api.MaxExecOutput {
				t.Fatal(len(r.Stdout))
			}
		} else if errors.As(err, &refused) && len(refused.Desc) > MaxString {
			t.Fatal(len(refused.Desc))
		}
	})
}

// FuzzDecode: the decoders alone, which is many times as fast as FuzzReplies.
func FuzzDecode(f *testing.F) {
	g := &guest{}
	for _, c := range []string{"guest-info", "guest-get-osinfo", "guest-network-get-interfaces", "guest-get-fsinfo", "guest-exec-status", "none"} {
		f.Add([]byte(g.honest(c, nil)))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		var info wireInfo
		var system wireOS
		var nics []wireInterface
		var list []wireFS
		var st execStatus
		var said []string
		if decode(answer, "x", &info) == nil {
			if c := info.commands(); len(c) > maxCommands {
				t.Fatal(len(c))
			}
			said = append(said, clean(info.Version))
		}
		if decode(answer, "x", &system) == nil {
			o := system.os()
			said = append(said, o.ID, o.Name, o.Version, o.Kernel, o.Machine)
		}
		if decode(answer, "x", &nics) == nil {
			all := interfaces(nics)
			if len(all) > maxInterfaces || len(reachable(all)) > maxSummary {
				t.Fatal(len(all))
			}
			for _, n := range all {
				said = append(append(said, n.Name, n.MAC), n.Addresses...)
			}
		}
		if decode(answer, "x", &list) == nil {
			for _, fs := range fileSystems(list) {
				said = append(said, fs.Device, fs.Mount, fs.Type)
				if fs.Used < 0 || fs.Used > fs.Total {
					t.Fatalf("%+v", fs)
				}
			}
		}
		var refused *CommandError
		if err := decode(answer, "x", &st); err == nil {
			if r := ended(&st); len(r.Stdout) > api.MaxExecOutput || len(r.Stderr) > api.MaxExecOutput {
				t.Fatal(len(r.Stdout))
			}
		} else if errors.As(err, &refused) {
			said = append(said, refused.Class, refused.Desc)
		}
		for _, s := range said {
			if len(s) > MaxString || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 }) {
				t.Fatalf("%q", s)
			}
		}
	})
}
