// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/muster-vm/muster/api"
)

// Times and counts of the storage guard.
const (
	// fenceSeconds is how long a host stays locked out that nobody readmits: ten years.
	fenceSeconds = 10 * 365 * 24 * 3600
	// clientSeconds is that of a single client, a process that never comes back: it
	// outlives the lock of its host, so that an old QEMU stays out after that.
	clientSeconds = 30 * 24 * 3600
	// fenceRounds is how often the owners of volumes are looked for again, while new
	// ones appear.
	fenceRounds = 5
	// addressSeconds is how long the lock lasts by which a node learns its address.
	addressSeconds = 30
)

// rbdFencer locks hosts out by the blocklist of Ceph. An entry with port 0 and nonce 0
// is the whole address (OSDMap::is_blocklisted); one with both is one client.
type rbdFencer struct{ d *rbdDriver }

// client is one that has a volume open or locked.
type client struct {
	image, lock, locker string // lock and locker are empty for one that only watches
	address             string // ADDRESS:PORT/NONCE
}

// Addresses implements Fencer: what an OSD says of a client of this host, and the
// addresses from which the monitors are reached.
func (f rbdFencer) Addresses(ctx context.Context) ([]string, error) {
	seen, err := f.seen(ctx)
	if err != nil {
		return nil, err
	}
	found := map[string]bool{seen: true}
	if len(f.d.cmd.wrap) == 0 {
		for _, m := range f.d.spec.Monitors {
			conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "udp", m) // sends nothing
			if err != nil {
				continue // an address of a family that this host has not
			}
			if a, ok := conn.LocalAddr().(*net.UDPAddr); ok {
				found[a.AddrPort().Addr().Unmap().WithZone("").String()] = true
			}
			_ = conn.Close()
		}
	}
	return slices.Sorted(maps.Keys(found)), nil
}

// seen takes a lock on an object of its own and asks who has it.
func (f rbdFencer) seen(ctx context.Context) (string, error) {
	object := "muster-address-" + f.d.s.cfg.NodeID + "-" + rand.Text()[:8]
	rados := func(args ...string) []string {
		at := []string{"-p", f.d.spec.Pool}
		if f.d.spec.Namespace != "" {
			at = append(at, "-N", f.d.spec.Namespace)
		}
		return append(at, args...)
	}
	_, err := f.d.cmd.run(ctx, cephDeadline, programRados, rados("lock", "get", object, "address", "--lock-duration", strconv.Itoa(addressSeconds))...)
	if err != nil {
		return "", err
	}
	var lock struct {
		Lockers []struct {
			Address string `json:"addr"`
		} `json:"lockers"`
	}
	err = f.d.cmd.json(ctx, cephDeadline, &lock, programRados, rados("lock", "info", object, "address")...)
	_, rmErr := f.d.cmd.run(ctx, cephDeadline, programRados, rados("rm", object)...)
	if err = errors.Join(err, rmErr); err != nil {
		return "", err
	}
	if len(lock.Lockers) != 1 {
		return "", fmt.Errorf("find out the address of this node at the Ceph cluster: the lock on %s has %d owners", object, len(lock.Lockers))
	}
	return hostOf(lock.Lockers[0].Address)
}

// hostOf is the IP address of a client.
func hostOf(address string) (string, error) {
	endpoint, _, _ := strings.Cut(address, "/")
	host, _, err := net.SplitHostPort(endpoint)
	if err == nil {
		var ip netip.Addr
		if ip, err = netip.ParseAddr(host); err == nil {
			return ip.Unmap().String(), nil
		}
	}
	return "", fmt.Errorf("understand the address %q of a client of Ceph: %w", clip(address), err)
}

// Fence implements Fencer. First the blocklist, then the locks: a lock that is broken
// before stops nobody.
func (f rbdFencer) Fence(ctx context.Context, addrs, volumes []string, owners bool, still func(context.Context) error) (Fenced, error) {
	if still == nil {
		still = func(context.Context) error { return nil }
	}
	hosts, err := whole(addrs)
	if err != nil {
		return Fenced{}, err
	}
	for _, h := range hosts {
		if err := still(ctx); err != nil {
			return Fenced{}, err
		}
		if err := f.block(ctx, h, fenceSeconds); err != nil {
			return Fenced{}, err
		}
	}
	found := map[string]bool{}
	for round := 0; ; round++ {
		clients, err := f.clients(ctx, volumes)
		if err != nil {
			return Fenced{}, err
		}
		news := 0
		for _, c := range clients {
			if !found[c.address] && (owners || slices.Contains(hosts, entryOf(c.address))) {
				news++
				if err := still(ctx); err != nil {
					return Fenced{}, err
				}
				if err := f.block(ctx, c.address, clientSeconds); err != nil {
					return Fenced{}, err
				}
				found[c.address] = true
			}
		}
		if news == 0 {
			break
		}
		if round == fenceRounds {
			return Fenced{}, api.Errorf(api.CodeConflict, "clients keep opening the volumes that are to be fenced: %s", strings.Join(slices.Sorted(maps.Keys(found)), ", "))
		}
	}
	out := Fenced{Owners: slices.Sorted(maps.Keys(found))}
	if out.Epoch, err = f.inForce(ctx, append(hosts, out.Owners...)); err != nil {
		return Fenced{}, err
	}
	if err := still(ctx); err != nil {
		return Fenced{}, err
	}
	return out, f.breakLocks(ctx, volumes, found)
}

// inForce makes sure that entries are in the OSD map, and returns its epoch. A command
// that adds one ends when the monitors have committed the map. An OSD serves a client
// that knows this map, as everyone does who connects from now on, only when it has it,
// too.
func (f rbdFencer) inForce(ctx context.Context, entries []string) (uint64, error) {
	have, err := f.list(ctx)
	if err != nil {
		return 0, err
	}
	for _, e := range entries {
		if !have[e] {
			return 0, api.Errorf(api.CodeConflict, "%s is not on the blocklist of the Ceph cluster any more: somebody readmitted it", e)
		}
	}
	var stat struct {
		Epoch uint64 `json:"epoch"`
	}
	if err := f.d.cmd.json(ctx, cephDeadline, &stat, programCeph, "osd", "stat"); err != nil {
		return 0, err
	}
	if stat.Epoch == 0 {
		return 0, errors.New("ceph osd stat does not tell the epoch of the OSD map")
	}
	return stat.Epoch, nil
}

// breakLocks takes the locks of fenced clients away.
func (f rbdFencer) breakLocks(ctx context.Context, volumes []string, fenced map[string]bool) error {
	for _, id := range volumes {
		locks, err := f.locks(ctx, rbdVolume+id)
		if err != nil {
			return err
		}
		for _, c := range locks {
			if !fenced[c.address] {
				continue
			}
			err := f.d.rbd(ctx, "lock", "rm", f.d.at(c.image), c.lock, c.locker)
			if err != nil && !errors.Is(err, syscall.ENOENT) { // gone by itself
				return fmt.Errorf("break the lock of %s on %s: %w", c.address, f.d.at(c.image), err)
			}
		}
	}
	return nil
}

// clients are those that have volumes locked or open.
func (f rbdFencer) clients(ctx context.Context, volumes []string) ([]client, error) {
	var out []client
	for _, id := range volumes {
		image := rbdVolume + id
		locks, err := f.locks(ctx, image)
		if err != nil {
			return nil, err
		}
		out = append(out, locks...)
		var status struct {
			Watchers []struct {
				Address string `json:"address"`
			} `json:"watchers"`
		}
		if err := f.d.cmd.json(ctx, cephDeadline, &status, programRBD, "status", f.d.at(image)); err != nil && !errors.Is(err, syscall.ENOENT) {
			return nil, err
		}
		for _, w := range status.Watchers {
			if !slices.ContainsFunc(out, func(c client) bool { return c.image == image && c.address == w.Address }) {
				out = append(out, client{image: image, address: w.Address})
			}
		}
	}
	slices.SortFunc(out, func(a, b client) int { return cmp.Compare(a.address, b.address) })
	return out, nil
}

// block adds an entry to the blocklist, or prolongs it.
func (f rbdFencer) block(ctx context.Context, entry string, seconds int) error {
	if _, err := f.d.cmd.run(ctx, cephDeadline, programCeph, "osd", "blocklist", "add", entry, strconv.Itoa(seconds)); err != nil {
		return fmt.Errorf("lock %s out of the Ceph cluster: %w", entry, err)
	}
	return nil
}

// list is the blocklist.
func (f rbdFencer) list(ctx context.Context) (map[string]bool, error) {
	var all []struct {
		Address string `json:"addr"`
	}
	if err := f.d.cmd.json(ctx, cephDeadline, &all, programCeph, "osd", "blocklist", "ls"); err != nil {
		return nil, err
	}
	out := map[string]bool{}
	for _, e := range all {
		out[e.Address] = true
	}
	return out, nil
}

// release locks out who holds a volume's lock, and breaks that. A client that has ended
// without a word holds it until the OSDs have missed it for half a minute.
func (f rbdFencer) release(ctx context.Context, volume string) error {
	ctx, cancel := context.WithTimeout(ctx, cephDeadline)
	defer cancel()
	locks, err := f.locks(ctx, rbdVolume+volume)
	if err != nil || len(locks) == 0 {
		return err
	}
	done, err := f.Fence(ctx, nil, []string{volume}, true, nil)
	if err == nil {
		f.d.s.log.Warn("the lock of a client that ended without a word is broken", "pool", f.d.name, "volume", volume, "owners", done.Owners)
	}
	return err
}

// locks are those of one image.
func (f rbdFencer) locks(ctx context.Context, image string) ([]client, error) {
	var locks []struct {
		ID      string `json:"id"`
		Locker  string `json:"locker"`
		Address string `json:"address"`
	}
	err := f.d.cmd.json(ctx, cephDeadline, &locks, programRBD, "lock", "ls", f.d.at(image))
	if err != nil && !errors.Is(err, syscall.ENOENT) { // it is not in this pool, or was never made
		return nil, err
	}
	var out []client
	for _, l := range locks {
		out = append(out, client{image, l.ID, l.Locker, l.Address})
	}
	return out, nil
}

// Unfence implements Fencer. The entries of single clients stay until they expire.
func (f rbdFencer) Unfence(ctx context.Context, addrs []string) error {
	hosts, err := whole(addrs)
	if err != nil {
		return err
	}
	for _, h := range hosts {
		if _, err := f.d.cmd.run(ctx, cephDeadline, programCeph, "osd", "blocklist", "rm", h); err != nil {
			return fmt.Errorf("readmit %s to the Ceph cluster (client.%s needs the capability mon 'allow command \"osd blocklist\" with blocklistop=rm'): %w", h, f.d.spec.User, err)
		}
	}
	have, err := f.list(ctx)
	if err != nil {
		return err
	}
	for _, h := range hosts {
		if have[h] {
			return api.Errorf(api.CodeConflict, "%s is still on the blocklist of the Ceph cluster: somebody has locked it out anew", h)
		}
	}
	return nil
}

// Fenced implements Fencer.
func (f rbdFencer) Fenced(ctx context.Context, addrs []string) (bool, error) {
	hosts, err := whole(addrs)
	if err != nil || len(hosts) == 0 {
		return false, err
	}
	have, err := f.list(ctx)
	if err != nil {
		return false, err
	}
	return !slices.ContainsFunc(hosts, func(h string) bool { return !have[h] }), nil
}

// whole are the entries of the blocklist for whole hosts, as Ceph writes them.
func whole(addrs []string) ([]string, error) {
	var out []string
	for _, a := range addrs {
		ip, err := netip.ParseAddr(a)
		if err != nil || ip.Zone() != "" || ip.IsUnspecified() {
			return nil, api.Errorf(api.CodeInvalid, "%q is no IP address of a host", clip(a))
		}
		out = append(out, netip.AddrPortFrom(ip.Unmap(), 0).String()+"/0")
	}
	return out, nil
}

// entryOf is the entry that locks out the host of a client.
func entryOf(address string) string {
	host, err := hostOf(address)
	if err != nil {
		return ""
	}
	e, err := whole([]string{host})
	if err != nil {
		return ""
	}
	return e[0]
}
