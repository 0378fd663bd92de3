// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"net/http"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// TokenReply answers POST /tokens. The secret is shown once.
type TokenReply struct {
	Token  string     `json:"token"`
	Object *api.Token `json:"object"`
}

type tokenResource struct {
	resource[api.TokenSpec, api.TokenStatus]
}

func newTokens() *tokenResource {
	return &tokenResource{resource[api.TokenSpec, api.TokenStatus]{
		table: configdb.Tokens, need: needAdministrator, global: true,
		show: func(_ *configdb.View, o *api.Token) { o.Spec.Hash = "" },
	}}
}

// create answers POST /tokens.
func (r *tokenResource) create(q *request) error {
	o, body, err := r.decodeNew(q)
	if err != nil {
		return err
	}
	if o.Spec.Use != api.TokenAPI {
		return api.Invalid("spec.use", "is %q; tokens to join are made with muster cluster token create", clip(string(o.Spec.Use)))
	}
	if o.Spec.JoinRole != "" {
		return api.Invalid("spec.joinRole", "belongs to tokens to join")
	}
	if !o.Spec.ExpiresAt.IsZero() && !q.s.cfg.Now().Before(o.Spec.ExpiresAt) {
		return api.Invalid("spec.expiresAt", "is in the past")
	}
	o.Spec.UsedBy, o.Spec.UsedKey = "", ""
	var random [32]byte
	_, _ = rand.Read(random[:]) // never fails, it ends the program instead
	secret := base64.RawURLEncoding.EncodeToString(random[:])
	sum := sha256.Sum256([]byte(secret))
	o.Spec.Hash = hex.EncodeToString(sum[:])
	out, err := q.change(body, func(c *change) (*effect, error) {
		if err := r.resource.create(c, &o); err != nil {
			return nil, err
		}
		return &effect{status: http.StatusCreated, kind: api.KindToken, id: o.Meta.ID}, nil
	})
	if err != nil {
		return err
	}
	shown := o.Clone()
	r.shown(nil, &shown)
	q.w.Header().Set("Location", base+"tokens/"+o.Meta.ID)
	q.reply(http.StatusCreated, out.revision, TokenReply{
		Token: tokenPrefix + o.Meta.ID + "_" + secret, Object: &shown,
	})
	return nil
}

// delete answers DELETE /tokens/{name}.
func (r *tokenResource) delete(q *request) error {
	return r.drop(q, nil)
}
