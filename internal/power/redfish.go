// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package power

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/stmcginnis/gofish"
	"github.com/stmcginnis/gofish/schemas"

	"github.com/muster-vm/muster/api"
)

// maxBody bounds one answer of a Redfish service, in bytes.
const maxBody = 4 << 20

// redfish is a service (DMTF DSP0266) and the one system that is switched. Each
// request carries the login (HTTP Basic, which every service has to know): no
// session is left behind on a controller that has few.
type redfish struct {
	c    *gofish.APIClient
	http *http.Client
	id   string // of the system; empty: the only one
	at   string // path of the system, once found
}

func openRedfish(ctx context.Context, t *Target) (device, error) {
	conf, err := tlsFor(&t.Spec)
	if err != nil {
		return nil, err
	}
	addr := net.JoinHostPort(t.Spec.Address, strconv.Itoa(t.Spec.PortOrDefault()))
	hc := &http.Client{
		Transport: bounded{&http.Transport{
			TLSClientConfig: conf, ForceAttemptHTTP2: true, MaxResponseHeaderBytes: 64 << 10,
			// Wherever the service's links lead, there is nobody else to talk to.
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, network, addr)
			},
		}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	c, err := gofish.ConnectContext(ctx, gofish.ClientConfig{
		Endpoint: "https://" + addr, Username: t.Spec.User, Password: t.Password, BasicAuth: true,
		HTTPClient: hc, NoModifyTransport: true, ReuseConnections: true,
	})
	if err != nil {
		hc.CloseIdleConnections()
		return nil, redfishError(ctx, err)
	}
	d := &redfish{c: c, http: hc, id: t.Spec.SystemID}
	if _, err := d.system(ctx); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

// bounded limits what an answer may hold.
type bounded struct{ next *http.Transport }

// RoundTrip implements http.RoundTripper.
func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.next.RoundTrip(r)
	if err == nil {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, maxBody), resp.Body}
	}
	return resp, err
}

// CloseIdleConnections is found by http.Client.
func (b bounded) CloseIdleConnections() { b.next.CloseIdleConnections() }

// tlsFor trusts the authority of the device, its one certificate, or those that
// the host trusts.
func tlsFor(s *api.PowerDeviceSpec) (*tls.Config, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: s.Address}
	switch {
	case s.Fingerprint != "":
		want, err := api.ParseFingerprint(s.Fingerprint)
		if err != nil {
			return nil, err
		}
		conf.InsecureSkipVerify = true //nolint:gosec // VerifyConnection knows the one certificate
		conf.VerifyConnection = func(cs tls.ConnectionState) error {
			got := sha256.Sum256(cs.PeerCertificates[0].Raw)
			if subtle.ConstantTimeCompare(got[:], want) != 1 {
				return fmt.Errorf("the device shows a certificate with the fingerprint %s, not the one in spec.fingerprint", hex.EncodeToString(got[:]))
			}
			return nil
		}
	case s.CACert != "":
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM([]byte(s.CACert)) {
			return nil, errors.New("spec.caCert holds no certificate")
		}
	}
	return conf, nil
}

// redfishError tells what is known of a failure in words.
func redfishError(ctx context.Context, err error) error {
	var cert *tls.CertificateVerificationError
	var status *schemas.Error
	var several *schemas.CollectionError
	if errors.As(err, &several) {
		for _, one := range several.Failures {
			err = one
		}
	}
	switch {
	case errors.As(err, &cert):
		sum := sha256.Sum256(cert.UnverifiedCertificates[0].Raw)
		return fmt.Errorf("the device's certificate is not trusted (%w); if the one with the SHA-256 fingerprint %s is the right one, set it as spec.fingerprint, or its authority as spec.caCert", cert.Err, hex.EncodeToString(sum[:]))
	case errors.As(err, &status) && (status.HTTPReturnedStatusCode == http.StatusUnauthorized || status.HTTPReturnedStatusCode == http.StatusForbidden):
		return fmt.Errorf("%w by the Redfish service (status %d)", ErrLogin, status.HTTPReturnedStatusCode)
	case over(ctx):
		return fmt.Errorf("no answer from the Redfish service in time: %w", context.DeadlineExceeded)
	}
	return err
}

// system reads the system anew.
func (d *redfish) system(ctx context.Context) (*schemas.ComputerSystem, error) {
	c := d.c.WithContext(ctx)
	if d.at == "" {
		path, err := d.find(c)
		if err != nil {
			return nil, redfishError(ctx, err)
		}
		d.at = path
	}
	s, err := schemas.GetComputerSystem(c, d.at)
	if err != nil {
		return nil, redfishError(ctx, err)
	}
	return s, nil
}

// find returns the path of the one system that is meant.
func (d *redfish) find(c *gofish.APIClient) (string, error) {
	list, err := c.Service.Systems()
	if err != nil {
		return "", err
	}
	var ids []string
	for _, s := range list {
		if d.id == "" && len(list) == 1 || d.id != "" && s.ID == d.id {
			return path(s.ODataID)
		}
		ids = append(ids, s.ID)
	}
	slices.Sort(ids)
	if d.id == "" {
		return "", fmt.Errorf("the Redfish service has %d systems (%s); name one in spec.systemID", len(list), strings.Join(ids, ", "))
	}
	return "", fmt.Errorf("the Redfish service has no system %q; it has %s: correct spec.systemID", d.id, strings.Join(ids, ", "))
}

// path refuses what would change the address when it is put behind it.
func path(id string) (string, error) {
	u, err := url.Parse(id)
	if err != nil || u.IsAbs() || u.Host != "" || !strings.HasPrefix(id, "/") {
		return "", errors.New("the Redfish service names a system by something that is no path")
	}
	return id, nil
}

func (d *redfish) state(ctx context.Context) (State, error) {
	s, err := d.system(ctx)
	if err != nil {
		return "", err
	}
	switch s.PowerState {
	case schemas.OffPowerState:
		return Off, nil
	case "":
		return "", errors.New("the Redfish service tells no PowerState of the system")
	}
	return On, nil // also on its way off, paused, unknown: nothing but Off is off
}

func (d *redfish) command(ctx context.Context, verb api.PowerVerb) error {
	s, err := d.system(ctx)
	if err != nil {
		return err
	}
	reset := schemas.ForceOffResetType
	if verb == api.PowerOn {
		reset = schemas.OnResetType
	}
	if _, err := s.Reset(reset); err != nil {
		return redfishError(ctx, err)
	}
	return nil
}

func (d *redfish) identity(ctx context.Context) ([]string, error) {
	s, err := d.system(ctx)
	if err != nil {
		return nil, err
	}
	u, ok := parseUUID(s.UUID)
	if !ok {
		return nil, nil
	}
	return []string{formatUUID(u)}, nil
}

func (d *redfish) close() { d.http.CloseIdleConnections() }
