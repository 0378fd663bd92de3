// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package node_test

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/clusternet"
)

// foul is what a removed node that does not obey keeps open to another.
type foul struct {
	what string
	conn *tls.Conn
}

// hold opens everything that the node h may open to another, with its own
// certificate and key.
func (h *host) hold(t *testing.T, id *clusternet.Identity, at *host) (out []foul) {
	t.Helper()
	peer := at.node(at.name).Meta.ID
	for _, proto := range []string{clusternet.ProtoRaft, clusternet.ProtoRPC, clusternet.ProtoH1} {
		c, err := id.Dial(t.Context(), peer, at.addr, proto)
		if err != nil {
			t.Fatalf("%s to %s: %v", proto, at.name, err)
		}
		t.Cleanup(func() { _ = c.Close() })
		out = append(out, foul{proto + " to " + at.name, c})
	}
	// A stream that the node forwards for a user whom only it has seen.
	stream := out[len(out)-1].conn
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+at.addr+"/api/v1/watch?kinds=node", nil)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range map[string]string{"Accept": "text/event-stream", "Muster-Forwarded-By": h.name, "Muster-Forwarded-Actor": "mallory", "Muster-Forwarded-Role": "administrator"} {
		r.Header.Set(k, v)
	}
	if err := r.Write(stream); err != nil {
		t.Fatal(err)
	}
	_ = stream.SetReadDeadline(time.Now().Add(60 * time.Second))
	resp, err := http.ReadResponse(bufio.NewReader(stream), r)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("the stream that a member forwards: %+v, %v", resp, err)
	}
	return out
}

// over waits for the end of a connection and says how it came.
func (f foul) over(within time.Duration) error {
	_ = f.conn.SetReadDeadline(time.Now().Add(within))
	buf := make([]byte, 4096)
	for {
		if _, err := f.conn.Read(buf); err != nil {
			var ne net.Error
			if errors.As(err, &ne) && ne.Timeout() {
				return fmt.Errorf("%s is still open", f.what)
			}
			return nil
		}
	}
}

func TestRemovedNodeIsLockedOutAtOnce(t *testing.T) {
	f := newFlock(t, 3)
	f.up()
	a, b, bad := f.nodes[0], f.nodes[1], f.nodes[2]
	f.certified(a)
	id, err := clusternet.NewIdentity(bad.file("node.crt"), bad.file("node.key"), bad.file("ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	held := append(bad.hold(t, id, a), bad.hold(t, id, b)...)
	for _, c := range held {
		if c.over(50*time.Millisecond) == nil {
			t.Fatalf("%s does not stay open for a member", c.what)
		}
	}
	w := f.keepWriting(f.ca)
	a.run("node", "remove", bad.name)
	removed := time.Now()
	for _, c := range held {
		if err := c.over(20 * time.Second); err != nil {
			t.Error(err)
		}
	}
	t.Logf("all ended within %v of the answer to the removal", time.Since(removed))
	for _, h := range []*host{a, b} {
		peer := a.node(h.name).Meta.ID
		c, err := id.Dial(t.Context(), peer, h.addr, clusternet.ProtoRaft)
		if err == nil && (foul{"a new Raft connection to " + h.name, c}).over(20*time.Second) != nil {
			t.Errorf("%s lets the removed node in for Raft", h.name)
		}
		rpc := clusternet.NewRPCClient(id)
		_, err = rpc.Call(t.Context(), peer, h.addr, "cluster.certify", []byte("{}"))
		rpc.Close()
		var re *clusternet.RemoteError
		if !errors.As(err, &re) || re.Code != "removed" {
			t.Errorf("%s answers a call of the removed node: %v", h.name, err)
		}
	}
	select {
	case <-bad.exited:
		if !strings.Contains(bad.log(), "was removed from cluster test") {
			t.Errorf("the removed node ended without saying why:\n%s", bad.log())
		}
	case <-time.After(60 * time.Second):
		t.Error("the removed node's own daemon goes on")
	}
	f.nodes = f.nodes[:2]
	w.trust(f.ca) // without the one that is gone
	w.end()
}

// In a group of two the one that stays needs the vote of the other until that
// has left; afterwards it is alone and goes on.
func TestRemovalInAGroupOfTwo(t *testing.T) {
	t.Parallel()
	f := newFlock(t, 2)
	f.up()
	f.certified(f.nodes[0])
	l := f.leader(f.nodes[0])
	gone := f.others(l)[0]
	l.run("node", "remove", gone.name)
	l.run("raw", "put", "alone/at", "last")
	select {
	case <-gone.exited:
	case <-time.After(60 * time.Second):
		t.Error("the removed node goes on")
	}
	var st api.ClusterStatus
	f.eventually(60*time.Second, "it is the only member", func() error {
		f.decode(l.run("cluster", "status", "-o", "json"), &st)
		if len(st.Members) != 1 || !st.Quorum {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
}
