// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package agent

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/muster-vm/muster/api"
)

// Bounds of what a guest says.
const (
	// MaxString is the longest string in bytes.
	MaxString      = 256
	maxCommands    = 512
	maxInterfaces  = 64
	maxAddresses   = 32
	maxSummary     = 16
	maxFileSystems = 128
	maxCommandName = 64
)

// clean makes a guest's string harmless to terminals, logs and pages.
func clean(s string) string {
	s = s[:min(len(s), 4*MaxString)]
	s = strings.ToValidUTF8(s, "\ufffd")
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t' || r == '\r':
			return ' '
		case !unicode.IsGraphic(r), unicode.Is(unicode.Cf, r), unicode.Is(unicode.Zl, r), unicode.Is(unicode.Zp, r):
			return -1
		}
		return r
	}, s)
	s = strings.TrimSpace(s)
	for len(s) > MaxString {
		_, n := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-n]
	}
	return s
}

// wireInfo is guest-info.
type wireInfo struct {
	Version  string `json:"version"`
	Commands []struct {
		Name    string `json:"name"`
		Enabled bool   `json:"enabled"`
	} `json:"supported_commands"`
}

func (w *wireInfo) commands() []string {
	var out []string
	for _, c := range w.Commands {
		if len(out) == maxCommands {
			break
		}
		if c.Enabled && commandName(c.Name) {
			out = append(out, c.Name)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func commandName(s string) bool {
	if len(s) == 0 || len(s) > maxCommandName {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '_'
	})
}

// wireOS is guest-get-osinfo.
type wireOS struct {
	ID      string `json:"id"`
	Name    string `json:"name"`
	Pretty  string `json:"pretty-name"`
	Version string `json:"version"`
	Kernel  string `json:"kernel-release"`
	Machine string `json:"machine"`
}

func (w *wireOS) os() *api.GuestOS {
	out := api.GuestOS{ID: clean(w.ID), Name: clean(w.Pretty), Version: clean(w.Version), Kernel: clean(w.Kernel), Machine: clean(w.Machine)}
	if out.Name == "" {
		out.Name = clean(w.Name)
	}
	return &out
}

// wireInterface is one of guest-network-get-interfaces.
type wireInterface struct {
	Name      string `json:"name"`
	MAC       string `json:"hardware-address"`
	Addresses []struct {
		IP     string `json:"ip-address"`
		Prefix int    `json:"prefix"`
	} `json:"ip-addresses"`
}

func interfaces(list []wireInterface) []api.GuestInterface {
	var out []api.GuestInterface
	for _, w := range list[:min(len(list), maxInterfaces)] {
		n := api.GuestInterface{Name: clean(w.Name)}
		if hw, err := net.ParseMAC(w.MAC); err == nil && len(hw) == 6 {
			n.MAC = hw.String()
		}
		for _, a := range w.Addresses[:min(len(w.Addresses), maxAddresses)] {
			ip, err := netip.ParseAddr(a.IP)
			if err != nil || ip.Zone() != "" {
				continue
			}
			if p := netip.PrefixFrom(ip, a.Prefix); p.IsValid() {
				n.Addresses = append(n.Addresses, p.String())
			}
		}
		out = append(out, n)
	}
	return out
}

// reachable are the addresses that others may reach, in order.
func reachable(list []api.GuestInterface) []string {
	var all []netip.Addr
	for _, n := range list {
		for _, a := range n.Addresses {
			if p, err := netip.ParsePrefix(a); err == nil && p.Addr().IsGlobalUnicast() {
				all = append(all, p.Addr())
			}
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	all = slices.Compact(all)
	var out []string
	for _, a := range all[:min(len(all), maxSummary)] {
		out = append(out, a.String())
	}
	return out
}

// wireFS is one of guest-get-fsinfo.
type wireFS struct {
	Name  string  `json:"name"`
	Mount string  `json:"mountpoint"`
	Type  string  `json:"type"`
	Used  float64 `json:"used-bytes"`
	Total float64 `json:"total-bytes"`
}

func fileSystems(list []wireFS) []api.GuestFileSystem {
	out := []api.GuestFileSystem{}
	for _, w := range list[:min(len(list), maxFileSystems)] {
		fs := api.GuestFileSystem{Device: clean(w.Name), Mount: clean(w.Mount), Type: clean(w.Type), Used: size(w.Used), Total: size(w.Total)}
		if fs.Used > fs.Total {
			fs.Used, fs.Total = 0, 0
		}
		out = append(out, fs)
	}
	return out
}

// maxBytes is an exabyte; who claims more is not believed.
const maxBytes = 1 << 60

func size(f float64) api.Size {
	if f >= 0 && f < maxBytes {
		return api.Size(f)
	}
	return 0
}

// hide leaves out what repeats a secret.
func hide(err error, secret string) error {
	var refused *CommandError
	if asCommand(err, &refused) && (len(secret) < 4 || strings.Contains(refused.Desc, secret[:4])) {
		return fmt.Errorf("the guest agent refused %s and its words are not shown, for they may repeat the password", refused.Command)
	}
	return err
}
