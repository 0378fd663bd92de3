// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"net/http"
	"sync"
	"time"

	"github.com/muster-vm/muster/api"
)

// A browser cannot set headers on a WebSocket, so that consoles also take a
// ticket in the query: random, good for one connection to one console of one VM
// within ticketLife, kept in the memory of the node that runs the VM and nowhere
// else. A daemon that starts again has forgotten all of them.

const (
	ticketLife = 30 * time.Second
	// ticketBytes of randomness.
	ticketBytes = 32
	// maxTickets bounds those of one node, maxTicketsEach those of one actor,
	// used ones included until their time is over.
	maxTickets     = 4096
	maxTicketsEach = 256
)

// ticketActor is who asks with a ticket, until its node has said whose it is.
const ticketActor = "console-ticket"

// headerToken carries the ID of the caller's token and the hash of its secret
// to the node that makes a ticket, so that the session ends with the token.
const headerToken = "Muster-Forwarded-Token"

var errWrongTicket = api.Errorf(api.CodeUnauthorized, "the ticket is unknown or expired, or its node has started again; take a new one with POST")

type ticket struct {
	vm      string
	kind    api.ConsoleKind
	who     caller
	expires time.Time
	used    bool
}

// tickets are those of this node. The zero value is ready.
type tickets struct {
	mu   sync.Mutex
	kept map[[sha256.Size]byte]*ticket // by the hash of their text
}

// issue makes a ticket.
func (t *tickets) issue(now time.Time, vm string, kind api.ConsoleKind, who caller) (text string, expires time.Time, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	mine := 0
	for h, k := range t.kept {
		switch {
		case !now.Before(k.expires):
			delete(t.kept, h)
		case k.who.actor == who.actor:
			mine++
		}
	}
	if mine >= maxTicketsEach || len(t.kept) >= maxTickets {
		return "", expires, api.Errorf(api.CodeRefused, "too many console tickets were made within %s; wait a little", ticketLife)
	}
	var b [ticketBytes]byte
	_, _ = rand.Read(b[:]) // never fails
	text, expires = base64.RawURLEncoding.EncodeToString(b[:]), now.Add(ticketLife)
	if t.kept == nil {
		t.kept = map[[sha256.Size]byte]*ticket{}
	}
	t.kept[sha256.Sum256([]byte(text))] = &ticket{vm: vm, kind: kind, who: who, expires: expires}
	return text, expires, nil
}

// claim uses a ticket up and returns whose it is.
func (t *tickets) claim(now time.Time, text, vm string, kind api.ConsoleKind) (caller, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	k := t.kept[sha256.Sum256([]byte(text))]
	switch {
	case k == nil:
		return caller{}, errWrongTicket
	case !now.Before(k.expires):
		return caller{}, api.Errorf(api.CodeUnauthorized, "the ticket has expired: it was good for %s; take a new one with POST", ticketLife)
	case k.vm != vm || k.kind != kind:
		return caller{}, api.Errorf(api.CodeForbidden, "the ticket is for another console: one ticket opens one kind of console of one VM")
	case k.used:
		return caller{}, api.Errorf(api.CodeUnauthorized, "the ticket was used already; take a new one with POST")
	}
	k.used = true
	return k.who, nil
}

// shownTicket reports whether a ticket stands in for a login. It is checked by
// the node that made it; see enter.
func (q *request) shownTicket() bool { return q.route.ticket != "" && q.param("ticket") != "" }

// loginByTicket lets a request pass that has nothing but a ticket. Until enter
// has checked it the caller has no rights at all.
func (q *request) loginByTicket() error {
	q.who = caller{actor: ticketActor, role: api.RoleViewer, ticket: true}
	if node, ok := q.s.cfg.PeerName(q.r); ok && q.r.Header.Get(headerBy) != "" {
		who, err := forwardedCaller(q.r.Header, node)
		if err != nil {
			return err
		}
		q.who.forwarded = who.forwarded
	}
	return nil
}

// enter checks the ticket, if that is how the caller came, on the node that the
// VM runs on; from then on the caller is who took the ticket.
func (q *request) enter(vmID string) error {
	if !q.who.ticket {
		return nil
	}
	who, err := q.s.tickets.claim(q.s.cfg.Now(), q.param("ticket"), vmID, q.route.ticket)
	if err != nil {
		return err
	}
	who.forwarded = q.who.forwarded
	q.who = who
	return nil
}

// ticket answers POST /vms/{name}/vnc and /console.
func (r *vmResource) ticket(kind api.ConsoleKind, path string) func(*request) error {
	return func(q *request) error {
		vm, node, err := r.consoleOwner(q)
		if err != nil {
			return err
		}
		if err := hasConsole(&vm); err != nil {
			return err
		}
		if kind == api.ConsoleVNC && !screenOf(&vm).Shown() {
			return noDisplay(&vm)
		}
		if node != q.s.cfg.Node() {
			return q.proxy(node)
		}
		who := caller{actor: q.who.actor, role: q.who.role, tokenID: cmp.Or(q.who.tokenID, q.who.lentID), secretHash: cmp.Or(q.who.secretHash, q.who.lentHash)}
		text, expires, err := q.s.tickets.issue(q.s.cfg.Now(), vm.Meta.ID, kind, who)
		if err != nil {
			return err
		}
		q.reply(http.StatusCreated, q.db.Local().Revision(), api.ConsoleTicket{
			Ticket: text, Kind: kind, VM: vm.Meta.Name, Path: base + "vms/" + vm.Meta.Name + path, ExpiresAt: expires.UTC(),
		})
		return nil
	}
}
