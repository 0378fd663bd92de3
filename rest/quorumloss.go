// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

// quorumLost is the value of headerQuorum while the node that answers reaches no
// majority of the voters. The header is absent otherwise.
const quorumLost = "lost"

// sayNoQuorum puts into every answer to somebody who has logged in that this node
// reaches no majority, with what is to be known of it as warning.
func (q *request) sayNoQuorum() {
	if q.who.actor == "" || q.s.cfg.NoQuorum == nil {
		return
	}
	if l := q.s.cfg.NoQuorum(); l != nil {
		q.w.Header().Set(headerQuorum, quorumLost)
		q.setWarning(l.Banner)
	}
}
