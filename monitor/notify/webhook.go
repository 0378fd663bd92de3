// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package notify

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/muster-vm/muster/api"
)

// The headers of a webhook. The signature is "sha256=" and the HMAC-SHA256, in
// hexadecimal, of the timestamp, a dot and the body under the receiver's key.
const (
	HeaderKey       = "Muster-Delivery"
	HeaderTimestamp = "Muster-Timestamp"
	HeaderSignature = "Muster-Signature"
)

// Limits of a webhook.
const (
	webhookTimeout   = 10 * time.Second
	maxReplyHeader   = 32 << 10
	webhookSignature = "sha256="
)

type webhookBody struct {
	Cluster string         `json:"cluster"`
	Node    string         `json:"node"`
	Key     string         `json:"key"`
	Phase   api.AlertPhase `json:"phase"`
	At      time.Time      `json:"at"`
	Test    bool           `json:"test,omitempty"`
	Alerts  []Item         `json:"alerts"`
}

// Sign returns the signature of a body.
func Sign(key []byte, timestamp string, body []byte) string {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(timestamp + "."))
	mac.Write(body)
	return webhookSignature + hex.EncodeToString(mac.Sum(nil))
}

// post delivers with one POST. Any 2xx is a success; a redirect is not
// followed, it would take the message where nobody sent it.
func (s *Sender) post(ctx context.Context, r Receiver, m Message) error {
	ctx, cancel := context.WithTimeout(ctx, webhookTimeout)
	defer cancel()
	body, err := json.Marshal(webhookBody{Cluster: s.cluster, Node: s.node, Key: m.key(), Phase: m.Phase, At: m.At.UTC(), Test: m.Test, Alerts: m.Items})
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.Spec.Address, bytes.NewReader(body))
	if err != nil {
		return err
	}
	stamp := strconv.FormatInt(time.Now().Unix(), 10)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "muster")
	req.Header.Set(HeaderKey, m.key())
	req.Header.Set(HeaderTimestamp, stamp)
	if r.Secret != "" {
		req.Header.Set(HeaderSignature, Sign([]byte(r.Secret), stamp, body))
	}
	// A transport of its own: nothing of a hostile peer stays behind. No proxy
	// from the environment: the address is what the administrator wrote.
	t := &http.Transport{
		DialContext:            (&net.Dialer{Timeout: webhookTimeout}).DialContext,
		TLSHandshakeTimeout:    webhookTimeout,
		ResponseHeaderTimeout:  webhookTimeout,
		MaxResponseHeaderBytes: maxReplyHeader,
		DisableKeepAlives:      true,
		DisableCompression:     true,
	}
	defer t.CloseIdleConnections()
	client := &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode/100 == 2 {
		return nil // what else it says does not matter
	}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 512)) // as far as it came
	if resp.StatusCode/100 == 3 {
		return fmt.Errorf("%s answered with a redirect (%d), which is not followed; give the final URL", host(r.Spec.Address), resp.StatusCode)
	}
	return fmt.Errorf("%s answered %d: %s", host(r.Spec.Address), resp.StatusCode, line(string(text), 200))
}
