// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storetest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/muster-vm/muster/configdb"
	"github.com/muster-vm/muster/internal/goodturn"
	"github.com/muster-vm/muster/internal/smalldisk"
)

const (
	// diskBytes holds a few segments of the log.
	diskBytes = 72 << 20
	// writePatience is above an election on a machine that stands still for a while.
	writePatience = 30 * time.Second
)

func write(db configdb.DB, key, value string) (uint64, error) {
	ctx, cancel := context.WithTimeout(context.Background(), writePatience)
	defer cancel()
	t := &configdb.Txn{}
	t.Put(key, []byte(value))
	return db.Txn(ctx, t)
}

// fillUntil writes through a node until another one has no space, however long that takes
// and however often there is another leader. It returns how many keys were acknowledged.
func fillUntil(t *testing.T, c *Cluster, through, full *Node) (keys int) {
	t.Helper()
	const size = 512 << 10
	big := strings.Repeat("x", size)
	for ; keys <= 2*diskBytes/size; keys++ {
		acknowledged := false
		c.Eventually("a write", func() error {
			if full.DiskFull() != nil {
				return nil
			}
			_, err := write(through, fmt.Sprintf("k%d", keys), big)
			acknowledged = err == nil
			return err
		})
		if !acknowledged {
			return keys
		}
	}
	t.Fatalf("its disk has space for %d writes", keys)
	return keys
}

func checkFull(t *testing.T, n *Node) {
	t.Helper()
	goodturn.Take(t, func(int) error {
		began := time.Now()
		if _, err := write(n, "refused", ""); !errors.Is(err, configdb.ErrDiskFull) {
			t.Errorf("write on a node whose disk is full: %v", err)
		}
		if took := time.Since(began); took > time.Second {
			return fmt.Errorf("the refusal took %s", took)
		}
		return nil
	})
}

func TestAFollowerWithAFullDiskComesBack(t *testing.T) {
	small := smalldisk.Mount(t, diskBytes)
	c := NewClusterIn(t, t.TempDir(), t.TempDir(), small)
	n := c.Nodes[2]
	if c.Leader() == n {
		c.Eventually("it hands over", n.TransferLeadership)
	}
	giveBack := smalldisk.Fill(t, small)
	fillUntil(t, c, c.Nodes[0], n)
	checkFull(t, n)
	for i := range 20 {
		if _, err := write(c.Nodes[0], fmt.Sprintf("meanwhile%d", i), "v"); err != nil {
			t.Fatalf("write %d while a follower has no space: %v", i, err)
		}
	}
	if c.Leader() == n {
		t.Error("the node without space leads")
	}
	giveBack()
	c.Eventually("it takes changes again", func() error {
		_, err := write(n, "again", "v")
		return err
	})
	if _, ok := n.Local().Get("meanwhile19"); !ok {
		t.Error("it lacks what was written meanwhile")
	}
}

func TestALeaderWithAFullDiskStepsDown(t *testing.T) {
	small := smalldisk.Mount(t, diskBytes)
	c := NewClusterIn(t, small, t.TempDir(), t.TempDir())
	n := c.Nodes[0]
	c.Eventually("the first one leads", func() error {
		l := c.Leader()
		if l == n {
			return nil
		}
		return errors.Join(fmt.Errorf("node %d leads", l.Index), l.TransferLeadershipTo(n.ID, n.Address))
	})
	giveBack := smalldisk.Fill(t, small)
	other := c.Nodes[1]
	keys := fillUntil(t, c, other, n)
	checkFull(t, n)
	c.Eventually("another one leads", func() error { // it notes that it has stepped down
		if c.Leader() == n {
			return errors.New("the node without space leads")
		}
		return nil
	})
	if _, err := write(other, "meanwhile", "v"); err != nil {
		t.Fatal(err)
	}
	giveBack()
	c.Eventually("it takes changes again", func() error {
		_, err := write(n, "again", "v")
		return err
	})
	for i := range keys {
		if _, ok := n.Local().Get(fmt.Sprintf("k%d", i)); !ok {
			t.Errorf("k%d was acknowledged and is lost", i)
		}
	}
}
