// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"net"
	"net/http"
	"strings"
	"sync"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// access is what a route asks of its caller.
type access int

const (
	needNothing  access = iota // guarded by what it carries
	needLoopback               // a viewer, or anyone on this host
	needViewer
	needOperator
	needAdministrator
	needLocal // the unix socket
)

var rank = map[api.Role]access{
	api.RoleViewer: needViewer, api.RoleOperator: needOperator, api.RoleAdministrator: needAdministrator,
}

// localActor is the caller on the unix socket.
const localActor = "local:root"

const (
	tokenPrefix       = "muster_"
	tokenSecretLength = 43 // 32 bytes in unpadded base64url
)

// caller is who asks.
type caller struct {
	actor string
	role  api.Role
	// scope tells the idempotency keys of callers apart.
	scope string
	// secretHash is the hash of the token shown, to look again during a stream.
	tokenID, secretHash string
	// local is true on the unix socket, forwarded when another node sent the
	// request on.
	local, forwarded bool
	// lentID and lentHash are the token that another node was shown.
	lentID, lentHash string
	// ticket is true while a console ticket is all that the caller has shown.
	ticket bool
	// session is true for calls inside this process; see SessionHandler.
	session bool
}

func (c caller) may(need access) bool { return rank[c.role] >= need }

// login finds out who asks and whether the route is open to them.
func (q *request) login() error {
	need := q.route.need
	known, _ := q.ctx().Value(callerKey{}).(caller)
	if known.local {
		q.who = known
		return nil
	}
	switch {
	case need == needLocal:
		return api.Errorf(api.CodeForbidden, "this is answered on the host's unix socket only; run the command on that host with --data-dir")
	case need == needNothing, need == needLoopback && isLoopback(q.r.RemoteAddr):
		return nil
	case need == needLoopback:
		need = needViewer
	}
	if q.db == nil {
		return api.Errorf(api.CodeNotMember, "this host belongs to no cluster yet; run muster cluster init or join")
	}
	if q.shownTicket() {
		return q.loginByTicket()
	}
	q.who = known
	if !known.session {
		who, err := q.identify()
		if err != nil {
			return err
		}
		q.who = who
	}
	if !q.who.may(need) {
		return api.Errorf(api.CodeForbidden, "%s %s needs the role %s; %q has the role %s",
			q.r.Method, q.route.path, roleFor(need), q.who.actor, q.who.role)
	}
	return nil
}

func roleFor(need access) api.Role {
	for role, r := range rank {
		if r == need {
			return role
		}
	}
	return api.RoleAdministrator
}

func (q *request) identify() (caller, error) {
	if node, ok := q.s.cfg.PeerName(q.r); ok && q.r.Header.Get(headerBy) != "" {
		return forwardedCaller(q.r.Header, node)
	}
	scheme, token, _ := strings.Cut(q.r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") || token == "" {
		q.w.Header().Set("WWW-Authenticate", `Bearer realm="muster"`)
		return caller{}, api.Errorf(api.CodeUnauthorized, "no token; send Authorization: Bearer TOKEN")
	}
	who, err := q.s.verify(q.ctx(), q.db, strings.TrimSpace(token))
	if api.CodeOf(err) == api.CodeUnauthorized {
		q.w.Header().Set("WWW-Authenticate", `Bearer realm="muster", error="invalid_token"`)
	}
	return who, err
}

// forwardedCaller reads who asked another node, which has checked it.
func forwardedCaller(h http.Header, peer string) (caller, error) {
	by, actor, role := h.Get(headerBy), h.Get(headerActor), api.Role(h.Get(headerRole))
	if by != peer || actor == "" || rank[role] == 0 {
		return caller{}, api.Errorf(api.CodeForbidden, "node %s sent on a request with wrong %s, %s or %s headers", peer, headerBy, headerActor, headerRole)
	}
	who := caller{actor: actor, role: role, scope: "node:" + peer, forwarded: true}
	who.lentID, who.lentHash, _ = strings.Cut(h.Get(headerToken), " ")
	return who, nil
}

var errWrongToken = api.Errorf(api.CodeUnauthorized, "the token is unknown, expired or was deleted")

// verify checks a token's text.
func (s *Server) verify(ctx context.Context, db configdb.DB, text string) (caller, error) {
	id, secret, ok := splitToken(text)
	if !ok {
		return caller{}, errWrongToken
	}
	sum := sha256.Sum256([]byte(secret))
	hash := hex.EncodeToString(sum[:])
	v := db.Local()
	if _, ok := v.Get(configdb.Tokens.SpecKey(id)); !ok {
		// It may be newer than this replica. Without a quorum nobody can know:
		// a node that has just started has yet to learn every token.
		ctx, cancel := context.WithTimeout(ctx, readTimeout)
		defer cancel()
		fresh, err := db.View(ctx)
		if err != nil {
			return caller{}, api.Errorf(api.CodeNoQuorum, "node %s does not know the token, and no majority of the cluster answered it within %s: %w", s.cfg.Node(), readTimeout, err)
		}
		v = fresh
	}
	return s.holder(v, id, hash)
}

// holder returns the caller that a token stands for in a view.
func (s *Server) holder(v *configdb.View, id, hash string) (caller, error) {
	t, err := s.tokens.get(v, id)
	if err != nil {
		if api.CodeOf(err) == api.CodeNotFound {
			return caller{}, errWrongToken
		}
		return caller{}, err
	}
	right := subtle.ConstantTimeCompare([]byte(hash), []byte(t.Spec.Hash)) == 1
	expired := !t.Spec.ExpiresAt.IsZero() && !s.cfg.Now().Before(t.Spec.ExpiresAt)
	if !right || expired || t.Spec.Use != api.TokenAPI || t.Meta.Deleting() {
		return caller{}, errWrongToken
	}
	return caller{actor: t.Meta.Name, role: t.Spec.Role, scope: id, tokenID: id, secretHash: hash}, nil
}

// keptTokens bounds the decoded tokens that a node keeps.
const keptTokens = 1024

// tokenCache keeps decoded tokens: every call shows one, and they hardly change.
// Its zero value is ready.
type tokenCache struct {
	mu   sync.RWMutex
	kept map[string]api.Token
}

// get returns the token with an ID as it is in a view. It is shared: the caller
// must not change what it refers to.
func (c *tokenCache) get(v *configdb.View, id string) (api.Token, error) {
	spec, ok := v.Get(configdb.Tokens.SpecKey(id))
	status, _ := v.Get(configdb.Tokens.StatusKey(id))
	c.mu.RLock()
	t, kept := c.kept[id]
	c.mu.RUnlock()
	if ok && kept && t.Meta.Revision == spec.Revision && t.Meta.StatusRevision == status.Revision {
		return t, nil
	}
	t, err := configdb.Tokens.Get(v, id)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		delete(c.kept, id)
		return t, err
	}
	if c.kept == nil || len(c.kept) >= keptTokens {
		c.kept = map[string]api.Token{}
	}
	c.kept[id] = t
	return t, nil
}

// stillWelcome reports whether the caller of a stream would be let in again,
// so that a deleted or expired token also ends what it has opened.
func (q *request) stillWelcome() bool {
	if q.who.tokenID == "" {
		return true
	}
	who, err := q.s.holder(q.db.Local(), q.who.tokenID, q.who.secretHash)
	return err == nil && who.may(q.route.need)
}

func splitToken(text string) (id, secret string, ok bool) {
	rest, ok := strings.CutPrefix(text, tokenPrefix)
	if !ok || len(rest) < tokenSecretLength+2 {
		return "", "", false
	}
	cut := len(rest) - tokenSecretLength
	id, secret = rest[:cut-1], rest[cut:]
	return id, secret, rest[cut-1] == '_' && api.IsID(id)
}

func isLoopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		host = addr
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}
