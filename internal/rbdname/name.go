// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rbdname

import (
	"encoding/json"
	"fmt"
	"net"
	"strings"
)

// Prefix of every name.
const Prefix = "rbd://"

// Name says where an image is and who opens it.
type Name struct {
	// Monitors are HOST:PORT each.
	Monitors []string
	User     string
	// Key is the ID of the secret of the user.
	Key                    string
	Pool, Namespace, Image string
	// Snapshot of the image, if that is meant.
	Snapshot string
}

// String is rbd://USER@MONITOR,MONITOR/POOL/NAMESPACE/IMAGE[@SNAPSHOT]#KEY. None of the
// parts has one of these separators: api.CephSpec refuses them.
func (n Name) String() string {
	image := n.Image
	if n.Snapshot != "" {
		image += "@" + n.Snapshot
	}
	return Prefix + n.User + "@" + strings.Join(n.Monitors, ",") + "/" + n.Pool + "/" + n.Namespace + "/" + image + "#" + n.Key
}

// Is reports whether a path is a name of this package.
func Is(path string) bool { return strings.HasPrefix(path, Prefix) }

// Parse is the inverse of String.
func Parse(s string) (Name, error) {
	bad := fmt.Errorf("%q is no name of an rbd image", s)
	rest, ok := strings.CutPrefix(s, Prefix)
	if !ok || strings.ContainsAny(s, "\x00\r\n") {
		return Name{}, bad
	}
	var n Name
	rest, n.Key, ok = cutLast(rest, "#")
	if !ok {
		return Name{}, bad
	}
	parts := strings.Split(rest, "/")
	if len(parts) != 4 {
		return Name{}, bad
	}
	user, monitors, ok := strings.Cut(parts[0], "@")
	if !ok || user == "" || parts[1] == "" || parts[3] == "" {
		return Name{}, bad
	}
	n.User, n.Pool, n.Namespace = user, parts[1], parts[2]
	n.Image, n.Snapshot, _ = strings.Cut(parts[3], "@")
	for m := range strings.SplitSeq(monitors, ",") {
		if _, _, err := net.SplitHostPort(m); err != nil {
			return Name{}, bad
		}
		n.Monitors = append(n.Monitors, m)
	}
	if n.Image == "" {
		return Name{}, bad
	}
	return n, nil
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// Same reports whether a file as QEMU tells it (QAPI BlockDeviceInfo, file) is what a
// path or name of ours says. QEMU tells an rbd image as "json:" and its options.
func Same(file, path string) bool {
	if !Is(path) || file == path {
		return file == path
	}
	n, err := Parse(path)
	text, ok := strings.CutPrefix(file, "json:")
	if err != nil || !ok {
		return false
	}
	var o struct {
		Driver, Pool, Namespace, Image, Snapshot string
	}
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return false
	}
	return o.Driver == "rbd" && o.Pool == n.Pool && o.Namespace == n.Namespace && o.Image == n.Image && o.Snapshot == n.Snapshot
}

// Option is one of QEMU's for a block node (QAPI BlockdevOptionsRbd). Dots in its key
// lead into structures and lists.
type Option struct{ Key, Value string }

// List are the options that open it, with the secret (QAPI SecretProperties) of an ID.
func (n Name) List(secret string) []Option {
	o := []Option{{"pool", n.Pool}, {"image", n.Image}, {"user", n.User}, {"key-secret", secret}}
	if n.Namespace != "" {
		o = append(o, Option{"namespace", n.Namespace})
	}
	if n.Snapshot != "" {
		o = append(o, Option{"snapshot", n.Snapshot})
	}
	for i, m := range n.Monitors {
		host, port, err := net.SplitHostPort(m)
		if err != nil {
			host, port = m, ""
		}
		at := fmt.Sprintf("server.%d.", i)
		o = append(o, Option{at + "host", host}, Option{at + "port", port})
	}
	return o
}

// Options is List in the form of QEMU's command line, with the driver.
func (n Name) Options(secret string) string {
	var b strings.Builder
	b.WriteString("driver=rbd")
	for _, o := range n.List(secret) {
		b.WriteString("," + o.Key + "=" + strings.ReplaceAll(o.Value, ",", ",,"))
	}
	return b.String()
}
