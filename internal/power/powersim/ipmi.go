// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package powersim

import (
	"cmp"
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/bougou/go-ipmi/pkg/bmc"
	"github.com/bougou/go-ipmi/pkg/hal"
	"github.com/bougou/go-ipmi/pkg/hal/mock"
	"github.com/bougou/go-ipmi/pkg/handlers"
	"github.com/bougou/go-ipmi/pkg/server"
	"github.com/bougou/go-ipmi/pkg/types"
)

// IPMI is a BMC on a UDP port.
type IPMI struct {
	Port int
	srv  *server.Server
	done chan struct{}
}

// IPMIConfig describes a BMC.
type IPMIConfig struct {
	Address        string // that it serves at; loopback by default
	Host           *Host
	User, Password string
	// GUID as it is sent, in the beginning of a session and, unless NoGUID, as
	// the answer to Get System GUID.
	GUID   [16]byte
	NoGUID bool
	// Suites it knows; by default 3 and 17.
	Suites []types.CipherSuiteID
	// OperatorOnly: the user may do no more than an operator.
	OperatorOnly bool
	// Forge, if set, sees each answer and may send others to the client first.
	Forge func(answer []byte) [][]byte
}

// NewIPMI starts a BMC.
func NewIPMI(c IPMIConfig) (*IPMI, error) {
	conn, err := net.ListenPacket("udp", net.JoinHostPort(cmp.Or(c.Address, "127.0.0.1"), "0"))
	if err != nil {
		return nil, err
	}
	b := bmc.New(bmc.DeviceInfo{DeviceID: 32, DeviceRevision: 1, FirmwareMajor: 1, IPMIVersion: 0x20, ManufacturerID: 1, ProductID: 1}, c.GUID, hardware{mock.New(), c.Host})
	u, err := b.Users.Add(2, c.User)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	most := bmc.PrivilegeLevelAdministrator
	if c.OperatorOnly {
		most = bmc.PrivilegeLevelOperator
	}
	u.SetPassword([]byte(c.Password))
	u.Enabled = true
	u.ChannelAccess[1] = bmc.UserChannelAccess{MaxPrivilege: most, Enabled: true}
	if c.Suites == nil {
		c.Suites = []types.CipherSuiteID{types.CipherSuiteID3, types.CipherSuiteID17}
	}
	s := &IPMI{Port: conn.LocalAddr().(*net.UDPAddr).Port, done: make(chan struct{})}
	s.srv = server.NewServer(b, &moodyConn{PacketConn: conn, host: c.Host, forge: c.Forge}, server.WithCipherSuites(c.Suites), server.WithHandlerRegistry(commands(c)))
	go func() {
		defer close(s.done)
		_ = s.srv.Serve(context.Background()) // ends with Close
	}()
	return s, nil
}

// commands are those of the reference BMC, and the one that it lacks.
func commands(c IPMIConfig) *handlers.Registry {
	r := handlers.NewRegistry()
	handlers.RegisterAllHandlers(r)
	if !c.NoGUID {
		r.RegisterFunc(types.CommandGetSystemGUID, func(context.Context, *handlers.HandlerContext, []byte) ([]byte, types.CompletionCode, error) {
			return c.GUID[:], types.CodeOK, nil
		})
	}
	return r
}

// Close ends the BMC.
func (s *IPMI) Close() error {
	err := s.srv.Close()
	<-s.done
	return err
}

// moodyConn loses or delays what is said.
type moodyConn struct {
	net.PacketConn
	host  *Host
	forge func([]byte) [][]byte
	mu    sync.Mutex
}

// WriteTo implements transport.PacketConn.
func (c *moodyConn) WriteTo(p []byte, to net.Addr) (int, error) {
	m := c.host.Mood()
	if m.Deaf {
		return len(p), nil
	}
	if m.Late > 0 {
		time.Sleep(m.Late)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.forge != nil {
		for _, other := range c.forge(append([]byte(nil), p...)) {
			if _, err := c.PacketConn.WriteTo(other, to); err != nil {
				return 0, err
			}
		}
	}
	return c.PacketConn.WriteTo(p, to)
}

// hardware is the mock with our chassis.
type hardware struct {
	*mock.HAL
	host *Host
}

// Chassis implements hal.HAL.
func (h hardware) Chassis() hal.ChassisHAL { return chassis{h.HAL.Chassis(), h.host} }

type chassis struct {
	hal.ChassisHAL
	host *Host
}

// PowerState implements hal.ChassisHAL.
func (c chassis) PowerState(context.Context) (bool, error) { return c.host.read(), nil }

// SetPower implements hal.ChassisHAL.
func (c chassis) SetPower(_ context.Context, on bool) error {
	word := "off"
	if on {
		word = "on"
	}
	if !c.host.command(word) {
		return errors.New("power fault")
	}
	return nil
}
