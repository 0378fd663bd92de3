// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

// Package cloudinit makes the CD-ROM from which a guest takes its settings at its
// first boot: NoCloud for cloud-init, a configuration drive for cloudbase-init.
// It is one pure function without goroutines, clocks or I/O.
//
// Guarantees: equal input gives equal bytes, so that the target of a migration
// makes the same CD-ROM as its source. The instance's identity is that of the
// VM: a clone is another instance and is set up anew, a VM that was renamed, moved
// or started again is not.
//
// Non-guarantees: the user's own data are passed on as they are, well-formed or
// not.
package cloudinit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/isofs"
)

// Labels of the CD-ROMs, by which guests find them.
const (
	noCloudLabel     = "cidata"
	configDriveLabel = "config-2"
)

// NIC is one network card as the guest shall use it.
type NIC struct {
	Slot int
	MAC  string
	// Address with its prefix length is empty for DHCP.
	Address string
	Gateway string
	DNS     []string
	Domain  string
	MTU     int
}

// Image returns the CD-ROM of a VM whose spec.cloudInit is set.
func Image(vm *api.VM, nics []NIC) ([]byte, error) {
	c := vm.Spec.CloudInit
	user, err := userData(c)
	if err != nil {
		return nil, err
	}
	var files []isofs.File
	label := noCloudLabel
	if c.Format == api.CloudInitConfigDrive {
		label = configDriveLabel
		files, err = configDrive(vm, user, nics)
	} else {
		files, err = noCloud(vm, user, nics)
	}
	if err != nil {
		return nil, err
	}
	return isofs.Image(label, files)
}

func hostname(vm *api.VM) string {
	if h := vm.Spec.CloudInit.Hostname; h != "" {
		return h
	}
	return vm.Meta.Name
}

func noCloud(vm *api.VM, user []byte, nics []NIC) ([]isofs.File, error) {
	c := vm.Spec.CloudInit
	meta, err := yaml.Marshal(map[string]any{"instance-id": "muster-" + vm.Meta.ID, "local-hostname": hostname(vm)})
	if err != nil {
		return nil, err
	}
	files := []isofs.File{{Path: "meta-data", Data: meta}, {Path: "user-data", Data: user}}
	if c.VendorData != "" {
		files = append(files, isofs.File{Path: "vendor-data", Data: []byte(c.VendorData)})
	}
	if c.Network != api.CloudInitNone && len(nics) > 0 {
		network, err := yaml.Marshal(networkV2(nics))
		if err != nil {
			return nil, err
		}
		files = append(files, isofs.File{Path: "network-config", Data: network})
	}
	return files, nil
}

// networkV2 is cloud-init's "Networking config Version 2".
func networkV2(nics []NIC) map[string]any {
	cards := map[string]any{}
	for _, n := range nics {
		card := map[string]any{"match": map[string]any{"macaddress": n.MAC}}
		if n.MTU > 0 {
			card["mtu"] = n.MTU
		}
		if n.Address == "" {
			card["dhcp4"] = true
		} else {
			card["addresses"] = []string{n.Address}
			if n.Gateway != "" {
				card["routes"] = []any{map[string]any{"to": "0.0.0.0/0", "via": n.Gateway}}
			}
			if names := nameservers(&n); names != nil {
				card["nameservers"] = names
			}
		}
		cards[fmt.Sprintf("nic%d", n.Slot)] = card
	}
	return map[string]any{"version": 2, "ethernets": cards}
}

func nameservers(n *NIC) map[string]any {
	if len(n.DNS) == 0 {
		return nil
	}
	out := map[string]any{"addresses": n.DNS}
	if n.Domain != "" {
		out["search"] = []string{n.Domain}
	}
	return out
}

// boundary separates the parts of user data. Whoever has it in his own data would
// cut them, so that it is lengthened until he has not.
const boundary = "==muster-cloud-init"

// userData joins what is made of the fields with the user's own. One of them
// alone is passed on as it is; both are a multipart message, in which cloud-init
// takes each part by its own first line.
func userData(c *api.CloudInit) ([]byte, error) {
	own, err := cloudConfig(c)
	if err != nil {
		return nil, err
	}
	switch {
	case c.UserData == "" && own == nil:
		return []byte("#cloud-config\n{}\n"), nil
	case c.UserData == "":
		return own, nil
	case own == nil:
		return []byte(c.UserData), nil
	}
	line := boundary
	for strings.Contains(c.UserData, line) {
		line += "="
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "Content-Type: multipart/mixed; boundary=%q\nMIME-Version: 1.0\n\n", line)
	fmt.Fprintf(&b, "--%s\nContent-Type: text/cloud-config; charset=\"utf-8\"\nMIME-Version: 1.0\n\n%s\n", line, own)
	fmt.Fprintf(&b, "--%s\nContent-Type: %s; charset=\"utf-8\"\nMIME-Version: 1.0\nContent-Transfer-Encoding: 8bit\n\n%s\n--%s--\n", line, typeOf(c.UserData), c.UserData, line)
	return b.Bytes(), nil
}

// typeOf is the MIME type by which cloud-init knows a form of user data, from its
// first line.
func typeOf(data string) string {
	for _, t := range []struct{ begins, mime string }{
		{"#!", "text/x-shellscript"}, {"#cloud-config-archive", "text/cloud-config-archive"}, {"#cloud-config", "text/cloud-config"},
		{"#include", "text/x-include-url"}, {"#cloud-boothook", "text/cloud-boothook"}, {"## template: jinja", "text/jinja2"},
		{"#part-handler", "text/part-handler"},
	} {
		if strings.HasPrefix(data, t.begins) {
			return t.mime
		}
	}
	return "text/plain"
}

// cloudConfig is what is made of the fields, nil if there is nothing to say. The
// user replaces the image's default one and keeps its groups and rights.
func cloudConfig(c *api.CloudInit) ([]byte, error) {
	out := map[string]any{}
	if c.User != "" {
		user := map[string]any{"name": c.User}
		if c.PasswordHash != "" {
			user["lock_passwd"], user["passwd"], user["hashed_passwd"] = false, c.PasswordHash, c.PasswordHash
			out["ssh_pwauth"] = true
		}
		out["user"], out["users"] = user, []any{"default"}
	}
	if len(c.SSHKeys) > 0 {
		out["ssh_authorized_keys"] = c.SSHKeys
	}
	if len(out) == 0 {
		return nil, nil
	}
	b, err := yaml.Marshal(out)
	return append([]byte("#cloud-config\n"), b...), err
}

// configDrive is OpenStack's configuration drive, as cloudbase-init reads it.
func configDrive(vm *api.VM, user []byte, nics []NIC) ([]isofs.File, error) {
	c := vm.Spec.CloudInit
	keys := map[string]string{}
	for i, k := range c.SSHKeys {
		keys[fmt.Sprintf("key%d", i+1)] = k
	}
	meta := map[string]any{"uuid": vm.Meta.ID, "name": vm.Meta.Name, "hostname": hostname(vm), "public_keys": keys}
	if c.User != "" {
		meta["meta"] = map[string]string{"admin_username": c.User}
	}
	b, err := json.Marshal(meta)
	if err != nil {
		return nil, err
	}
	files := []isofs.File{{Path: "openstack/latest/meta_data.json", Data: b}, {Path: "openstack/latest/user_data", Data: user}}
	if c.VendorData != "" {
		b, err := json.Marshal(map[string]string{"cloud-init": c.VendorData})
		if err != nil {
			return nil, err
		}
		files = append(files, isofs.File{Path: "openstack/latest/vendor_data.json", Data: b})
	}
	if c.Network != api.CloudInitNone && len(nics) > 0 {
		network, err := networkData(nics)
		if err != nil {
			return nil, err
		}
		files = append(files, isofs.File{Path: "openstack/latest/network_data.json", Data: network})
	}
	return files, nil
}

// networkData is OpenStack's network_data.json.
func networkData(nics []NIC) ([]byte, error) {
	links, networks, services := []any{}, []any{}, []any{}
	for i, n := range nics {
		id := fmt.Sprintf("nic%d", n.Slot)
		link := map[string]any{"id": id, "type": "phy", "ethernet_mac_address": n.MAC}
		if n.MTU > 0 {
			link["mtu"] = n.MTU
		}
		links = append(links, link)
		network := map[string]any{"id": fmt.Sprintf("network%d", i), "link": id, "type": "ipv4_dhcp"}
		if n.Address != "" {
			p, err := netip.ParsePrefix(n.Address)
			if err != nil {
				return nil, err
			}
			mask := netip.AddrFrom4([4]byte{255, 255, 255, 255})
			if masked, err := mask.Prefix(p.Bits()); err == nil {
				mask = masked.Addr()
			}
			network["type"], network["ip_address"], network["netmask"] = "ipv4", p.Addr().String(), mask.String()
			if n.Gateway != "" {
				network["routes"] = []any{map[string]any{"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": n.Gateway}}
			}
			for _, s := range n.DNS {
				services = append(services, map[string]any{"type": "dns", "address": s})
			}
		}
		networks = append(networks, network)
	}
	return json.Marshal(map[string]any{"links": links, "networks": networks, "services": services})
}
