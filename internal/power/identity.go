// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package power

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/muster-vm/muster/api"
)

// uuidBytes is the length of a UUID (RFC 9562).
const uuidBytes = 16

// parseUUID reads a UUID with or without hyphens. The values that stand for
// "none" (SMBIOS, DSP0134 7.2.1: all 0 and all 1) are none.
func parseUUID(s string) (u [uuidBytes]byte, ok bool) {
	b, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(s), "-", ""))
	if err != nil || len(b) != uuidBytes {
		return u, false
	}
	copy(u[:], b)
	return u, meansSomething(u)
}

func meansSomething(u [uuidBytes]byte) bool {
	return u != [uuidBytes]byte{} && u != [uuidBytes]byte(slices.Repeat([]byte{0xff}, uuidBytes))
}

func formatUUID(u [uuidBytes]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// swapped returns a UUID with its first three fields in the other byte order:
// SMBIOS and many BMCs keep them little-endian, not all say so.
func swapped(u [uuidBytes]byte) [uuidBytes]byte {
	slices.Reverse(u[:4])
	slices.Reverse(u[4:6])
	slices.Reverse(u[6:8])
	return u
}

// readings are the UUIDs that 16 bytes of an IPMI GUID may stand for: BMCs have
// them as SMBIOS does, as RFC 9562 does, or wholly reversed (IPMI v2.0, 20.8).
func readings(guid [uuidBytes]byte) []string {
	if !meansSomething(guid) {
		return nil
	}
	reversed := guid
	slices.Reverse(reversed[:])
	return []string{formatUUID(swapped(guid)), formatUUID(guid), formatUUID(reversed)}
}

// compare says whether a device is of the host with a UUID, as far as anybody
// can tell.
func compare(ids []string, err error, host string) (api.PowerIdentity, string) {
	const look = "make sure yourself that it is wired to this node"
	mine, ok := parseUUID(host)
	switch {
	case err != nil:
		return api.IdentityUnknown, fmt.Sprintf("the device does not tell which host it is of (%v); %s", err, look)
	case len(ids) == 0:
		return api.IdentityUnknown, "the device does not tell which host it is of; " + look
	case !ok:
		return api.IdentityUnknown, "the node does not know its system UUID (/sys/class/dmi/id/product_uuid), so nothing can be compared; " + look
	}
	for _, id := range ids {
		if u, ok := parseUUID(id); ok && (u == mine || swapped(u) == mine) {
			return api.IdentitySame, "the device has the system UUID of this node"
		}
	}
	return api.IdentityOther, fmt.Sprintf("the device is of the host with the system UUID %s, this node has %s: it would switch off another host; correct the device's address", ids[0], formatUUID(mine))
}
