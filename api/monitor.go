// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"net"
	"net/mail"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Severity of an event or alert.
type Severity string

// The severities, as in syslog (RFC 5424) but fewer.
const (
	SeverityInfo     Severity = "info"
	SeverityWarning  Severity = "warning"
	SeverityCritical Severity = "critical"
)

// Event is something that happened; it never changes. The newest 10,000 are
// kept.
type Event = Object[EventSpec, struct{}]

// EventSpec says what happened to what.
type EventSpec struct {
	// Type is "<kind>.<what>", such as node.lost, vm.recovered, audit.change.
	Type     string   `json:"type"`
	Severity Severity `json:"severity"`
	// TargetKind, TargetID and Target (its name) say what it is about.
	TargetKind Kind   `json:"targetKind,omitempty"`
	TargetID   string `json:"targetID,omitempty"`
	Target     string `json:"target,omitempty"`
	// Node is the name of the node that it happened on.
	Node string `json:"node,omitempty"`
	// Actor and Source are who did it and from which address, for audit events.
	Actor   string `json:"actor,omitempty"`
	Source  string `json:"source,omitempty"`
	Message string `json:"message"`
	// Details for programs.
	Details map[string]string `json:"details,omitempty"`
}

// maxEventMessage is the longest message of an event in bytes.
const maxEventMessage = 2000

// NewEvent returns an event about an object. It is stored in the transaction
// of the change that it tells of, so that neither is there without the other.
func NewEvent(typ string, severity Severity, kind Kind, target Meta, message string, now time.Time) Event {
	if len(message) > maxEventMessage {
		message = strings.ToValidUTF8(message[:maxEventMessage], "") + "…"
	}
	e := Event{Meta: NewMeta(KindEvent, "", "")}
	e.Meta.Name, e.Meta.CreatedAt = e.Meta.ID, now.UTC()
	e.Spec = EventSpec{
		Type: typ, Severity: severity, TargetKind: kind, TargetID: target.ID, Target: target.Name, Message: message,
	}
	return e
}

// Rank orders severities: info 1, warning 2, critical 3, anything else 0.
func (s Severity) Rank() int {
	switch s {
	case SeverityInfo:
		return 1
	case SeverityWarning:
		return 2
	case SeverityCritical:
		return 3
	}
	return 0
}

func (s Severity) validate(field string) error {
	if s.Rank() == 0 {
		return Invalid(field, "is %q; give info, warning or critical", clip(string(s)))
	}
	return nil
}

// Rule says when an alert fires.
type Rule = Object[RuleSpec, struct{}]

// RuleCheck is what a rule looks at.
type RuleCheck string

// The built-in checks.
const (
	CheckNodeLost      RuleCheck = "node-lost"
	CheckQuorumMargin  RuleCheck = "quorum-margin"
	CheckQuorumLost    RuleCheck = "quorum-lost"
	CheckVMFailed      RuleCheck = "vm-failed"
	CheckVMRecovered   RuleCheck = "vm-recovered"
	CheckPoolFull      RuleCheck = "pool-full"
	CheckClockSkew     RuleCheck = "clock-skew"
	CheckCertificate   RuleCheck = "certificate"
	CheckBackup        RuleCheck = "backup"
	CheckDrill         RuleCheck = "drill"
	CheckMetric        RuleCheck = "metric"
	maxRuleForSeconds            = 86400
	maxMetricName                = 200
	maxReceiverAddress           = 1024
)

// RuleSpec is the definition.
type RuleSpec struct {
	Check    RuleCheck `json:"check" enum:"node-lost,quorum-margin,quorum-lost,vm-failed,vm-recovered,pool-full,clock-skew,certificate,backup,drill,metric"`
	Severity Severity  `json:"severity,omitempty" enum:"info,warning,critical"`
	// Threshold in the unit of the check: percent for pool-full, seconds for
	// clock-skew, days for certificate, the metric's own for metric.
	Threshold float64 `json:"threshold,omitempty"`
	// Metric is the name of the series, for check metric; Above and below say
	// which side of the threshold is bad.
	Metric string `json:"metric,omitempty"`
	Below  bool   `json:"below,omitempty"`
	// ForSeconds is how long it must be so before the alert fires, 0-86400.
	ForSeconds int  `json:"forSeconds,omitempty"`
	Disabled   bool `json:"disabled,omitempty"`
}

// SetDefaults implements Spec.
func (s *RuleSpec) SetDefaults() {
	if s.Severity == "" {
		s.Severity = SeverityWarning
	}
	if s.Threshold != 0 {
		return
	}
	switch s.Check {
	case CheckPoolFull:
		s.Threshold = defaultPoolPercent
	case CheckClockSkew:
		s.Threshold = defaultSkewSeconds
	case CheckCertificate:
		s.Threshold = defaultCertDays
	}
}

// Thresholds of the checks that need one, in their units.
const (
	defaultPoolPercent = 90
	defaultSkewSeconds = 2
	defaultCertDays    = 30
)

// Validate implements Spec.
func (s *RuleSpec) Validate() error {
	switch s.Check {
	case CheckNodeLost, CheckQuorumMargin, CheckQuorumLost, CheckVMFailed, CheckVMRecovered, CheckPoolFull, CheckClockSkew, CheckCertificate, CheckBackup, CheckDrill:
	case CheckMetric:
		if s.Metric == "" {
			return Invalid("spec.metric", "is missing; give the name of a series")
		}
		if strings.ContainsFunc(s.Metric, func(c rune) bool { return c != '_' && (c < 'a' || c > 'z') && (c < '0' || c > '9') }) {
			return Invalid("spec.metric", "%q is not the name of one series, such as muster_node_cpu_percent", clip(s.Metric))
		}
	default:
		return Invalid("spec.check", "%q is not a check; see the reference", clip(string(s.Check)))
	}
	if err := s.Severity.validate("spec.severity"); err != nil {
		return err
	}
	if s.ForSeconds < 0 || s.ForSeconds > maxRuleForSeconds {
		return Invalid("spec.forSeconds", "is %d; give 0 to %d", s.ForSeconds, maxRuleForSeconds)
	}
	if len(s.Metric) > maxMetricName {
		return Invalid("spec.metric", "is longer than %d characters", maxMetricName)
	}
	switch {
	case s.Check == CheckPoolFull && (s.Threshold <= 0 || s.Threshold > 100):
		return Invalid("spec.threshold", "is %g; give a percentage above 0 and up to 100", s.Threshold)
	case (s.Check == CheckClockSkew || s.Check == CheckCertificate) && s.Threshold <= 0:
		return Invalid("spec.threshold", "is %g; give a number above 0", s.Threshold)
	}
	return nil
}

// Alert is one firing of a rule for one target.
type Alert = Object[AlertSpec, AlertStatus]

// AlertSpec is written once, but for the acknowledgement.
type AlertSpec struct {
	Rule       string   `json:"rule"`
	Severity   Severity `json:"severity"`
	TargetKind Kind     `json:"targetKind,omitempty"`
	TargetID   string   `json:"targetID,omitempty"`
	Target     string   `json:"target,omitempty"`
	// AcknowledgedBy and AcknowledgedAt are set by POST /alerts/{id}/acknowledge.
	AcknowledgedBy string     `json:"acknowledgedBy,omitempty" readOnly:"true"`
	AcknowledgedAt *time.Time `json:"acknowledgedAt,omitempty" readOnly:"true"`
}

// AlertPhase is where an alert is in its life.
type AlertPhase string

// The phases.
const (
	AlertPending  AlertPhase = "pending"
	AlertFiring   AlertPhase = "firing"
	AlertResolved AlertPhase = "resolved"
)

// AlertStatus is written by the leader's monitor service.
type AlertStatus struct {
	Phase      AlertPhase `json:"phase,omitempty"`
	Message    string     `json:"message,omitempty"`
	PendingAt  *time.Time `json:"pendingAt,omitempty"`
	FiringAt   *time.Time `json:"firingAt,omitempty"`
	ResolvedAt *time.Time `json:"resolvedAt,omitempty"`
	// Sent names the receivers that were told, as "<name>/<phase>/<ID>": another
	// receiver may get the name.
	Sent []string `json:"sent,omitempty"`
}

// SentMark is the entry of Sent for a receiver and a phase.
func SentMark(receiver Meta, phase AlertPhase) string {
	return receiver.Name + "/" + string(phase) + "/" + receiver.ID
}

// Receiver is where alerts go.
type Receiver = Object[ReceiverSpec, ReceiverStatus]

// ReceiverType is how.
type ReceiverType string

// The types.
const (
	ReceiverSMTP    ReceiverType = "smtp"
	ReceiverSNMP    ReceiverType = "snmp"
	ReceiverWebhook ReceiverType = "webhook"
)

// ReceiverSpec is the definition. Secrets are sealed before they are stored
// and are never shown.
type ReceiverSpec struct {
	Type ReceiverType `json:"type" enum:"smtp,snmp,webhook"`
	// MinSeverity that is sent: info, warning (default) or critical.
	MinSeverity Severity `json:"minSeverity,omitempty" enum:"info,warning,critical"`
	// Address is host:port for smtp and snmp, an http(s) URL for webhook.
	Address string `json:"address"`
	// From and To are mail addresses, for smtp.
	From string   `json:"from,omitempty"`
	To   []string `json:"to,omitempty"`
	// TLS of smtp: starttls (default), tls or none.
	TLS string `json:"tls,omitempty" enum:"starttls,tls,none"`
	// User for smtp authentication, or the SNMP v3 user.
	User string `json:"user,omitempty"`
	// Secret is the smtp password, the SNMP community (v2c), the SNMP v3
	// authentication and privacy pass phrase, or the webhook's HMAC key.
	// Write only.
	Secret string `json:"secret,omitempty"`
	// SealedSecret is how it is stored; never shown.
	SealedSecret []byte `json:"sealedSecret,omitempty" readOnly:"true"`
	// Version of SNMP: 2c (default) or 3.
	Version  string `json:"version,omitempty" enum:"2c,3"`
	Disabled bool   `json:"disabled,omitempty"`
}

// SetDefaults implements Spec.
func (s *ReceiverSpec) SetDefaults() {
	if s.MinSeverity == "" {
		s.MinSeverity = SeverityWarning
	}
	if s.Type == ReceiverSMTP && s.TLS == "" {
		s.TLS = "starttls"
	}
	if s.Type == ReceiverSNMP && s.Version == "" {
		s.Version = "2c"
	}
}

// Validate implements Spec.
func (s *ReceiverSpec) Validate() error {
	if len(s.Address) > maxReceiverAddress {
		return Invalid("spec.address", "is longer than %d characters", maxReceiverAddress)
	}
	if err := s.MinSeverity.validate("spec.minSeverity"); err != nil {
		return err
	}
	switch s.Type {
	case ReceiverSMTP:
		if err := s.validateMail(); err != nil {
			return err
		}
	case ReceiverSNMP:
		if s.Version != "2c" && s.Version != "3" {
			return Invalid("spec.version", "is %q; give 2c or 3", clip(s.Version))
		}
		if s.Version == "3" && s.User == "" {
			return Invalid("spec.user", "is missing; SNMP v3 needs a user")
		}
	case ReceiverWebhook:
		u, err := url.Parse(s.Address)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return Invalid("spec.address", "%q is not an http or https URL", clip(s.Address))
		}
		if u.User != nil { // addresses are shown, and stored as they are
			return Invalid("spec.address", "has a user or password in it; leave them out: a webhook is signed with spec.secret")
		}
		return nil
	default:
		return Invalid("spec.type", "is %q; give smtp, snmp or webhook", clip(string(s.Type)))
	}
	host, port, err := net.SplitHostPort(s.Address)
	if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || n == 0 || host == "" {
		return Invalid("spec.address", "%q is not host:port, such as mail.example.org:587", clip(s.Address))
	}
	return nil
}

func (s *ReceiverSpec) validateMail() error {
	if s.From == "" || len(s.To) == 0 || len(s.To) > 32 {
		return Invalid("spec.to", "an smtp receiver needs from and 1 to 32 addresses in to")
	}
	for _, a := range append([]string{s.From}, s.To...) {
		if m, err := mail.ParseAddress(a); err != nil || m.Address != a {
			return Invalid("spec.to", "%q is not a mail address such as ops@example.org", clip(a))
		}
	}
	switch s.TLS {
	case "starttls", "tls", "none":
		return nil
	}
	return Invalid("spec.tls", "is %q; give starttls, tls or none", clip(s.TLS))
}

// ReceiverStatus is written by the leader's monitor service.
type ReceiverStatus struct {
	Phase     string     `json:"phase,omitempty"`
	Message   string     `json:"message,omitempty"`
	Queued    int        `json:"queued,omitempty"`
	LastSent  *time.Time `json:"lastSent,omitempty"`
	LastError string     `json:"lastError,omitempty"`
}
