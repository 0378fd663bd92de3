// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

// maxCertificateFile bounds the file of an authority, in bytes.
const maxCertificateFile = 64 << 10

func (a *app) nodePower() *cobra.Command {
	ls := a.lsCmd(api.KindPowerDevice)
	ls.Short, ls.Example = "List the power devices of all nodes", "  muster node power ls"
	show := a.showCmd(api.KindPowerDevice)
	show.Use, show.Short, show.Example = "show DEVICE", "Show a power device", "  muster node power show bmc1"
	show.Args = args("DEVICE")
	rm := a.rmCmd(api.KindPowerDevice, "Removes power devices. A node without one is waited for until its lease has run out.")
	rm.Use, rm.Short, rm.Args, rm.Example = "rm DEVICE...", "Remove power devices", atLeastOne("DEVICE"), "  muster node power rm bmc1"
	log := a.lsCmd(api.KindPowerAction)
	log.Use, log.Aliases, log.Short = "log", nil, "List what was switched, by whom, and what came of it"
	log.Example = "  muster node power log\n  muster node power log -o json"
	g := group("power", "Switch hosts by their management controllers (IPMI, Redfish)",
		a.powerAdd(), a.powerSet(), rm, ls, show, a.powerTest(), a.powerStatus(),
		a.powerDo(api.PowerOff, "Switch a node off, and wait until it is"),
		a.powerDo(api.PowerOn, "Switch a node on"),
		a.powerDo(api.PowerCycle, "Switch a node off, wait until it is, and on again"), log)
	g.Long = `Power devices are the management controllers of hosts. With one, the leader switches
a silent node off and restarts its protected VMs without waiting for its lease to
end. See docs/fencing.md.`
	return g
}

// powerFlags say what a device shall be.
type powerFlags struct {
	driver, address, user, password, passwordFile string
	privilege, systemID, caFile, fingerprint      string
	port, order, timeout, suite                   int
	disabled                                      bool
}

func (f *powerFlags) bind(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.driver, "driver", "", "ipmi or redfish")
	fl.StringVar(&f.address, "address", "", "host name or IP address of the controller")
	fl.IntVar(&f.port, "port", 0, "port (default 623 for ipmi, 443 for redfish)")
	fl.StringVar(&f.user, "user", "", "user of the controller")
	fl.StringVar(&f.password, "password", "", "its password; others on this host may see it, --password-file hides it")
	fl.StringVar(&f.passwordFile, "password-file", "", "file that holds the password, - for stdin")
	fl.IntVar(&f.order, "order", 0, "0 to 99: of several devices of a node, the lowest is tried first")
	fl.IntVar(&f.timeout, "timeout", 0, "seconds that the device has for one action (default 8)")
	fl.IntVar(&f.suite, "cipher-suite", 0, "of ipmi: 17 or 3 (default 17, then 3)")
	fl.StringVar(&f.privilege, "privilege", "", "of ipmi: operator or administrator (default operator)")
	fl.StringVar(&f.systemID, "system-id", "", "of redfish: the system, if the service has several")
	fl.StringVar(&f.caFile, "ca-file", "", "of redfish: PEM file of the authority to trust")
	fl.StringVar(&f.fingerprint, "fingerprint", "", "of redfish: SHA-256 of the one certificate to trust")
	fl.BoolVar(&f.disabled, "disabled", false, "do not use the device")
}

// powerSpec returns the fields whose flags were given.
func (a *app) powerSpec(cmd *cobra.Command, f *powerFlags) (map[string]any, error) {
	out := map[string]any{}
	givenInto(cmd, out, map[string]flagField{
		"driver": {"driver", f.driver}, "address": {"address", f.address}, "port": {"port", f.port}, "user": {"user", f.user},
		"password": {"password", f.password}, "order": {"order", f.order}, "timeout": {"timeoutSeconds", f.timeout},
		"cipher-suite": {"cipherSuite", f.suite}, "privilege": {"privilege", f.privilege}, "system-id": {"systemID", f.systemID},
		"fingerprint": {"fingerprint", f.fingerprint}, "disabled": {"disabled", f.disabled},
	})
	if f.caFile != "" {
		b, err := a.readFile(f.caFile, maxCertificateFile)
		if err != nil {
			return nil, err
		}
		out["caCert"] = string(b)
	}
	return out, a.secretInto(out, "password", f.password, f.passwordFile)
}

func (a *app) powerAdd() *cobra.Command {
	var f powerFlags
	cmd := &cobra.Command{
		Use: "add NODE DEVICE", Short: "Add a power device to a node", Args: args("NODE", "DEVICE"),
		Long: `Adds a power device, under a name of its own, to a node. The password is stored
encrypted and is never shown. Test the device afterwards: from then on the leader
may switch the node off by it.`,
		Example: `  muster node power add m1 bmc1 --driver ipmi --address 10.0.9.1 --user fence --password-file pw
  muster node power add m2 bmc2 --driver redfish --address bmc2.example.org --user fence --password-file pw --fingerprint 5f0c…
  muster node power test m1`,
		ValidArgsFunction: a.completeNames(api.KindNode),
		RunE: func(cmd *cobra.Command, names []string) error {
			if f.driver == "" || f.address == "" {
				return usagef("node power add: --driver and --address are needed")
			}
			spec, err := a.powerSpec(cmd, &f)
			if err != nil {
				return err
			}
			spec["node"] = names[0]
			return a.create(cmd.Context(), api.KindPowerDevice, names[1], nil, spec)
		},
	}
	f.bind(cmd)
	return cmd
}

func (a *app) powerSet() *cobra.Command {
	var f powerFlags
	cmd := &cobra.Command{
		Use: "set DEVICE", Short: "Change a power device", Args: args("DEVICE"),
		Long: `Changes a power device. The password stays as it is, unless something changes that
decides who gets to see it, such as the address: then it is needed again.`,
		Example:           "  muster node power set bmc1 --timeout 4 --order 1\n  muster node power set bmc1 --password-file pw",
		ValidArgsFunction: a.completeNames(api.KindPowerDevice),
		RunE: func(cmd *cobra.Command, names []string) error {
			spec, err := a.powerSpec(cmd, &f)
			if err != nil {
				return err
			}
			if len(spec) == 0 {
				return usagef("node power set: nothing to change; give a flag")
			}
			return a.patch(cmd.Context(), api.KindPowerDevice, names[0], patchOf(spec, nil))
		},
	}
	f.bind(cmd)
	return cmd
}

// askPower lets a node, by default the leader, ask the devices of another.
func (a *app) askPower(ctx context.Context, node, via string) (r api.PowerReport, raw []byte, err error) {
	c, err := a.connect()
	if err != nil {
		return r, nil, err
	}
	reply, err := callPower(ctx, c, client.Request{Method: http.MethodGet, Once: true}, node, via, &r)
	return r, reply, err
}

// callPower asks for a node's power, of the node via or the leader.
func callPower(ctx context.Context, c *client.Client, r client.Request, node, via string, into any) ([]byte, error) {
	r.Path = "/nodes/" + url.PathEscape(node) + "/power"
	if via != "" {
		r.Query = url.Values{"via": {via}}
	}
	reply, err := c.Do(ctx, r)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(reply.Body, into); err != nil {
		return nil, api.Errorf(api.CodeInternal, "decode the answer: %w", err)
	}
	return reply.Body, nil
}

func (a *app) powerTest() *cobra.Command {
	var via string
	cmd := &cobra.Command{
		Use: "test NODE", Short: "Test the power devices of a node; nothing is switched", Args: args("NODE"),
		Long: `Tests the power devices of a node without switching anything: whether they can be
reached, take the login, tell the state, and whether they are of this node, as far
as the system UUID that both tell can be compared. The leader asks them, because it
is the leader that would switch a node off; --via lets another node ask, so that all
that may come to lead can be tried. The exit code is 1 if a device does not work or
is of another host.`,
		Example:           "  muster node power test m1\n  muster node power test m1 --via m3",
		ValidArgsFunction: a.completeNames(api.KindNode),
		RunE: func(cmd *cobra.Command, names []string) error {
			r, raw, err := a.askPower(cmd.Context(), names[0], via)
			if err != nil {
				return err
			}
			return a.printPowerTest(&r, raw)
		},
	}
	cmd.Flags().StringVar(&via, "via", "", "the node that asks (default the leader)")
	return cmd
}

func (a *app) printPowerTest(r *api.PowerReport, raw []byte) error {
	if a.structured() {
		if err := a.printJSON(raw); err != nil {
			return err
		}
	} else {
		t := &table{head: []string{"DEVICE", "DRIVER", "WORKS", "STATE", "THIS-NODE", "MESSAGE"}}
		for i := range r.Checks {
			c := &r.Checks[i]
			t.add(c.Device, string(c.Driver), yesNo(c.OK), dash(c.State), identityText(c.Identity), c.Message)
		}
		a.notice("node %s, asked by %s; nothing was switched", r.Node, r.Via)
		if err := a.printTable(t, "node "+r.Node+" has no power device"); err != nil {
			return err
		}
	}
	bad := 0
	for i := range r.Checks {
		if !r.Checks[i].OK {
			bad++
		}
	}
	if bad > 0 {
		return fmt.Errorf("%d of %d power devices of node %s do not work", bad, len(r.Checks), r.Node)
	}
	return nil
}

func identityText(id api.PowerIdentity) string {
	switch id {
	case api.IdentitySame:
		return "yes"
	case api.IdentityOther:
		return "NO"
	}
	return "unknown"
}

func (a *app) powerStatus() *cobra.Command {
	var via string
	cmd := &cobra.Command{
		Use: "status NODE", Short: "Show whether a node is on, by its power devices", Args: args("NODE"),
		Example:           "  muster node power status m1",
		ValidArgsFunction: a.completeNames(api.KindNode),
		RunE: func(cmd *cobra.Command, names []string) error {
			r, raw, err := a.askPower(cmd.Context(), names[0], via)
			if err != nil {
				return err
			}
			if a.structured() {
				return a.printJSON(raw)
			}
			var why []string
			for i := range r.Checks {
				c := &r.Checks[i]
				if c.State != "" {
					fmt.Fprintf(a.Out, "%s: %s (%s)\n", clean(r.Node), clean(c.State), clean(c.Device))
					return nil
				}
				why = append(why, c.Message)
			}
			return fmt.Errorf("no power device of node %s tells its state: %s", names[0], strings.Join(why, "; "))
		},
	}
	cmd.Flags().StringVar(&via, "via", "", "the node that asks (default the leader)")
	return cmd
}

func (a *app) powerDo(verb api.PowerVerb, short string) *cobra.Command {
	var via, reason string
	var yes bool
	cmd := &cobra.Command{
		Use: string(verb) + " NODE", Short: short, Args: args("NODE"),
		Long: short + `. It asks for confirmation unless --yes is given.
What the devices were told and answered is kept: muster node power log.`,
		Example:           "  muster node power " + string(verb) + " m3\n  muster node power " + string(verb) + " m3 --yes --reason 'new memory'",
		ValidArgsFunction: a.completeNames(api.KindNode),
		RunE: func(cmd *cobra.Command, names []string) error {
			return a.switchNode(cmd.Context(), verb, names[0], via, reason, yes)
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the record")
	cmd.Flags().StringVar(&via, "via", "", "the node that speaks to the devices (default the leader)")
	return cmd
}

func (a *app) switchNode(ctx context.Context, verb api.PowerVerb, node, via, reason string, yes bool) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	raw, _, err := c.Get(ctx, api.KindNode, "", node)
	if err != nil {
		return err
	}
	n, err := client.As[api.NodeSpec, api.NodeStatus](raw)
	if err != nil {
		return err
	}
	if !yes && verb != api.PowerOn {
		if err := a.agreePower(ctx, c, verb, n.Meta.Name); err != nil {
			return err
		}
	}
	var out api.PowerAction
	body, err := json.Marshal(api.PowerRequest{Action: verb, Confirm: n.Meta.Name, Reason: reason})
	if err != nil {
		return err
	}
	reply, err := callPower(ctx, c, client.Request{Method: http.MethodPost, Body: body, Once: true}, node, via, &out)
	if err != nil {
		return err
	}
	switch {
	case a.structured():
		err = a.printJSON(reply)
	case out.Status.Phase == api.PowerActionConfirmed:
		a.say("node %s: power %s, %s", n.Meta.Name, verb, out.Status.Message)
	}
	if err == nil && out.Status.Phase != api.PowerActionConfirmed {
		return fmt.Errorf("node %s: power %s is not confirmed: %s", n.Meta.Name, verb, out.Status.Message)
	}
	return err
}

// agreePower says what goes down with the node and asks.
func (a *app) agreePower(ctx context.Context, c *client.Client, verb api.PowerVerb, node string) error {
	if !a.InTTY {
		return &hintedError{api.Errorf(api.CodeRefused, "power %s needs a person's word", verb), "run it at a terminal, or say --yes"}
	}
	list, err := c.List(ctx, api.KindVM, client.ListOptions{Project: "*", Fields: "status.node=" + node + ",status.phase=" + string(api.VMRunning)})
	if err != nil {
		return err
	}
	fmt.Fprintf(a.Err, "Power %s takes node %s down at once, with %s that run on it. Type the name of the node to go on: ", verb, clean(node), plural(len(list.Items), "VM"))
	line, err := bufio.NewReader(io.LimitReader(a.In, maxAnswer)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if strings.TrimSpace(line) != node {
		return api.Errorf(api.CodeRefused, "not confirmed; nothing was switched")
	}
	return nil
}

func powerDeviceRow(o *api.PowerDevice, _ time.Time) []string {
	driver := string(o.Spec.Driver)
	if o.Spec.Disabled {
		driver += ",disabled"
	}
	return []string{o.Meta.Name, o.Spec.Node, strconv.Itoa(o.Spec.Order), driver, powerAddress(&o.Spec), dash(o.Spec.User), setText(o.Spec.PasswordSet), o.Spec.Within().String()}
}

func powerAddress(s *api.PowerDeviceSpec) string {
	if s.Port == 0 {
		return s.Address
	}
	return s.Address + " port " + strconv.Itoa(s.Port)
}

func setText(set bool) string {
	if set {
		return "set"
	}
	return "not set"
}

func powerDeviceShow(s *sections, o *api.PowerDevice, now time.Time) {
	row := powerDeviceRow(o, now)
	s.field("Node", row[1])
	s.field("Order", row[2])
	s.field("Driver", row[3])
	s.field("Address", row[4])
	s.field("User", o.Spec.User)
	s.field("Password", row[6])
	s.field("Timeout", row[7])
	s.field("Cipher suite", number(uint64(max(0, o.Spec.CipherSuite))))
	s.field("Privilege", string(o.Spec.Privilege))
	s.field("System", o.Spec.SystemID)
	s.field("Fingerprint", o.Spec.Fingerprint)
	if o.Spec.CACert != "" {
		s.field("Authority", "given")
	}
}

func powerActionRow(o *api.PowerAction, now time.Time) []string {
	return []string{age(o.Spec.At, now), o.Spec.Node, string(o.Spec.Action), dash(string(o.Status.Phase)), string(o.Spec.Trigger), dash(o.Spec.Via), dash(o.Spec.Actor), o.Status.Message}
}

func powerActionShow(s *sections, o *api.PowerAction, now time.Time) {
	s.field("Node", o.Spec.Node)
	s.field("Action", string(o.Spec.Action))
	s.field("Status", string(o.Status.Phase))
	s.field("Message", o.Status.Message)
	s.field("Asked by", o.Spec.Actor)
	s.field("Because", o.Spec.Reason)
	s.field("Done by", o.Spec.Via)
	s.field("Began", moment(o.Spec.At, now))
	if o.Status.EndedAt != nil {
		s.field("Ended", moment(*o.Status.EndedAt, now))
	}
	if len(o.Status.Steps) == 0 {
		return
	}
	s.title("Steps")
	s.table(powerSteps(o.Status.Steps))
}

func powerSteps(steps []api.PowerStep) *table {
	t := &table{head: []string{"TIME", "DEVICE", "DO", "OK", "MS", "ANSWER"}}
	for _, st := range steps {
		t.add(st.At.Format("15:04:05.000"), st.Device, string(st.Do), yesNo(st.OK), strconv.FormatInt(st.Milliseconds, 10), st.Answer)
	}
	return t
}
