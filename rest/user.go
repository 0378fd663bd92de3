// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"fmt"
	"net/http"
	"slices"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/sshkey"
)

// sshKeyPrefix holds one claim for each key that lets a user in; its value is
// the user's ID. Two users with one key could not be told apart afterwards.
const sshKeyPrefix = configdb.Root + "claim/sshkey/"

type userResource struct {
	resource[api.UserSpec, api.UserStatus]
}

// newUsers: who may log in, and with what, is for administrators to see.
func newUsers() *userResource {
	r := &userResource{resource[api.UserSpec, api.UserStatus]{
		table: configdb.Users, need: needAdministrator, global: true,
	}}
	r.update, r.past = r.change, r.reverts()
	return r
}

// userRoutes are all routes of users.
func userRoutes(r *userResource) []route {
	out := append(reads(&r.resource), writes(&r.resource, needAdministrator)...)
	create := makes(&r.resource, needAdministrator, r.create)
	create.out, create.status, create.params = typeOf[api.User](), http.StatusCreated, saveParams
	return append(out, create, removes(&r.resource, r.delete))
}

// claims checks the keys of a user, brings them into their stored form and
// returns the claim of each.
func (r *userResource) claims(spec *api.UserSpec) ([]string, error) {
	var out []string
	for i, line := range spec.SSHKeys {
		key, err := sshkey.Parse(line)
		if err != nil {
			return nil, api.Invalid(keyField(i), "%v", err)
		}
		claim := sshKeyPrefix + key.Hash()
		if first := slices.Index(out, claim); first >= 0 {
			return nil, api.Invalid(keyField(i), "is the same key as %s", keyField(first))
		}
		out = append(out, claim)
		spec.SSHKeys[i] = key.Line()
	}
	return out, nil
}

func keyField(i int) string { return fmt.Sprintf("spec.sshKeys[%d]", i) }

// take claims the keys of a user, if they are nobody else's.
func (r *userResource) take(c *change, claims []string, id string) error {
	for place, key := range claims {
		if err := r.takeOne(c, key, place, id); err != nil {
			return err
		}
	}
	return nil
}

func (r *userResource) takeOne(c *change, key string, place int, id string) error {
	held, taken := c.v.Get(key)
	if taken && string(held.Value) == id {
		return nil
	}
	if taken {
		owner := string(held.Value)
		if u, err := r.table.Get(c.v, owner); err == nil {
			owner = u.Meta.Name
		}
		return &api.Error{Code: api.CodeRefused, Field: keyField(place), Detail: fmt.Sprintf("is a key of user %s already; each user needs a key of their own", owner)}
	}
	c.tx.RequireRevision(key, 0)
	c.tx.Put(key, []byte(id))
	return nil
}

// create answers POST /users.
func (r *userResource) create(q *request) error {
	o, body, err := r.decodeNew(q)
	if err != nil {
		return err
	}
	out, err := q.change(body, func(c *change) (*effect, error) {
		user := o.Clone()
		return r.make(c, &user)
	})
	if err != nil {
		return err
	}
	q.w.Header().Set("Location", base+"users/"+out.id)
	return q.answerObject(out)
}

func (r *userResource) make(c *change, user *api.User) (*effect, error) {
	claims, err := r.claims(&user.Spec)
	if err != nil {
		return nil, err
	}
	if err := r.resource.create(c, user); err != nil {
		return nil, err
	}
	if err := r.take(c, claims, user.Meta.ID); err != nil {
		return nil, err
	}
	return &effect{status: http.StatusCreated, kind: api.KindUser, id: user.Meta.ID, object: user}, nil
}

// change is the update of PUT and PATCH.
func (r *userResource) change(c *change, old, want *api.User) (*effect, error) {
	spec := want.Clone()
	now, err := r.claims(&spec.Spec)
	if err != nil {
		return nil, err
	}
	if err := r.take(c, now, old.Meta.ID); err != nil {
		return nil, err
	}
	for _, key := range r.held(c.v, old.Meta.ID) {
		if !slices.Contains(now, key) {
			c.tx.Delete(key)
		}
	}
	return r.store(c, &spec)
}

// held returns the claims of a user. It looks at all of them and not at the
// user's keys, which an older version may have stored in another form.
func (r *userResource) held(v *configdb.View, id string) []string {
	var out []string
	for e := range v.Scan(sshKeyPrefix, "") {
		if string(e.Value) == id {
			out = append(out, e.Key)
		}
	}
	return out
}

// delete answers DELETE /users/{name}. Sessions of the user end by themselves:
// the shell looks whether its users are still there.
func (r *userResource) delete(q *request) error { return r.drop(q, r.unmake) }

func (r *userResource) unmake(c *change, o *api.User) error {
	for _, key := range r.held(c.v, o.Meta.ID) {
		c.tx.Delete(key)
	}
	return nil
}
