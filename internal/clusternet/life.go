// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package clusternet

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// A cluster that was recovered from lost quorum begins a new life. Its nodes
// still have the authority of the old one, so certificates do not tell the lives
// apart; the names of the protocols do. Life 2 speaks "muster-raft.2" where the
// first life speaks "muster-raft". A Raft connection of another life finds no
// protocol in common, in either direction. A call is answered with why, so that
// a node of an earlier life gets to know.

// Codes of the refusal of a call between lives.
const (
	// CodeOldLife: the caller is of an earlier life of the cluster.
	CodeOldLife = "old_life"
	// CodeNewLife: the node that was called is.
	CodeNewLife = "new_life"
)

// wireName is the ALPN name of a protocol in a life. The web has no lives: it
// is guarded by what is said in it.
func wireName(proto string, life uint64) string {
	if life <= 1 || !slices.Contains(clusterProtocols, proto) {
		return proto
	}
	return proto + "." + strconv.FormatUint(life, 10)
}

// splitWire is the inverse of wireName; a name that it cannot have made is
// returned as it is.
func splitWire(name string) (proto string, life uint64) {
	proto, number, ok := strings.Cut(name, ".")
	if !ok || !slices.Contains(clusterProtocols, proto) {
		return name, 1
	}
	life, err := strconv.ParseUint(number, 10, 64)
	if err != nil || wireName(proto, life) != name {
		return name, 1
	}
	return proto, life
}

func wireNames(protocols []string, life uint64) []string {
	out := make([]string, len(protocols))
	for i, p := range protocols {
		out[i] = wireName(p, life)
	}
	return out
}

// life of this node, at least 1.
func (id *Identity) life() uint64 { return max(1, id.Life) }

// otherLife returns, of what a client offers, the name under which it may call
// although it is of another life: only to be told so.
func (id *Identity) otherLife(offered []string) (name string, ok bool) {
	for _, o := range offered {
		if proto, life := splitWire(o); proto == ProtoRPC && life != id.life() {
			return o, true
		}
	}
	return "", false
}

// lifeError refuses a call between lives.
type lifeError struct {
	caller, own uint64
}

// Error implements error.
func (e lifeError) Error() string {
	if e.caller < e.own {
		return fmt.Sprintf("this cluster was recovered from lost quorum and is in its life %d; the calling node is of life %d and no member any more: clear it with musterd forget, then join again", e.own, e.caller)
	}
	return fmt.Sprintf("this node is of life %d of a cluster that was recovered from lost quorum and is in its life %d", e.own, e.caller)
}

// RPCCode implements the coded error of calls.
func (e lifeError) RPCCode() string {
	if e.caller < e.own {
		return CodeOldLife
	}
	return CodeNewLife
}
