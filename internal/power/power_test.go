// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package power

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/bougou/go-ipmi/pkg/types"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/goodturn"
	"github.com/muster-vm/muster/internal/power/powersim"
)

const (
	testUser     = "fence"
	testPassword = "s3cret \"pass"
	hostUUID     = "00112233-4455-6677-8899-aabbccddeeff"
)

// smbiosGUID is hostUUID as SMBIOS and most BMCs keep it.
var smbiosGUID = [16]byte{0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff}

// controllers makes a simulated controller of each kind and what speaks to it.
var controllers = map[string]func(t *testing.T, h *powersim.Host) Target{
	"ipmi": func(t *testing.T, h *powersim.Host) Target {
		s, err := powersim.NewIPMI(powersim.IPMIConfig{Host: h, User: testUser, Password: testPassword, GUID: smbiosGUID})
		return ipmiTarget(t, s, err)
	},
	"ipmi with suite 3 alone and an operator": func(t *testing.T, h *powersim.Host) Target {
		s, err := powersim.NewIPMI(powersim.IPMIConfig{Host: h, User: testUser, Password: testPassword, GUID: smbiosGUID, NoGUID: true,
			Suites: []types.CipherSuiteID{types.CipherSuiteID3}, OperatorOnly: true})
		return ipmiTarget(t, s, err)
	},
	"redfish": func(t *testing.T, h *powersim.Host) Target {
		s, err := powersim.NewRedfish(powersim.RedfishConfig{Host: h, User: testUser, Password: testPassword, Systems: map[string]string{"437XR": hostUUID}})
		return redfishTarget(t, s, err)
	},
}

func ipmiTarget(t *testing.T, s *powersim.IPMI, err error) Target {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return target(t, api.PowerDeviceSpec{Driver: api.PowerIPMI, Port: s.Port})
}

func redfishTarget(t *testing.T, s *powersim.Redfish, err error) Target {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return target(t, api.PowerDeviceSpec{Driver: api.PowerRedfish, Port: s.Port, Fingerprint: s.Fingerprint})
}

func target(t *testing.T, s api.PowerDeviceSpec) Target {
	t.Helper()
	s.Node, s.Address, s.User, s.Password = "n1", "127.0.0.1", testUser, testPassword
	s.SetDefaults()
	if err := s.Validate(); err != nil {
		t.Fatal(err)
	}
	s.Password = ""
	return Target{Name: "bmc", Spec: s, Password: testPassword}
}

func verbs(steps []api.PowerStep) (out []string) {
	for _, s := range steps {
		out = append(out, string(s.Do)+"="+s.Answer)
	}
	return out
}

func TestOffIsConfirmedByTwoReadings(t *testing.T) {
	for name, make := range controllers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := powersim.NewHost(nil)
			h.Behave(powersim.Mood{SeenOnFor: 2})
			tg := make(t, h)
			asked := 0
			r := SwitchOff(t.Context(), []Target{tg}, func(context.Context) error { asked++; return nil })
			if !r.Done || r.Err != nil || h.On() || asked != 1 {
				t.Fatalf("done %v, err %v, on %v, asked %d times\n%v", r.Done, r.Err, h.On(), asked, verbs(r.Steps))
			}
			got := verbs(r.Steps)
			if want := []string{"read=on", "off=accepted", "read=on", "read=on", "read=off", "read=off"}; !slices.Equal(got[1:], want) {
				t.Errorf("steps: %v", got)
			}
			if r := SwitchOff(t.Context(), []Target{tg}, nil); !r.Done {
				t.Errorf("a host that is off already: %v\n%v", r.Err, verbs(r.Steps))
			}
			if r := SwitchOn(t.Context(), []Target{tg}); !r.Done || !h.On() {
				t.Errorf("on again: %v\n%v", r.Err, verbs(r.Steps))
			}
			if r := Cycle(t.Context(), []Target{tg}); !r.Done || !h.On() {
				t.Errorf("cycle: %v\n%v", r.Err, verbs(r.Steps))
			}
			want := []string{"off", "off", "on", "off", "on"}
			if tg.Spec.Driver == api.PowerRedfish {
				want = slices.Delete(want, 1, 2) // the service refused to switch off what is off
			}
			if got := h.Commands(); !slices.Equal(got, want) {
				t.Errorf("commands %v, want %v", got, want)
			}
		})
	}
}

func TestOffIsNotConfirmed(t *testing.T) {
	cases := map[string]struct {
		mood   powersim.Mood
		within time.Duration
		words  string
	}{
		"the device takes the command and does nothing": {powersim.Mood{Lies: true}, 2 * time.Second, "still on when"},
		"the device hangs":                         {powersim.Mood{Deaf: true}, 1500 * time.Millisecond, "in time"},
		"the device refuses the command":           {powersim.Mood{Refuses: true}, 5 * time.Second, ""},
		"the host comes back between the readings": {powersim.Mood{ComesBack: true}, 2 * time.Second, "still on when"},
	}
	for driver, make := range controllers {
		for name, c := range cases {
			t.Run(driver+"/"+name, func(t *testing.T) {
				t.Parallel()
				goodturn.Take(t, func(int) error {
					h := powersim.NewHost(nil)
					tg := make(t, h)
					h.Behave(c.mood)
					ctx, cancel := context.WithTimeout(t.Context(), c.within)
					defer cancel()
					began := time.Now()
					r := SwitchOff(ctx, []Target{tg}, nil)
					took := time.Since(began)
					if r.Done || r.Err == nil {
						t.Fatalf("done %v, err %v\n%v", r.Done, r.Err, verbs(r.Steps))
					}
					if took > c.within+time.Second || !strings.Contains(r.Err.Error(), c.words) {
						return fmt.Errorf("err %w after %v\n%v", r.Err, took, verbs(r.Steps))
					}
					return nil
				})
			})
		}
	}
}

func TestLateAnswersAreWaitedFor(t *testing.T) {
	for name, make := range controllers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := powersim.NewHost(nil)
			tg := make(t, h)
			h.Behave(powersim.Mood{Late: 150 * time.Millisecond})
			if r := SwitchOff(t.Context(), []Target{tg}, nil); !r.Done {
				t.Errorf("%v\n%v", r.Err, verbs(r.Steps))
			}
		})
	}
}

func TestDevicesAreTriedInOrderEachWithItsShare(t *testing.T) {
	goodturn.Take(t, func(int) error {
		h, dead := powersim.NewHost(nil), powersim.NewHost(nil)
		first, second := controllers["ipmi"](t, dead), controllers["redfish"](t, h)
		dead.Behave(powersim.Mood{Deaf: true})
		first.Name, second.Name = "first", "second"
		ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
		defer cancel()
		r := SwitchOff(ctx, []Target{first, second}, nil)
		if !dead.On() {
			t.Fatalf("the other host was switched off: %v", verbs(r.Steps))
		}
		if !r.Done || h.On() {
			return fmt.Errorf("done %v, %w\n%v", r.Done, r.Err, verbs(r.Steps))
		}
		if s := r.Steps[0]; s.Device != "first" || s.OK || s.Milliseconds < 1500 || s.Milliseconds > 2500 {
			return fmt.Errorf("the first device had not its half of the time: %+v", s)
		}
		return nil
	})
	if r := SwitchOff(t.Context(), nil, nil); r.Done || r.Err == nil {
		t.Error("a node without devices was switched off")
	}
}

func TestNothingIsCommandedAfterAVeto(t *testing.T) {
	h := powersim.NewHost(nil)
	tg := controllers["ipmi"](t, h)
	veto := errors.New("no majority")
	r := SwitchOff(t.Context(), []Target{tg}, func(context.Context) error { return veto })
	if r.Done || !errors.Is(r.Err, veto) || len(h.Commands()) != 0 {
		t.Errorf("done %v, err %v, commands %v", r.Done, r.Err, h.Commands())
	}
}

func TestWrongPasswordIsSaidAndNeverShown(t *testing.T) {
	for name, make := range controllers {
		t.Run(name, func(t *testing.T) {
			tg := make(t, powersim.NewHost(nil))
			tg.Password = "wr0ng-pass"
			c := Check(t.Context(), &tg, hostUUID)
			text := fmt.Sprintf("%+v", c)
			if c.OK || !strings.Contains(c.Message, "user or password refused") || strings.Contains(text, tg.Password) {
				t.Errorf("check: %s", text)
			}
			_, r := Read(t.Context(), &tg)
			if !errors.Is(r.Err, ErrLogin) {
				t.Errorf("read: %v", r.Err)
			}
		})
	}
}

func TestCheckComparesTheHostAndSwitchesNothing(t *testing.T) {
	other := "99999999-4455-6677-8899-aabbccddeeff"
	for name, make := range controllers {
		t.Run(name, func(t *testing.T) {
			h := powersim.NewHost(nil)
			tg := make(t, h)
			for _, c := range []struct {
				uuid string
				want api.PowerIdentity
				ok   bool
			}{{hostUUID, api.IdentitySame, true}, {strings.ToUpper(hostUUID), api.IdentitySame, true}, {other, api.IdentityOther, false}, {"", api.IdentityUnknown, true}} {
				got := Check(t.Context(), &tg, c.uuid)
				if got.Identity != c.want || got.OK != c.ok || got.State != "on" || got.Message == "" {
					t.Errorf("host %q: %+v", c.uuid, got)
				}
			}
			if len(h.Commands()) != 0 {
				t.Errorf("commands: %v", h.Commands())
			}
		})
	}
}

func TestRedfishTrustsNobodyElse(t *testing.T) {
	s, err := powersim.NewRedfish(powersim.RedfishConfig{Host: powersim.NewHost(nil), User: testUser, Password: testPassword})
	tg := redfishTarget(t, s, err)
	tg.Spec.Fingerprint = ""
	c := Check(t.Context(), &tg, "")
	if c.OK || !strings.Contains(c.Message, s.Fingerprint) || !strings.Contains(c.Message, "spec.fingerprint") {
		t.Errorf("unknown authority: %+v", c)
	}
	tg.Spec.CACert = s.CACert
	if c := Check(t.Context(), &tg, ""); !c.OK {
		t.Errorf("known authority: %+v", c)
	}
	tg.Spec.CACert, tg.Spec.Fingerprint = "", strings.Repeat("ab", 32)
	if c := Check(t.Context(), &tg, ""); c.OK || !strings.Contains(c.Message, "spec.fingerprint") {
		t.Errorf("another certificate: %+v", c)
	}
}

func TestRedfishSystemIsNamed(t *testing.T) {
	h := powersim.NewHost(nil)
	s, err := powersim.NewRedfish(powersim.RedfishConfig{Host: h, User: testUser, Password: testPassword, Systems: map[string]string{"a": "", "b": ""}})
	tg := redfishTarget(t, s, err)
	for id, words := range map[string]string{"": "name one in spec.systemID", "c": "correct spec.systemID"} {
		tg.Spec.SystemID = id
		if c := Check(t.Context(), &tg, ""); c.OK || !strings.Contains(c.Message, words) || !strings.Contains(c.Message, "a, b") {
			t.Errorf("system %q: %+v", id, c)
		}
	}
	tg.Spec.SystemID = "b"
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if r := SwitchOff(ctx, []Target{tg}, nil); r.Done || !h.On() {
		t.Errorf("system b is on and no host is behind it: %+v", r)
	}
}

// A service that was taken over must not send the login elsewhere.
func TestRedfishLinksLeadNowhereElse(t *testing.T) {
	evil, err := powersim.NewRedfish(powersim.RedfishConfig{Host: powersim.NewHost(nil), User: testUser, Password: testPassword})
	redfishTarget(t, evil, err)
	for _, link := range []string{
		fmt.Sprintf("@127.0.0.1:%d/redfish/v1/Systems/1", evil.Port), fmt.Sprintf("https://127.0.0.1:%d/redfish/v1/Systems/1", evil.Port),
		fmt.Sprintf("//127.0.0.1:%d/redfish/v1/Systems/1", evil.Port),
	} {
		s, err := powersim.NewRedfish(powersim.RedfishConfig{Host: powersim.NewHost(nil), User: testUser, Password: testPassword, Link: link})
		tg := redfishTarget(t, s, err)
		c := Check(t.Context(), &tg, "")
		if evil.Requests() != 0 || s.Requests() < 2 {
			t.Errorf("%s: the other service was asked %d times, the right one %d: %+v", link, evil.Requests(), s.Requests(), c)
		}
	}
}

// TestIPMIToolAgrees proves that the simulator is a BMC to somebody else's
// client, too.
func TestIPMIToolAgrees(t *testing.T) {
	tool, err := exec.LookPath("ipmitool")
	if err != nil {
		t.Fatalf("%v: scripts/test installs the package ipmitool", err)
	}
	h := powersim.NewHost(nil)
	tg := controllers["ipmi"](t, h)
	run := func(suite string, words ...string) string {
		cmd := exec.Command(tool, append([]string{"-I", "lanplus", "-C", suite, "-H", "127.0.0.1", "-p", strconv.Itoa(tg.Spec.Port), "-U", testUser, "-E"}, words...)...)
		cmd.Env = append(cmd.Environ(), "IPMI_PASSWORD="+testPassword)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("ipmitool %v: %v\n%s", words, err, out)
		}
		return string(out)
	}
	for _, suite := range []string{"3", "17"} {
		if out := run(suite, "chassis", "power", "status"); !strings.Contains(out, "is on") {
			t.Errorf("suite %s: %s", suite, out)
		}
	}
	run("17", "chassis", "power", "off")
	if st, r := Read(t.Context(), &tg); st != Off || r.Err != nil {
		t.Errorf("after ipmitool's off: %v %v", st, r.Err)
	}
}
