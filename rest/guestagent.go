// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
)

// agentTimeout bounds a question to a guest agent, freezing excepted.
const agentTimeout = 15 * time.Second

// freezeTimeout bounds freezing and thawing.
const freezeTimeout = 45 * time.Second

// agentRoutes are what is done through the agent inside a guest.
func (r *vmResource) agentRoutes() []route {
	one := base + "vms/{name}/agent"
	return []route{
		{method: http.MethodGet, path: one, need: needViewer, handle: r.guest(r.agent),
			summary: "What the guest agent says of itself and its guest", params: oneParams, out: typeOf[api.GuestAgent](), status: http.StatusOK},
		{method: http.MethodGet, path: one + "/filesystems", need: needViewer, handle: r.guest(r.agentFileSystems),
			summary: "The guest's file systems and how full they are", params: oneParams, out: typeOf[api.GuestFileSystems](), status: http.StatusOK},
		{method: http.MethodPost, path: one + "/exec", need: needAdministrator, handle: r.guest(r.agentExec), verb: "exec", stream: true,
			summary: "Run a command in the guest", params: saveParams, in: typeOf[api.GuestExec](), out: typeOf[api.GuestExecResult](), status: http.StatusOK},
		{method: http.MethodPost, path: one + "/password", need: needOperator, handle: r.guest(r.agentPassword), verb: "password",
			summary: "Change the password of a user of the guest", params: saveParams, in: typeOf[api.GuestPassword](), status: http.StatusNoContent},
		{method: http.MethodPost, path: one + "/freeze", need: needOperator, handle: r.guest(r.agentFreeze), verb: "freeze",
			summary: "Freeze the guest's file systems for a while", params: saveParams, in: typeOf[api.GuestFreeze](), out: typeOf[api.GuestFrozen](), status: http.StatusOK},
		{method: http.MethodPost, path: one + "/thaw", need: needOperator, handle: r.guest(r.agentThaw), verb: "thaw",
			summary: "Thaw the guest's file systems", params: saveParams, out: typeOf[api.GuestFrozen](), status: http.StatusOK},
	}
}

// guest calls f on the node that runs the VM.
func (r *vmResource) guest(f func(*request, *api.VM, Guest) error) func(*request) error {
	return func(q *request) error {
		vm, node, err := r.consoleOwner(q)
		if err != nil {
			return err
		}
		if err := hasConsole(&vm); err != nil {
			return err
		}
		if node != q.s.cfg.Node() {
			return q.proxy(node)
		}
		g, err := q.s.cfg.Consoles.Guest(vm.Meta.ID)
		if err != nil {
			return err
		}
		return f(q, &vm, g)
	}
}

// decodeOptional reads a body that may be left out.
func (q *request) decodeOptional(in any) error {
	body, err := q.body()
	if err != nil || len(body) == 0 {
		return err
	}
	return decode(body, in)
}

func (r *vmResource) agent(q *request, vm *api.VM, g Guest) error {
	ctx, cancel := context.WithTimeout(q.ctx(), agentTimeout)
	defer cancel()
	_ = g.Refresh(ctx) // what is wrong is in the answer
	k := g.Known()
	k.VM, k.Node = vm.Meta.Name, q.s.cfg.Node()
	q.reply(http.StatusOK, q.db.Local().Revision(), k)
	return nil
}

func (r *vmResource) agentFileSystems(q *request, vm *api.VM, g Guest) error {
	ctx, cancel := context.WithTimeout(q.ctx(), agentTimeout)
	defer cancel()
	list, err := g.FileSystems(ctx)
	if err != nil {
		return err
	}
	q.reply(http.StatusOK, q.db.Local().Revision(), api.GuestFileSystems{VM: vm.Meta.Name, Items: list})
	return nil
}

// maxAuditWords is how much of a command an event has.
const maxAuditWords = 1024

// agentExec is recorded with the command, without its input and environment,
// which may hold secrets; before it is run, so that nobody runs one that cannot
// be recorded.
func (r *vmResource) agentExec(q *request, vm *api.VM, g Guest) error {
	var in api.GuestExec
	body, err := q.body()
	if err != nil {
		return err
	}
	if err := decode(body, &in); err != nil {
		return err
	}
	if err := in.Validate(); err != nil {
		return err
	}
	ev := q.auditEvent(api.KindVM, vm.Meta)
	words := make([]string, 0, len(in.Command))
	for _, w := range in.Command {
		words = append(words, strconv.Quote(w))
	}
	text := strings.Join(words, " ")
	ev.Spec.Details["command"] = text[:min(len(text), maxAuditWords)]
	if err := q.writeAudit(&ev); err != nil {
		return err
	}
	out, err := g.Exec(q.ctx(), in)
	if err != nil {
		return err
	}
	q.reply(http.StatusOK, q.db.Local().Revision(), out)
	return nil
}

func (r *vmResource) agentPassword(q *request, vm *api.VM, g Guest) error {
	var in api.GuestPassword
	body, err := q.body()
	if err != nil {
		return err
	}
	if err := decode(body, &in); err != nil {
		// The words of the decoder repeat a part of the body.
		var e *api.Error
		if errors.As(err, &e) && e.Field != "" {
			return api.Invalid(e.Field, "is no field of a password change or of the wrong type; give user and password, both strings")
		}
		return api.Invalid("", "the body is no JSON object with user and password")
	}
	if err := in.Validate(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(q.ctx(), agentTimeout)
	defer cancel()
	if err := g.SetPassword(ctx, in.User, in.Password); err != nil {
		return err
	}
	ev := q.auditEvent(api.KindVM, vm.Meta)
	ev.Spec.Details["user"] = in.User
	if err := q.writeAudit(&ev); err != nil {
		q.s.log.Error("audit event not written", "event", ev.Spec.Type, "actor", ev.Spec.Actor, "vm", vm.Meta.ID, "err", err)
	}
	q.noContent(q.db.Local().Revision())
	return nil
}

func (r *vmResource) agentFreeze(q *request, vm *api.VM, g Guest) error {
	var in api.GuestFreeze
	if err := q.decodeOptional(&in); err != nil {
		return err
	}
	if err := in.Validate(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(q.ctx(), freezeTimeout)
	defer cancel()
	n, until, err := g.Freeze(ctx, time.Duration(in.Seconds)*time.Second)
	if err != nil {
		return err
	}
	q.auditAlone(api.KindVM, vm.Meta)
	until = until.UTC()
	q.reply(http.StatusOK, q.db.Local().Revision(), api.GuestFrozen{VM: vm.Meta.Name, FileSystems: n, Frozen: true, ThawsAt: &until})
	return nil
}

func (r *vmResource) agentThaw(q *request, vm *api.VM, g Guest) error {
	ctx, cancel := context.WithTimeout(q.ctx(), freezeTimeout)
	defer cancel()
	n, err := g.Thaw(ctx)
	if err != nil {
		return err
	}
	q.auditAlone(api.KindVM, vm.Meta)
	q.reply(http.StatusOK, q.db.Local().Revision(), api.GuestFrozen{VM: vm.Meta.Name, FileSystems: n})
	return nil
}
