// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package notify

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/muster-vm/muster/api"
)

// Limits of one message.
const (
	// Deadline of one delivery.
	Deadline = 20 * time.Second
	// MaxItems is the most alerts of one message.
	MaxItems = 100
	// maxReply is how much of an answer is read.
	maxReply   = 64 << 10
	maxSubject = 180
)

// Receiver is where a message goes, with its secret opened.
type Receiver struct {
	Name   string
	Spec   api.ReceiverSpec
	Secret string
}

// Item is one alert of a message.
type Item struct {
	ID string `json:"id"`
	// Key is the same for every repetition of this alert in this phase.
	Key        string         `json:"key"`
	Rule       string         `json:"rule"`
	Severity   api.Severity   `json:"severity"`
	Phase      api.AlertPhase `json:"phase"`
	TargetKind api.Kind       `json:"targetKind,omitempty"`
	TargetID   string         `json:"targetID,omitempty"`
	Target     string         `json:"target,omitempty"`
	Message    string         `json:"message"`
	FiringAt   time.Time      `json:"firingAt,omitzero"`
	ResolvedAt time.Time      `json:"resolvedAt,omitzero"`
	// More is the command that shows more.
	More string `json:"-"`
}

// Message is what one evaluation has to tell one receiver.
type Message struct {
	Phase api.AlertPhase
	At    time.Time
	Items []Item
	// Test marks a message that a person asked for.
	Test bool
}

// ItemOf makes an item of an alert.
func ItemOf(a *api.Alert) Item {
	it := Item{
		ID: a.Meta.ID, Rule: a.Spec.Rule, Severity: a.Spec.Severity, Phase: a.Status.Phase,
		TargetKind: a.Spec.TargetKind, TargetID: a.Spec.TargetID, Target: a.Spec.Target, Message: a.Status.Message,
		More: "muster alert show " + a.Meta.ID,
	}
	if a.Status.FiringAt != nil {
		it.FiringAt = a.Status.FiringAt.UTC()
	}
	if a.Status.ResolvedAt != nil {
		it.ResolvedAt = a.Status.ResolvedAt.UTC()
	}
	at := it.FiringAt
	if it.Phase == api.AlertResolved {
		at = it.ResolvedAt
	}
	it.Key = digest(it.ID, string(it.Phase), at.Format(time.RFC3339Nano))
	return it
}

func digest(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return hex.EncodeToString(sum[:16])
}

// key is the same for every repetition of a message.
func (m *Message) key() string {
	keys := make([]string, len(m.Items))
	for i := range m.Items {
		keys[i] = m.Items[i].Key
	}
	slices.Sort(keys)
	return digest(keys...)
}

// severity is the highest of the items.
func (m *Message) severity() api.Severity {
	worst := api.SeverityInfo
	for i := range m.Items {
		if m.Items[i].Severity.Rank() > worst.Rank() {
			worst = m.Items[i].Severity
		}
	}
	return worst
}

// subject is one line without control characters.
func (m *Message) subject(cluster string) string {
	word := strings.ToUpper(string(m.Phase))
	switch {
	case m.Test:
		word = "TEST"
	case m.Phase == api.AlertFiring:
		word += " " + string(m.severity())
	}
	s := fmt.Sprintf("[muster %s] %s: ", cluster, word)
	if len(m.Items) > 0 {
		s += m.Items[0].Message
	}
	if n := len(m.Items) - 1; n > 0 {
		s = fmt.Sprintf("[muster %s] %s: %d alerts: %s", cluster, word, n+1, m.Items[0].Message)
	}
	return line(s, maxSubject)
}

// line makes a single line of at most n bytes out of anything.
func line(s string, n int) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 || r == '\u2028' || r == '\u2029' {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > n {
		s = strings.ToValidUTF8(s[:n], "") + "…"
	}
	return s
}

// Sender sends. It may be used by many goroutines.
type Sender struct {
	cluster, clusterID, node string
	// roots are the authorities of mail servers; the system's when nil.
	roots *x509.CertPool
	// term and began are the boots and time of the engine of SNMP v3: the term
	// rises with every leader, and only the leader sends.
	term  atomic.Uint64
	began atomic.Int64
}

// New returns a sender that names the cluster and this node in its messages.
func New(cluster, clusterID, node string) *Sender {
	s := &Sender{cluster: cluster, clusterID: clusterID, node: node}
	s.began.Store(time.Now().UnixNano())
	return s
}

// Begin is called when this node begins to lead in a term. If it goes on in
// the same one, as after a restart of the service, the engine's time goes on:
// receivers take no notification that is 150 s behind (RFC 3414 section 3.2).
func (s *Sender) Begin(term uint64) {
	if s.term.Swap(term) != term {
		s.began.Store(time.Now().UnixNano())
	}
}

// BeginAt is called before a node sends that does not lead: the engine goes on
// where the leader of a term, who began at a time, would be.
func (s *Sender) BeginAt(term uint64, began time.Time) {
	s.term.Store(term)
	s.began.Store(began.UnixNano())
}

// Began is when the leadership began that Begin was last called for.
func (s *Sender) Began() time.Time { return time.Unix(0, s.began.Load()) }

// Send delivers a message to one receiver within Deadline. A *Partial says that
// it was sent, but not to everybody.
func (s *Sender) Send(ctx context.Context, r Receiver, m Message) error {
	ctx, cancel := context.WithTimeout(ctx, Deadline)
	defer cancel()
	var err error
	switch r.Spec.Type {
	case api.ReceiverSMTP:
		err = s.mail(ctx, r, m)
	case api.ReceiverSNMP:
		err = s.traps(ctx, r, m)
	case api.ReceiverWebhook:
		err = s.post(ctx, r, m)
	default:
		return fmt.Errorf("receiver %s has the type %q, which this version does not know", r.Name, r.Spec.Type)
	}
	var partial *Partial // its words are ours
	if err == nil || errors.As(err, &partial) {
		return err
	}
	return fmt.Errorf("send to receiver %s: %s", r.Name, r.plainError(err))
}
