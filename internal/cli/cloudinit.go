// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/pflag"

	"github.com/muster-vm/muster/api"
)

// maxKeysFile is the largest file of SSH keys that is read.
const maxKeysFile = 64 << 10

// cloudInitFlags say what a guest is told at its first boot.
type cloudInitFlags struct {
	user, hostname, network, format  string
	keys                             []string
	passwordFile, userData, vendored string
}

func (f *cloudInitFlags) bind(fs *pflag.FlagSet) {
	fs.StringVar(&f.user, "ci-user", "", "cloud-init: user to make")
	fs.StringArrayVar(&f.keys, "ssh-key", nil, "cloud-init: file with public keys for the user (repeatable)")
	fs.StringVar(&f.passwordFile, "ci-password-file", "", "cloud-init: file with the user's password, - for stdin; only its hash is stored")
	fs.StringVar(&f.hostname, "ci-hostname", "", "cloud-init: host name (default the VM's name)")
	fs.StringVar(&f.network, "ci-network", "", "cloud-init: dhcp, static or none (default \"dhcp\")")
	fs.StringVar(&f.userData, "user-data", "", "cloud-init: file with user data, - for stdin, at most 64 KiB")
	fs.StringVar(&f.vendored, "vendor-data", "", "cloud-init: file with vendor data, - for stdin, at most 64 KiB")
	fs.StringVar(&f.format, "ci-format", "", "cloud-init: nocloud, or configdrive for Windows (default \"nocloud\")")
}

// spec reads the files; nil when no flag was given.
func (f *cloudInitFlags) spec(a *app) (map[string]any, error) {
	out := map[string]any{}
	set(out, "user", f.user)
	set(out, "hostname", f.hostname)
	set(out, "network", f.network)
	set(out, "format", f.format)
	stdin := 0
	read := func(flag, path string, limit int64) (string, error) {
		if path == "-" {
			stdin++
		}
		if stdin > 1 {
			return "", usagef("--%s: stdin is read once; give - to one flag only", flag)
		}
		if path != "-" {
			if err := a.noLocalFile("--" + flag); err != nil {
				return "", err
			}
		}
		b, err := a.readFile(path, limit)
		if err != nil {
			return "", fmt.Errorf("--%s: %w", flag, err)
		}
		return string(b), nil
	}
	var keys []string
	for _, path := range f.keys {
		text, err := read("ssh-key", path, maxKeysFile)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(text) {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
				keys = append(keys, line)
			}
		}
	}
	if len(f.keys) > 0 && len(keys) == 0 {
		return nil, usagef("--ssh-key: no key in %s", strings.Join(f.keys, ", "))
	}
	if len(keys) > 0 {
		out["sshKeys"] = keys
	}
	for _, file := range []struct{ flag, path, field string }{
		{"user-data", f.userData, "userData"}, {"vendor-data", f.vendored, "vendorData"}, {"ci-password-file", f.passwordFile, "password"},
	} {
		if file.path == "" {
			continue
		}
		text, err := read(file.flag, file.path, api.MaxUserData)
		if err != nil {
			return nil, err
		}
		if file.field == "password" {
			text = strings.TrimRight(text, "\r\n")
		}
		if text == "" {
			return nil, usagef("--%s: %s is empty", file.flag, file.path)
		}
		out[file.field] = text
	}
	if len(out) == 0 {
		return nil, nil
	}
	return out, nil
}
