// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"net"
	"regexp"
	"strings"
	"time"
)

// PowerDevice is what switches a node on and off: its baseboard management
// controller. It is a kind of its own, not a part of the node, because nodes
// are open to viewers, and because its password is handled as that of a
// receiver is.
type PowerDevice = Object[PowerDeviceSpec, struct{}]

// PowerDriver is how a device is spoken to.
type PowerDriver string

// The drivers: IPMI v2.0 over RMCP+ ("lanplus"), and DMTF Redfish over HTTPS.
const (
	PowerIPMI    PowerDriver = "ipmi"
	PowerRedfish PowerDriver = "redfish"
)

// PowerPrivilege is the privilege that an IPMI session asks for.
type PowerPrivilege string

// The privileges. An operator may switch power (IPMI v2.0, appendix G).
const (
	PrivilegeOperator      PowerPrivilege = "operator"
	PrivilegeAdministrator PowerPrivilege = "administrator"
)

// Limits of power devices.
const (
	DefaultPowerTimeout   = 8 * time.Second
	MinPowerTimeout       = time.Second
	MaxPowerTimeout       = time.Minute
	defaultIPMIPort       = 623
	defaultRedfishPort    = 443
	maxPowerOrder         = 99
	maxPowerText          = 255
	maxIPMIUser           = 16 // IPMI v2.0, 13.20
	maxIPMIPassword       = 20 // IPMI v2.0, 13.31
	maxPowerPassword      = 1024
	maxPowerCertificate   = 64 << 10
	fingerprintCharacters = 2 * sha256.Size
)

// PowerDeviceSpec is the definition. The password is sealed before it is
// stored and is never shown.
type PowerDeviceSpec struct {
	// Node that the device switches, by name. It cannot be changed.
	Node string `json:"node"`
	// NodeID is that node's: another that comes to have its name is not meant.
	NodeID string `json:"nodeID,omitempty" readOnly:"true"`
	// Order among the devices of the node: the lowest is tried first, 0 to 99.
	Order int `json:"order,omitempty"`
	// Driver is ipmi or redfish.
	Driver PowerDriver `json:"driver" enum:"ipmi,redfish"`
	// Address is a host name or an IP address, without a port.
	Address string `json:"address"`
	// Port is 623 for ipmi and 443 for redfish unless it is set.
	Port int `json:"port,omitempty"`
	// User of the device.
	User string `json:"user,omitempty"`
	// Password is write only. It stays when it is left out, unless driver,
	// address, port, user, caCert or fingerprint change: then it is needed again,
	// so that it goes nowhere without somebody who knows it.
	Password string `json:"password,omitempty"`
	// PasswordSet says in answers that there is one.
	PasswordSet bool `json:"passwordSet,omitempty" readOnly:"true"`
	// SealedPassword is how it is stored; never shown.
	SealedPassword []byte `json:"sealedPassword,omitempty" readOnly:"true"`
	// TimeoutSeconds is how long the device has for one action, 1 to 60; default 8.
	TimeoutSeconds int `json:"timeoutSeconds,omitempty"`
	// CipherSuite of ipmi: 17 or 3; by default 17 and, if the BMC does not know
	// it, 3. Others do not protect what is said and are not spoken.
	CipherSuite int `json:"cipherSuite,omitempty"`
	// Privilege of ipmi: operator (default) or administrator.
	Privilege PowerPrivilege `json:"privilege,omitempty" enum:"operator,administrator"`
	// SystemID of redfish, if the service has several systems.
	SystemID string `json:"systemID,omitempty"`
	// CACert of redfish is the PEM certificate of the authority to trust, and
	// Fingerprint the SHA-256 of the one certificate to trust, in hexadecimal. One
	// of them, or neither for an authority that the hosts trust.
	CACert      string `json:"caCert,omitempty"`
	Fingerprint string `json:"fingerprint,omitempty"`
	// Disabled devices are not used.
	Disabled bool `json:"disabled,omitempty"`
}

// SetDefaults implements Spec.
func (s *PowerDeviceSpec) SetDefaults() {
	if s.TimeoutSeconds == 0 {
		s.TimeoutSeconds = int(DefaultPowerTimeout / time.Second)
	}
	if s.Driver == PowerIPMI && s.Privilege == "" {
		s.Privilege = PrivilegeOperator
	}
	s.Fingerprint = strings.ToLower(strings.TrimPrefix(strings.ReplaceAll(s.Fingerprint, ":", ""), "sha256"))
	s.PasswordSet = false
}

// Within is how long the device has for one action.
func (s *PowerDeviceSpec) Within() time.Duration {
	if s.TimeoutSeconds <= 0 {
		return DefaultPowerTimeout
	}
	return time.Duration(s.TimeoutSeconds) * time.Second
}

// PortOrDefault returns the port that is used.
func (s *PowerDeviceSpec) PortOrDefault() int {
	switch {
	case s.Port != 0:
		return s.Port
	case s.Driver == PowerRedfish:
		return defaultRedfishPort
	}
	return defaultIPMIPort
}

var powerHost = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$`)

// Validate implements Spec.
func (s *PowerDeviceSpec) Validate() error {
	if s.Node == "" {
		return Invalid("spec.node", "is missing; name the node that the device switches")
	}
	if s.Order < 0 || s.Order > maxPowerOrder {
		return Invalid("spec.order", "is %d; give 0 to %d, the lowest is tried first", s.Order, maxPowerOrder)
	}
	if s.Address == "" || len(s.Address) > maxPowerText || net.ParseIP(s.Address) == nil && !powerHost.MatchString(s.Address) {
		return Invalid("spec.address", "%q is no host name or IP address; leave a port to spec.port", clip(s.Address))
	}
	if s.Port < 0 || s.Port > 65535 {
		return Invalid("spec.port", "is %d; give 1 to 65535, or leave it out", s.Port)
	}
	if least, most := int(MinPowerTimeout/time.Second), int(MaxPowerTimeout/time.Second); s.TimeoutSeconds < least || s.TimeoutSeconds > most {
		return Invalid("spec.timeoutSeconds", "is %d; give %d to %d", s.TimeoutSeconds, least, most)
	}
	if len(s.User) > maxPowerText {
		return Invalid("spec.user", "is longer than %d characters", maxPowerText)
	}
	if len(s.Password) > maxPowerPassword {
		return Invalid("spec.password", "is longer than %d characters", maxPowerPassword)
	}
	switch s.Driver {
	case PowerIPMI:
		return s.validateIPMI()
	case PowerRedfish:
		return s.validateRedfish()
	}
	return Invalid("spec.driver", "is %q; give ipmi or redfish", clip(string(s.Driver)))
}

func (s *PowerDeviceSpec) validateIPMI() error {
	if len(s.User) > maxIPMIUser {
		return Invalid("spec.user", "has more than %d characters, which IPMI does not allow", maxIPMIUser)
	}
	if len(s.Password) > maxIPMIPassword {
		return Invalid("spec.password", "has more than %d characters, which IPMI does not allow", maxIPMIPassword)
	}
	switch s.CipherSuite {
	case 0, 3, 17:
	default:
		return Invalid("spec.cipherSuite", "is %d; give 17 or 3, or leave it out: the others do not protect what is said", s.CipherSuite)
	}
	switch s.Privilege {
	case PrivilegeOperator, PrivilegeAdministrator:
	default:
		return Invalid("spec.privilege", "is %q; give operator or administrator", clip(string(s.Privilege)))
	}
	for _, f := range []struct{ field, value string }{{"systemID", s.SystemID}, {"caCert", s.CACert}, {"fingerprint", s.Fingerprint}} {
		if f.value != "" {
			return Invalid("spec."+f.field, "is for redfish only; leave it out with driver ipmi")
		}
	}
	return nil
}

func (s *PowerDeviceSpec) validateRedfish() error {
	switch {
	case s.User == "":
		return Invalid("spec.user", "is missing; Redfish needs one")
	case strings.Contains(s.User, ":"):
		return Invalid("spec.user", "has a colon, which HTTP does not allow")
	case s.CipherSuite != 0:
		return Invalid("spec.cipherSuite", "is for ipmi only; leave it out with driver redfish")
	case s.Privilege != "":
		return Invalid("spec.privilege", "is for ipmi only; leave it out with driver redfish")
	case len(s.SystemID) > maxPowerText:
		return Invalid("spec.systemID", "is longer than %d characters", maxPowerText)
	case s.CACert != "" && s.Fingerprint != "":
		return Invalid("spec.fingerprint", "and spec.caCert contradict each other; give one")
	}
	if s.Fingerprint != "" {
		if _, err := ParseFingerprint(s.Fingerprint); err != nil {
			return err
		}
	}
	if s.CACert == "" {
		return nil
	}
	if len(s.CACert) > maxPowerCertificate {
		return Invalid("spec.caCert", "is longer than %d bytes", maxPowerCertificate)
	}
	block, _ := pem.Decode([]byte(s.CACert))
	if block == nil {
		return Invalid("spec.caCert", "holds no certificate in PEM")
	}
	if _, err := x509.ParseCertificate(block.Bytes); err != nil {
		return Invalid("spec.caCert", "holds no certificate: %v", err)
	}
	return nil
}

// ParseFingerprint reads the SHA-256 of a certificate.
func ParseFingerprint(s string) ([]byte, error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(s) != fingerprintCharacters {
		return nil, Invalid("spec.fingerprint", "is not the SHA-256 of a certificate in %d hexadecimal characters", fingerprintCharacters)
	}
	return b, nil
}

// PowerVerb is one thing that a device is asked.
type PowerVerb string

// The verbs. Cycle is off and then on.
const (
	PowerConnect  PowerVerb = "connect"
	PowerRead     PowerVerb = "read"
	PowerIdentify PowerVerb = "identify"
	PowerOff      PowerVerb = "off"
	PowerOn       PowerVerb = "on"
	PowerCycle    PowerVerb = "cycle"
)

// PowerStep is one question to a device and its answer.
type PowerStep struct {
	At     time.Time `json:"at"`
	Device string    `json:"device"`
	Do     PowerVerb `json:"do"`
	OK     bool      `json:"ok"`
	// Answer of the device, or why there was none.
	Answer       string `json:"answer,omitempty"`
	Milliseconds int64  `json:"milliseconds"`
}

// PowerAction is one use of the devices of a node, with what they answered. It
// is kept as evidence.
type PowerAction = Object[PowerActionSpec, PowerActionStatus]

// PowerTrigger is who wanted an action.
type PowerTrigger string

// The triggers: the leader, because the node was silent, or a person.
const (
	TriggerHA      PowerTrigger = "ha"
	TriggerRequest PowerTrigger = "request"
)

// KeptPowerActions is how many actions are kept, the newest.
const KeptPowerActions = 100

// PowerActionSpec is what was to be done. It never changes.
type PowerActionSpec struct {
	NodeID string    `json:"nodeID"`
	Node   string    `json:"node"`
	Action PowerVerb `json:"action" enum:"off,on,cycle"`
	// Trigger is ha or request, Actor who asked.
	Trigger PowerTrigger `json:"trigger" enum:"ha,request"`
	Actor   string       `json:"actor,omitempty"`
	// Via is the node that spoke to the devices.
	Via string `json:"via,omitempty"`
	// Reason is why, in words.
	Reason string `json:"reason,omitempty"`
	// BootID of the node's daemon at the beginning, and Term of the leader.
	BootID string `json:"bootID,omitempty"`
	Term   uint64 `json:"term,omitempty"`
	// At is when it began.
	At time.Time `json:"at"`
}

// PowerActionPhase is how far an action is.
type PowerActionPhase string

// The phases. Confirmed: a device read the wished state back, twice.
// Interrupted: whoever did it could not finish; nothing is known.
const (
	PowerActionRunning     PowerActionPhase = "running"
	PowerActionConfirmed   PowerActionPhase = "confirmed"
	PowerActionFailed      PowerActionPhase = "failed"
	PowerActionInterrupted PowerActionPhase = "interrupted"
)

// PowerActionStatus is what came of it.
type PowerActionStatus struct {
	Phase   PowerActionPhase `json:"phase,omitempty"`
	Message string           `json:"message,omitempty"`
	EndedAt *time.Time       `json:"endedAt,omitempty"`
	Steps   []PowerStep      `json:"steps,omitempty"`
}

// PowerRequest asks to switch a node.
type PowerRequest struct {
	Action PowerVerb `json:"action" enum:"off,on,cycle"`
	// Confirm repeats the node's name: a node that is switched off takes its VMs
	// with it.
	Confirm string `json:"confirm"`
	Reason  string `json:"reason,omitempty"`
}

// PowerIdentity says whether a device is known to be of its node.
type PowerIdentity string

// The identities.
const (
	IdentitySame    PowerIdentity = "same"
	IdentityOther   PowerIdentity = "other"
	IdentityUnknown PowerIdentity = "unknown"
)

// PowerCheck is what a test of a device found. Nothing is switched by it.
type PowerCheck struct {
	Device string      `json:"device"`
	Driver PowerDriver `json:"driver"`
	// OK: login and state work, and the device is not known to be another host's.
	OK bool `json:"ok"`
	// State is on or off.
	State string `json:"state,omitempty"`
	// Identity is same, other, or unknown where it cannot be compared.
	Identity PowerIdentity `json:"identity"`
	Message  string        `json:"message,omitempty"`
	Steps    []PowerStep   `json:"steps,omitempty"`
}

// PowerReport is how the devices of a node are, seen by one node.
type PowerReport struct {
	Node string `json:"node"`
	// Via is the node that asked the devices: the leader, unless another was
	// named.
	Via    string       `json:"via"`
	Checks []PowerCheck `json:"checks"`
}

// NewPowerAction returns the record of an action that begins.
func NewPowerAction(n *Node, action PowerVerb, trigger PowerTrigger, at time.Time) PowerAction {
	a := PowerAction{Meta: NewMeta(KindPowerAction, "", "")}
	a.Meta.Name = a.Meta.ID
	a.Spec = PowerActionSpec{
		NodeID: n.Meta.ID, Node: n.Meta.Name, Action: action, Trigger: trigger, BootID: n.Status.BootID, At: at.UTC(),
	}
	a.Status.Phase = PowerActionRunning
	return a
}

// EndPowerAction notes how an action ended.
func EndPowerAction(a *PowerAction, phase PowerActionPhase, message string, steps []PowerStep, at time.Time) {
	at = at.UTC()
	a.Status = PowerActionStatus{Phase: phase, Message: message, EndedAt: &at, Steps: steps}
}

// SetDefaults implements Spec.
func (s *PowerActionSpec) SetDefaults() {}

// Validate implements Spec.
func (s *PowerActionSpec) Validate() error { return nil }
