// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package power

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/bougou/go-ipmi/pkg/client"
	"github.com/bougou/go-ipmi/pkg/command/chassis"
	"github.com/bougou/go-ipmi/pkg/types"

	"github.com/muster-vm/muster/api"
)

// Times of IPMI.
const (
	// resendAfter is when a request without an answer is sent again.
	resendAfter = time.Second
	// resends bounds it; the context ends it sooner.
	resends = 60
	// goodbyeWithin bounds the end of a session: BMCs have few.
	goodbyeWithin = 500 * time.Millisecond
)

// ipmi is a session over RMCP+ (IPMI v2.0, "lanplus").
type ipmi struct {
	c *client.Client
	w *wire
}

// dialer gives the library the wire.
type dialer struct{ w *wire }

// Dial implements proxy.Dialer.
func (d dialer) Dial(string, string) (net.Conn, error) { return d.w, nil }

func openIPMI(ctx context.Context, t *Target) (device, error) {
	addr := net.JoinHostPort(t.Spec.Address, strconv.Itoa(t.Spec.PortOrDefault()))
	conn, err := (&net.Dialer{}).DialContext(ctx, "udp", addr)
	if err != nil {
		return nil, err
	}
	w := &wire{Conn: conn, user: t.Spec.User, password: t.Password}
	c, err := client.NewClient(t.Spec.Address, t.Spec.PortOrDefault(), t.Spec.User, t.Password)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	level := types.PrivilegeLevelOperator
	if t.Spec.Privilege == api.PrivilegeAdministrator {
		level = types.PrivilegeLevelAdministrator
	}
	c.WithUDPProxy(dialer{w}).WithTimeout(resendAfter).WithRetry(resends).WithMaxPrivilegeLevel(level)
	switch t.Spec.CipherSuite {
	case 0: // the better one first
		c.WithCipherSuiteID(types.CipherSuiteID17, types.CipherSuiteID3)
	default:
		c.WithCipherSuiteID(types.CipherSuiteID(t.Spec.CipherSuite))
	}
	if err := c.Connect(ctx); err != nil {
		_ = conn.Close() // there is no session to end
		return nil, ipmiError(ctx, err)
	}
	return &ipmi{c, w}, nil
}

// ipmiError tells what is known of a failure in words.
func ipmiError(ctx context.Context, err error) error {
	var status *types.RmcpStatusError
	var code *types.ResponseError
	// The library joins what the cipher suites ended with as text.
	text := err.Error()
	switch {
	case errors.Is(err, client.ErrRAKPAuthentication), strings.Contains(text, client.ErrRAKPAuthentication.Error()),
		strings.Contains(text, types.RmcpStatusCodeUnauthorizedName.String()),
		strings.Contains(text, types.RmcpStatusCodeInvalidIntegrityCheckValue.String()):
		return fmt.Errorf("%w by the BMC", ErrLogin)
	case strings.Contains(text, types.RmcpStatusCodeUnauthorizedRoleOfPriLevel.String()):
		return fmt.Errorf("%w: the BMC does not give this user the privilege that the device asks for", ErrLogin)
	case over(ctx):
		return fmt.Errorf("no valid answer from the BMC in time: %w", context.DeadlineExceeded)
	case errors.As(err, &status):
		return fmt.Errorf("the BMC answered: %w", status)
	case errors.As(err, &code):
		return fmt.Errorf("the BMC answered: %w", code)
	}
	return err
}

func (d *ipmi) state(ctx context.Context) (State, error) {
	r, err := d.c.GetChassisStatus(ctx)
	if err != nil {
		return "", ipmiError(ctx, err)
	}
	if r.PowerIsOn {
		return On, nil
	}
	return Off, nil
}

func (d *ipmi) command(ctx context.Context, verb api.PowerVerb) error {
	control := chassis.ChassisControlPowerDown
	if verb == api.PowerOn {
		control = chassis.ChassisControlPowerUp
	}
	if _, err := d.c.ChassisControl(ctx, control); err != nil {
		return ipmiError(ctx, err)
	}
	return nil
}

func (d *ipmi) identity(ctx context.Context) ([]string, error) {
	if r, err := d.c.GetSystemGUID(ctx); err == nil {
		return readings(r.GUID), nil
	}
	// An optional command; the same number was in the beginning of the session.
	return readings(d.w.systemGUID()), nil
}

func (d *ipmi) close() {
	ctx, cancel := context.WithTimeout(context.Background(), goodbyeWithin)
	defer cancel()
	_ = d.c.Close(ctx) // a BMC that does not say goodbye ends the session by itself
}
