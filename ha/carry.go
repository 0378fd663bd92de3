// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package ha

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"
)

// MethodCarry is the call by which a voter tells the leader who asks in pools in which
// the leader leaves no note, as a witness has none.
const MethodCarry = "ha.carry"

const (
	// blindAfter is for how long a leader's note does not change until questions in that
	// pool are carried to it, carryEvery how often they are looked for.
	blindAfter = 2 * surveyEvery
	carryEvery = time.Second
)

type carryRequest struct {
	Nodes []string `json:"nodes"`
}

type carryAnswer struct {
	Grant   renewAnswer `json:"grant"`
	Granted []string    `json:"granted"`
}

// ServeCarry answers MethodCarry. Every member has the key of the notes, so who asks for
// others can do no more than by a note that he writes in their name.
func (s *Service) ServeCarry(ctx context.Context, request []byte) ([]byte, error) {
	var r carryRequest
	if err := json.Unmarshal(request, &r); err != nil {
		return nil, fmt.Errorf("malformed request: %w", err)
	}
	if len(r.Nodes) > maxAnswered {
		return nil, fmt.Errorf("questions of %d nodes, of %d that may be carried at once", len(r.Nodes), maxAnswered)
	}
	a, granted, err := s.grant.renewByNotes(ctx, r.Nodes)
	if len(granted) == 0 {
		return nil, errors.Join(errors.New("no lease is granted"), err)
	}
	return json.Marshal(carryAnswer{a, granted})
}

// carry has the leader answer.
func (h *Heartbeat) carry(ctx context.Context, nodes []string) (renewAnswer, []string, error) {
	req, err := json.Marshal(carryRequest{nodes[:min(len(nodes), maxAnswered)]})
	if err != nil {
		return renewAnswer{}, nil, err
	}
	b, err := h.c.Caller.CallLeader(ctx, MethodCarry, req)
	if err != nil {
		return renewAnswer{}, nil, err
	}
	var a carryAnswer
	if err := json.Unmarshal(b, &a); err != nil {
		return renewAnswer{}, nil, fmt.Errorf("carry a question: malformed answer: %w", err)
	}
	return a.Grant, slices.DeleteFunc(a.Granted, func(id string) bool { return !slices.Contains(nodes, id) }), nil
}

// blind reports whether the leader leaves no note in a pool, so that it reads none there.
func (h *Heartbeat) blind(leader, pool string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	s, ok := h.sight[place{pool, leader}]
	return !ok || h.c.Now()-s.changed > blindAfter
}
