// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

const greeting = "RFB 003.008\n"

// screens returns a fixture with a running VM that has a screen.
func screens(t *testing.T) (*fixture, api.VM) {
	t.Helper()
	f := newFixture(t)
	vm := f.newVM("web1", api.VMStopped)
	want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/start"}), 202)
	vm = f.report(vm.Meta.ID, api.VMRunning)
	f.console.rings[vm.Meta.ID] = []byte(greeting)
	return f, vm
}

func (f *fixture) ticket(node, path string, role api.Role) api.ConsoleTicket {
	f.t.Helper()
	return want[api.ConsoleTicket](f.t, f.do(call{method: "POST", path: path, node: node, role: role}), http.StatusCreated)
}

// show opens a console with a ticket and nothing else.
func (f *fixture) show(node, path, ticket string) (*websocket.Conn, answer) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 3*watchPatience)
	f.t.Cleanup(cancel)
	c, resp, err := websocket.Dial(ctx, f.urls[node]+base+path+"?ticket="+url.QueryEscape(ticket), &websocket.DialOptions{Subprotocols: []string{vncProtocol}})
	if err != nil {
		if resp == nil {
			f.t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		return nil, answer{resp.StatusCode, resp.Header, b}
	}
	f.t.Cleanup(func() { _ = c.CloseNow() })
	return c, answer{status: http.StatusSwitchingProtocols}
}

func (f *fixture) greets(c *websocket.Conn) {
	f.t.Helper()
	if c == nil {
		f.t.Fatal("the console did not open")
	}
	typ, b, err := c.Read(f.t.Context())
	if err != nil || typ != websocket.MessageBinary || string(b) != greeting {
		f.t.Fatalf("%v %q %v, want the greeting", typ, b, err)
	}
}

func TestScreenOpensFromAnyNodeWithATicketOnce(t *testing.T) {
	f, _ := screens(t)
	for _, from := range []string{"m1", "m2"} {
		for _, to := range []string{"m1", "m2"} {
			k := f.ticket(from, "vms/web1/vnc", api.RoleOperator)
			if k.Kind != api.ConsoleVNC || k.VM != "web1" || k.Path != base+"vms/web1/vnc" || len(k.Ticket) < 22 || time.Until(k.ExpiresAt) > ticketLife {
				t.Fatalf("ticket %+v", k)
			}
			c, a := f.show(to, "vms/web1/vnc", k.Ticket)
			if c == nil {
				t.Fatalf("%s to %s: %d %s", from, to, a.status, a.body)
			}
			f.greets(c)
			if c.Subprotocol() != vncProtocol {
				t.Errorf("subprotocol %q", c.Subprotocol())
			}
			if err := c.Write(t.Context(), websocket.MessageBinary, []byte("bye")); err != nil {
				t.Fatal(err)
			}
			if _, _, err := c.Read(t.Context()); websocket.CloseStatus(err) != websocket.StatusNormalClosure {
				t.Errorf("the end of the screen: %v", err)
			}
			for _, again := range []string{"m1", "m2"} {
				_, a := f.show(again, "vms/web1/vnc", k.Ticket)
				if p := wantProblem(t, a, 401, api.CodeUnauthorized, ""); !strings.Contains(p.Detail, "used already") {
					t.Errorf("a used ticket at %s: %s", again, p.Detail)
				}
			}
		}
	}
	if got := f.audits("audit.vm.vnc"); len(got) != 4 || got[0].Spec.Actor != "operator" || got[0].Spec.Target != "web1" {
		t.Errorf("events of the four sessions: %+v", got)
	}
}

func TestTicketOpensNothingElse(t *testing.T) {
	f, vm := screens(t)
	other := f.newVM("web2", api.VMStopped)
	want[vmReply](t, f.do(call{method: "POST", path: "vms/web2/start"}), 202)
	f.report(other.Meta.ID, api.VMRunning)
	f.console.rings[other.Meta.ID] = []byte(greeting)
	home := f.binding(vm.Meta.ID).Spec.Node

	k := f.ticket(home, "vms/web1/vnc", api.RoleOperator)
	_, a := f.show(home, "vms/web1/console", k.Ticket)
	wantProblem(t, a, 403, api.CodeForbidden, "")
	_, a = f.show(f.binding(other.Meta.ID).Spec.Node, "vms/web2/vnc", k.Ticket)
	if a.status != 403 && a.status != 401 { // the other VM's node may not even know the ticket
		t.Errorf("a ticket of another VM: %d %s", a.status, a.body)
	}
	wantProblem(t, f.do(call{method: "GET", path: "vms/web1/screenshot?ticket=" + k.Ticket, token: "none"}), 401, api.CodeUnauthorized, "")
	wantProblem(t, f.do(call{method: "POST", path: "vms/web1/vnc?ticket=" + k.Ticket, token: "none"}), 401, api.CodeUnauthorized, "")
	c, _ := f.show(home, "vms/web1/vnc", k.Ticket) // none of this has used it up
	f.greets(c)

	// What a stranger is told does not depend on the VM.
	for _, name := range []string{"web1", "no-such"} {
		for _, node := range []string{"m1", "m2"} {
			_, a := f.show(node, "vms/"+name+"/vnc", "made-up")
			wantProblem(t, a, 401, api.CodeUnauthorized, "")
		}
	}
	// Another node may vouch for a caller, not for a ticket.
	away := map[string]string{"m1": "m2", "m2": "m1"}[home]
	h := map[string]string{testPeer: away, headerBy: away, headerActor: "root", headerRole: "administrator", "Connection": "Upgrade", "Upgrade": "websocket"}
	a = f.do(call{method: "GET", path: "vms/web1/vnc?ticket=made-up", node: home, token: "none", header: h})
	wantProblem(t, a, 401, api.CodeUnauthorized, "")
}

func TestSerialConsoleTakesTicketsToo(t *testing.T) {
	f, _ := screens(t)
	k := f.ticket("m2", "vms/web1/console", api.RoleOperator)
	if k.Kind != api.ConsoleSerial {
		t.Errorf("kind %s", k.Kind)
	}
	c, _ := f.show("m1", "vms/web1/console", k.Ticket)
	f.greets(c)
	wantProblem(t, f.do(call{method: "POST", path: "vms/web1/console", role: api.RoleViewer}), 403, api.CodeForbidden, "")
}

func TestTicketExpires(t *testing.T) {
	var k tickets
	now := time.Now()
	who := caller{actor: "ann", role: api.RoleOperator}
	text, expires, err := k.issue(now, "vm1", api.ConsoleVNC, who)
	if err != nil || expires.Sub(now) != 30*time.Second {
		t.Fatal(expires, err)
	}
	if _, err := k.claim(now.Add(ticketLife), text, "vm1", api.ConsoleVNC); api.CodeOf(err) != api.CodeUnauthorized || !strings.Contains(err.Error(), "expired") {
		t.Errorf("an old ticket: %v", err)
	}
	if got, err := k.claim(now.Add(ticketLife-1), text, "vm1", api.ConsoleVNC); err != nil || got != who {
		t.Errorf("a good ticket: %+v, %v", got, err)
	}
	for range maxTicketsEach - 1 {
		if _, _, err := k.issue(now, "vm1", api.ConsoleVNC, who); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := k.issue(now, "vm1", api.ConsoleVNC, who); api.CodeOf(err) != api.CodeRefused {
		t.Errorf("one ticket too many: %v", err)
	}
	if _, _, err := k.issue(now, "vm1", api.ConsoleVNC, caller{actor: "bob"}); err != nil {
		t.Errorf("somebody else's ticket: %v", err)
	}
	if _, _, err := k.issue(now.Add(ticketLife), "vm1", api.ConsoleVNC, who); err != nil || len(k.kept) != 1 {
		t.Errorf("old tickets stay: %d, %v", len(k.kept), err)
	}
}

func TestSessionEndsWithTheTokenThatTookTheTicket(t *testing.T) {
	f, vm := screens(t)
	home := f.binding(vm.Meta.ID).Spec.Node
	away := map[string]string{"m1": "m2", "m2": "m1"}[home]
	for _, s := range f.servers {
		s.pingEvery = 10 * time.Millisecond
	}
	text := f.addToken("short", api.TokenSpec{Role: api.RoleOperator, Use: api.TokenAPI})
	k := want[api.ConsoleTicket](t, f.do(call{method: "POST", path: "vms/web1/vnc", node: away, token: text}), http.StatusCreated)
	c, _ := f.show(away, "vms/web1/vnc", k.Ticket)
	f.greets(c)
	if a := f.do(call{method: "DELETE", path: "tokens/short"}); a.status != 204 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	if _, _, err := c.Read(t.Context()); err == nil || t.Context().Err() != nil {
		t.Errorf("the session goes on without the token: %v", err)
	}
}

func TestScreenRefusals(t *testing.T) {
	f, vm := screens(t)
	wantProblem(t, f.do(call{method: "GET", path: "vms/web1/vnc"}), 422, api.CodeInvalid, "Upgrade")
	wantProblem(t, f.do(call{method: "POST", path: "vms/no-such/vnc"}), 404, api.CodeNotFound, "")
	patch := func(body string) answer {
		return f.do(call{method: "PATCH", path: "vms/web1", body: body, header: map[string]string{"Content-Type": "application/merge-patch+json"}})
	}
	wantProblem(t, patch(`{"spec":{"display":"spice"}}`), 422, api.CodeInvalid, "spec.display")
	for _, node := range []string{"m1", "m2"} {
		a := f.do(call{method: "GET", path: "vms/web1/screenshot", node: node, role: api.RoleViewer})
		if a.status != 200 || a.header.Get("Content-Type") != "image/png" || string(a.body) != greeting[len(greeting)-4:] {
			t.Errorf("screenshot at %s: %d %q", node, a.status, a.body)
		}
	}
	want[vmReply](t, f.do(call{method: "POST", path: "vms/web1/stop"}), 202)
	f.report(vm.Meta.ID, api.VMStopped)
	for _, path := range []string{"vnc", "console"} {
		p := wantProblem(t, f.do(call{method: "POST", path: "vms/web1/" + path}), 409, api.CodeRefused, "")
		if !strings.Contains(p.Detail, "not running") {
			t.Error(p.Detail)
		}
	}
	wantProblem(t, f.do(call{method: "GET", path: "vms/web1/screenshot"}), 409, api.CodeRefused, "")
	if a := patch(`{"spec":{"display":"none"}}`); a.status != 200 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	f.txn(func(v *configdb.View, tx *configdb.Txn) error {
		o, err := configdb.VMs.Get(v, vm.Meta.ID)
		o.Status.Phase = api.VMRunning
		if err != nil {
			return err
		}
		return configdb.VMs.UpdateStatus(v, tx, &o)
	})
	for _, c := range []call{{method: "POST", path: "vms/web1/vnc"}, {method: "GET", path: "vms/web1/screenshot"}} {
		if p := wantProblem(t, f.do(c), 409, api.CodeRefused, ""); !strings.Contains(p.Detail, "display is none") {
			t.Error(p.Detail)
		}
	}
}

// TestTicketsAreNotLogged: whatever becomes of them.
func TestTicketsAreNotLogged(t *testing.T) {
	f, _ := screens(t)
	var log bytes.Buffer // handlers of one logger take turns
	all := slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	for _, s := range f.servers {
		s.log = all
	}
	k := f.ticket("m1", "vms/web1/vnc", api.RoleOperator)
	for _, node := range []string{"m1", "m2", "m1"} {
		c, _ := f.show(node, "vms/web1/vnc", k.Ticket)
		if c != nil {
			f.greets(c)
			_ = c.Write(t.Context(), websocket.MessageBinary, []byte("bye"))
			_, _, _ = c.Read(t.Context())
		}
	}
	for _, stop := range f.stops { // then the handlers have ended
		stop()
	}
	events, err := configdb.Events.List(f.db.Local())
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(events)
	if err != nil {
		t.Fatal(err)
	}
	if text := log.String() + string(b); strings.Contains(text, k.Ticket) || !strings.Contains(text, "/vnc") {
		t.Errorf("the ticket is in what is kept: %s", text)
	}
	for _, s := range f.servers {
		if strings.Contains(fmt.Sprint(s.tickets.kept), k.Ticket) {
			t.Error("the ticket itself is kept in memory")
		}
	}
}
