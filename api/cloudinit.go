// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"fmt"
	"regexp"
	"strings"
	"unicode/utf8"
)

// Limits of cloud-init.
const (
	// MaxUserData bounds user data and vendor data, each.
	MaxUserData = 64 << 10
	// MaxCloudInitKeys and MaxCloudInitKey bound the SSH keys.
	MaxCloudInitKeys = 32
	MaxCloudInitKey  = 8 << 10
	// MaxCloudInitPassword bounds the password before it is hashed.
	MaxCloudInitPassword = 128
	maxCloudInitUser     = 32
	maxPasswordHash      = 256
)

// CloudInitFormat is the form in which a guest finds its settings.
type CloudInitFormat string

// The formats. An empty one means CloudInitNoCloud.
const (
	// CloudInitNoCloud is for cloud-init on Linux and BSD: a CD-ROM with the
	// label cidata.
	CloudInitNoCloud CloudInitFormat = "nocloud"
	// CloudInitConfigDrive is for cloudbase-init on Windows: a CD-ROM with the
	// label config-2.
	CloudInitConfigDrive CloudInitFormat = "configdrive"
)

// CloudInitNetwork is how a guest configures its network cards.
type CloudInitNetwork string

// The ways. An empty one means CloudInitDHCP.
const (
	CloudInitDHCP CloudInitNetwork = "dhcp"
	// CloudInitStatic writes the reserved addresses into the guest.
	CloudInitStatic CloudInitNetwork = "static"
	// CloudInitNone leaves the network to the image.
	CloudInitNone CloudInitNetwork = "none"
)

// CloudInit is what a guest is told at its first boot. It is on a CD-ROM that is
// made anew, with the same content, at each start.
type CloudInit struct {
	Format CloudInitFormat `json:"format,omitempty" enum:"nocloud,configdrive"`
	// Hostname of the guest; the VM's name when empty.
	Hostname string `json:"hostname,omitempty"`
	// User that is made, or the image's default user when empty.
	User string `json:"user,omitempty"`
	// SSHKeys in the form of authorized_keys, for the user.
	SSHKeys []string `json:"sshKeys,omitempty" maxItems:"32"`
	// Password of the user. It is hashed when it arrives and never shown.
	Password string `json:"password,omitempty" doc:"hashed on arrival, never stored or shown"`
	// PasswordHash may be given instead, and counts if Password is empty: crypt(3),
	// SHA-512, SHA-256, bcrypt or yescrypt. It is never shown; what is not given
	// stays.
	PasswordHash string           `json:"passwordHash,omitempty" doc:"crypt(3) hash instead of password; never shown"`
	Network      CloudInitNetwork `json:"network,omitempty" enum:"dhcp,static,none"`
	// UserData is added to what is made of the fields above: cloud-config, a
	// script, or any other form that cloud-init knows; at most 64 KiB. Whoever may
	// read the VM may read it.
	UserData string `json:"userData,omitempty" maxLength:"65536"`
	// VendorData is what the image's provider wants, with less weight.
	VendorData string `json:"vendorData,omitempty" maxLength:"65536"`
}

// Clone returns a copy that shares nothing.
func (c *CloudInit) Clone() *CloudInit {
	if c == nil {
		return nil
	}
	out := *c
	out.SSHKeys = append([]string(nil), c.SSHKeys...)
	return &out
}

var (
	userName  = regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9_.-]*$`)
	cryptHash = regexp.MustCompile(`^\$(1|5|6|2[aby]|y|7|gy)\$[./A-Za-z0-9$=,-]+$`)
	hostLabel = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?$`)
	keyLine   = regexp.MustCompile(`^(ssh-|ecdsa-|sk-)[a-z0-9@.-]+ [A-Za-z0-9+/]+=* ?`)
)

func (c *CloudInit) validate(field string) error {
	if c == nil {
		return nil
	}
	at := func(name string) string { return field + "." + name }
	switch c.Format {
	case "", CloudInitNoCloud, CloudInitConfigDrive:
	default:
		return Invalid(at("format"), "is %q; give nocloud or configdrive", clip(string(c.Format)))
	}
	switch c.Network {
	case "", CloudInitDHCP, CloudInitStatic, CloudInitNone:
	default:
		return Invalid(at("network"), "is %q; give dhcp, static or none", clip(string(c.Network)))
	}
	if c.Hostname != "" {
		if len(c.Hostname) > 253 {
			return Invalid(at("hostname"), "is longer than 253 characters")
		}
		for label := range strings.SplitSeq(c.Hostname, ".") {
			if !hostLabel.MatchString(label) {
				return Invalid(at("hostname"), "%q is no host name", clip(c.Hostname))
			}
		}
	}
	if c.User != "" && (len(c.User) > maxCloudInitUser || !userName.MatchString(c.User)) {
		return Invalid(at("user"), "%q is no user name of at most %d characters", clip(c.User), maxCloudInitUser)
	}
	if err := c.validateSecrets(at); err != nil {
		return err
	}
	for _, d := range []struct{ name, data string }{{"userData", c.UserData}, {"vendorData", c.VendorData}} {
		if len(d.data) > MaxUserData {
			return Invalid(at(d.name), "has %d bytes; at most %d are taken", len(d.data), MaxUserData)
		}
		if !utf8.ValidString(d.data) || strings.ContainsRune(d.data, 0) {
			return Invalid(at(d.name), "is no text")
		}
	}
	return nil
}

func (c *CloudInit) validateSecrets(at func(string) string) error {
	if len(c.SSHKeys) > MaxCloudInitKeys {
		return Invalid(at("sshKeys"), "has %d keys; at most %d are taken", len(c.SSHKeys), MaxCloudInitKeys)
	}
	for i, k := range c.SSHKeys {
		if len(k) > MaxCloudInitKey || !keyLine.MatchString(k) || strings.ContainsAny(k, "\r\n\x00") {
			return Invalid(at(fmt.Sprintf("sshKeys[%d]", i)), "is no line of authorized_keys, such as: ssh-ed25519 AAAA… comment")
		}
	}
	switch {
	case len(c.Password) > MaxCloudInitPassword || strings.ContainsAny(c.Password, "\r\n\x00"):
		return Invalid(at("password"), "is longer than %d bytes or holds a line end", MaxCloudInitPassword)
	case c.PasswordHash != "" && (len(c.PasswordHash) > maxPasswordHash || !cryptHash.MatchString(c.PasswordHash)):
		return Invalid(at("passwordHash"), "is no hash of crypt(3); make one with mkpasswd -m sha512crypt")
	case c.Password+c.PasswordHash != "" && c.User == "":
		return Invalid(at("password"), "needs user")
	case c.Password+c.PasswordHash != "" && c.Format == CloudInitConfigDrive:
		return Invalid(at("password"), "is not possible in the format configdrive: Windows cannot be given a hash; use user data")
	}
	return nil
}
