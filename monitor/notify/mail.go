// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package notify

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/textproto"
	"strconv"
	"strings"
	"time"

	"github.com/wneessen/go-mail"

	"github.com/muster-vm/muster/api"
)

const mailTimeout = 15 * time.Second

// mail delivers one message over SMTP (RFC 5321).
func (s *Sender) mail(ctx context.Context, r Receiver, m Message) error {
	ctx, cancel := context.WithTimeout(ctx, mailTimeout)
	defer cancel()
	msg, err := s.compose(r, m)
	if err != nil {
		return err
	}
	host, port, err := net.SplitHostPort(r.Spec.Address)
	if err != nil {
		return err
	}
	number, err := strconv.Atoi(port)
	if err != nil {
		return fmt.Errorf("port %q is not a number", port)
	}
	tlsConfig := &tls.Config{ServerName: host, RootCAs: s.roots, MinVersion: tls.VersionTLS12}
	opts := []mail.Option{
		mail.WithPort(number), mail.WithTimeout(mailTimeout), mail.WithoutNoop(),
		mail.WithTLSConfig(tlsConfig),
		mail.WithDialContextFunc(dialBounded(ctx, r.Spec.TLS == "tls", tlsConfig)),
	}
	switch r.Spec.TLS {
	case "none", "tls": // with tls the connection is encrypted before SMTP begins
		opts = append(opts, mail.WithTLSPolicy(mail.NoTLS))
	default:
		opts = append(opts, mail.WithTLSPolicy(mail.TLSMandatory))
	}
	if r.Spec.User != "" {
		auth := mail.SMTPAuthAutoDiscover
		if r.Spec.TLS != "starttls" && r.Spec.TLS != "" {
			// go-mail does not know that the connection is encrypted, or the
			// administrator said that it need not be.
			auth = mail.SMTPAuthPlainNoEnc
		}
		opts = append(opts, mail.WithSMTPAuth(auth), mail.WithUsername(r.Spec.User), mail.WithPassword(r.Secret))
	}
	client, err := mail.NewClient(host, opts...)
	if err != nil {
		return err
	}
	err = sendMail(ctx, client, msg)
	var failed *mail.SendError
	if len(r.Spec.To) > 1 && errors.As(err, &failed) && failed.Reason == mail.ErrSMTPRcptTo {
		return s.mailTheRest(ctx, client, r, m, err)
	}
	return err
}

func sendMail(ctx context.Context, client *mail.Client, msg *mail.Msg) error {
	err := client.DialAndSendWithContext(ctx, msg)
	if err != nil && msg.IsDelivered() {
		return nil // the server took it; only the goodbye failed
	}
	return err
}

// Partial is the error of a message that was sent to all but those people whom
// the mail server refuses for good. It is not to be sent again.
type Partial struct {
	Receiver string
	refused  []string
}

// Error implements error.
func (p *Partial) Error() string {
	return fmt.Sprintf("sent to receiver %s, but its mail server refuses %s; take them out", p.Receiver, strings.Join(p.refused, ", "))
}

// mailTheRest sends a message that was refused for some of its people to the
// others. Only those who are refused for good (RFC 5321 section 4.2.1: 5yz) are
// left out: who may be taken later must get it then, and nobody twice.
func (s *Sender) mailTheRest(ctx context.Context, client *mail.Client, r Receiver, m Message, why error) error {
	conn, err := client.DialToSMTPClientWithContext(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = client.CloseWithSMTPClient(conn) }()
	if err := conn.Mail(r.Spec.From); err != nil {
		return err
	}
	partial := &Partial{Receiver: r.Name}
	var rest []string
	for _, to := range r.Spec.To {
		err := conn.Rcpt(to)
		var reply *textproto.Error
		switch {
		case err == nil:
			rest = append(rest, to)
		case errors.As(err, &reply) && reply.Code/100 == 5:
			partial.refused = append(partial.refused, fmt.Sprintf("%s (%d)", to, reply.Code))
		default:
			return why // another time
		}
	}
	if len(rest) == 0 || len(partial.refused) == 0 {
		return why
	}
	r.Spec.To = rest
	msg, err := s.compose(r, m)
	if err != nil {
		return err
	}
	if err := sendMail(ctx, client, msg); err != nil {
		return err
	}
	return partial
}

func (s *Sender) compose(r Receiver, m Message) (*mail.Msg, error) {
	msg := mail.NewMsg()
	if err := msg.FromFormat("muster "+s.cluster, r.Spec.From); err != nil {
		return nil, err
	}
	if err := msg.To(r.Spec.To...); err != nil {
		return nil, err
	}
	msg.Subject(m.subject(s.cluster))
	msg.SetMessageIDWithValue(m.key() + "@" + s.clusterID + ".muster")
	msg.SetDateWithValue(m.At)
	msg.SetUserAgent("muster")
	// RFC 3834: no out-of-office answers to this.
	msg.SetGenHeader("Auto-Submitted", "auto-generated")
	msg.SetGenHeader("X-Muster-Cluster", line(s.cluster, maxSubject))
	msg.SetGenHeader("X-Muster-Phase", string(m.Phase))
	if m.severity() == api.SeverityCritical && m.Phase == api.AlertFiring {
		msg.SetImportance(mail.ImportanceHigh)
	}
	msg.SetBodyString(mail.TypeTextPlain, m.text(s.cluster, s.node))
	return msg, nil
}

// text is the body of a mail.
func (m *Message) text(cluster, node string) string {
	var b strings.Builder
	for i := range m.Items {
		it := &m.Items[i]
		fmt.Fprintf(&b, "%s: %s\n", strings.ToUpper(string(it.Phase)), line(it.Message, maxText))
		fmt.Fprintf(&b, "  rule      %s (%s)\n", it.Rule, it.Severity)
		fmt.Fprintf(&b, "  target    %s %s\n", it.TargetKind, line(it.Target, maxSubject))
		if !it.FiringAt.IsZero() {
			fmt.Fprintf(&b, "  since     %s\n", it.FiringAt.Format(time.RFC3339))
		}
		if !it.ResolvedAt.IsZero() {
			fmt.Fprintf(&b, "  resolved  %s\n", it.ResolvedAt.Format(time.RFC3339))
		}
		if it.More != "" {
			fmt.Fprintf(&b, "  more      %s\n", it.More)
		}
		b.WriteByte('\n')
	}
	fmt.Fprintf(&b, "-- \nCluster %s, sent by node %s.\n", line(cluster, maxSubject), node)
	return b.String()
}

const maxText = 4000

// dialBounded dials so that nothing can outlast ctx or fill the memory: the
// deadline of ctx cannot be moved, and reading ends after maxReply bytes.
func dialBounded(ctx context.Context, encrypted bool, conf *tls.Config) mail.DialContextFunc {
	return func(dctx context.Context, network, address string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(dctx, network, address)
		if err != nil {
			return nil, err
		}
		until, _ := ctx.Deadline()
		var c net.Conn = &boundedConn{Conn: conn, until: until, left: maxReply}
		if err := c.SetDeadline(until); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		if !encrypted {
			return c, nil
		}
		t := tls.Client(c, conf)
		if err := t.HandshakeContext(dctx); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		return t, nil
	}
}

type boundedConn struct {
	net.Conn
	until time.Time
	left  int
}

var errTooMuch = errors.New("the mail server talks without end")

// Read implements net.Conn.
func (c *boundedConn) Read(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, errTooMuch
	}
	n, err := c.Conn.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

func (c *boundedConn) cap(t time.Time) time.Time {
	if t.IsZero() || t.After(c.until) {
		return c.until
	}
	return t
}

// SetDeadline implements net.Conn.
func (c *boundedConn) SetDeadline(t time.Time) error { return c.Conn.SetDeadline(c.cap(t)) }

// SetReadDeadline implements net.Conn.
func (c *boundedConn) SetReadDeadline(t time.Time) error { return c.Conn.SetReadDeadline(c.cap(t)) }

// SetWriteDeadline implements net.Conn.
func (c *boundedConn) SetWriteDeadline(t time.Time) error { return c.Conn.SetWriteDeadline(c.cap(t)) }
