// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"encoding/base64"
	"net"
	"regexp"
	"strconv"
	"strings"
)

// CephSpec says where a pool of type rbd is. What VMs keep there are images of RBD in
// one pool of a Ceph cluster.
type CephSpec struct {
	// Pool of the Ceph cluster, and the namespace in it if it has any.
	Pool      string `json:"pool" doc:"name of the pool in the Ceph cluster"`
	Namespace string `json:"namespace,omitempty" doc:"RBD namespace in that pool"`
	// Monitors of the Ceph cluster: HOST or HOST:PORT each; 3300 without a port.
	Monitors []string `json:"monitors" doc:"monitors of the Ceph cluster, HOST or HOST:PORT (default 3300)"`
	// User is a client of cephx, without "client.".
	User string `json:"user" doc:"cephx user, without client."`
	// Key of the user, as in a keyring. Write only: it stays when it is left out,
	// unless the user changes.
	Key string `json:"key,omitempty" doc:"cephx key of the user; write only"`
	// KeySet says in answers that there is one.
	KeySet bool `json:"keySet,omitempty" readOnly:"true"`
	// SealedKey is how it is stored; never shown.
	SealedKey []byte `json:"sealedKey,omitempty" readOnly:"true"`
}

// Limits and defaults of Ceph.
const (
	maxMonitors    = 16
	cephPort       = 3300 // msgr2; 6789 is that of the older protocol
	minCephKey     = 16   // bytes, decoded
	maxCephKey     = 256
	cephClientWord = "client."
)

// cephName is what pools, namespaces and users are called; what it leaves out Ceph may
// take, but would have to be quoted everywhere.
var (
	cephName = regexp.MustCompile(`^[A-Za-z0-9._-]{1,100}$`)
	cephHost = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$`)
)

func (c *CephSpec) setDefaults() {
	c.KeySet = false
	c.User = strings.TrimPrefix(c.User, cephClientWord)
	for i, m := range c.Monitors {
		if _, _, err := net.SplitHostPort(m); err != nil && m != "" {
			c.Monitors[i] = net.JoinHostPort(strings.Trim(m, "[]"), strconv.Itoa(cephPort))
		}
	}
}

func (c *CephSpec) validate() error {
	for _, f := range []struct{ field, value, what string }{
		{"spec.ceph.pool", c.Pool, "the name of the pool in the Ceph cluster"},
		{"spec.ceph.user", c.User, "the cephx user, such as muster for client.muster"},
	} {
		if f.value == "" {
			return Invalid(f.field, "is missing; give %s", f.what)
		}
		if !cephName.MatchString(f.value) {
			return Invalid(f.field, "is %q; give %s, of letters, digits, dots, hyphens and underscores", clip(f.value), f.what)
		}
	}
	if c.Namespace != "" && !cephName.MatchString(c.Namespace) {
		return Invalid("spec.ceph.namespace", "is %q; give a name of letters, digits, dots, hyphens and underscores", clip(c.Namespace))
	}
	if len(c.Monitors) == 0 || len(c.Monitors) > maxMonitors {
		return Invalid("spec.ceph.monitors", "has %d entries; give 1 to %d monitors as HOST or HOST:PORT", len(c.Monitors), maxMonitors)
	}
	for _, m := range c.Monitors {
		host, port, err := net.SplitHostPort(m)
		n, perr := strconv.Atoi(port)
		if err != nil || perr != nil || n < 1 || n > 65535 || net.ParseIP(host) == nil && !cephHost.MatchString(host) {
			return Invalid("spec.ceph.monitors", "has %q; give HOST or HOST:PORT, an IPv6 address in brackets", clip(m))
		}
	}
	if c.Key == "" {
		return nil
	}
	if b, err := base64.StdEncoding.DecodeString(c.Key); err != nil || len(b) < minCephKey || len(b) > maxCephKey {
		return Invalid("spec.ceph.key", "is no cephx key; give the text behind \"key =\" in the user's keyring, or see it with: ceph auth get-key client.%s", c.User)
	}
	return nil
}

// KeyLabel is what the cephx key of a pool is sealed for.
func KeyLabel(poolID string) string { return "pool/" + poolID }
