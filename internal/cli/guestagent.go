// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
)

func (a *app) agentCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use: "agent NAME", Short: "Show what the guest agent of a VM says", Args: args("NAME"),
		Long: `Asks the guest agent of a running VM and shows version, operating system,
addresses and what it can do. All of it is the guest's own word.`,
		Example:           "  muster vm agent web1\n  muster vm agent fs web1",
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			var g api.GuestAgent
			if err := a.vmCall(cmd.Context(), http.MethodGet, names[0], "/agent", nil, &g); err != nil {
				return err
			}
			return a.printOne(&g, func(s *sections) { showAgent(s, &g) })
		},
	}
	cmd.AddCommand(&cobra.Command{
		Use: "fs NAME", Short: "List the file systems of a guest and how full they are", Args: args("NAME"),
		Example:           "  muster vm agent fs web1",
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			var l api.GuestFileSystems
			if err := a.vmCall(cmd.Context(), http.MethodGet, names[0], "/agent/filesystems", nil, &l); err != nil {
				return err
			}
			if a.structured() {
				return a.printValue(&l)
			}
			return a.printTable(fileSystemTable(l.Items), "the guest has no file systems")
		},
	})
	return cmd
}

func (a *app) vmCall(ctx context.Context, method, name, sub string, in, out any) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	return c.VMCall(ctx, method, a.project, name, sub, nil, in, out)
}

// printOne writes what is no object: a document, or sections for people.
func (a *app) printOne(v any, show func(*sections)) error {
	if a.structured() {
		return a.printValue(v)
	}
	s := &sections{paint: a.colour()}
	show(s)
	_, err := io.WriteString(a.Out, s.String())
	return err
}

func showAgent(s *sections, g *api.GuestAgent) {
	field := func(name, value string) {
		if value != "" {
			s.field(name, clean(value))
		}
	}
	state := "not connected"
	switch {
	case g.Answering:
		state = "answering"
	case g.Connected:
		state = "connected, not answering"
	}
	field("Agent", state)
	field("Problem", g.Problem)
	field("Version", g.Version)
	field("Hostname", g.Hostname)
	if g.OS != nil {
		field("System", strings.TrimSpace(g.OS.Name+" "+g.OS.Kernel+" "+g.OS.Machine))
	}
	if g.Frozen {
		field("Frozen", "yes"+thawsAt(g.ThawsAt))
	}
	field("Commands", strings.Join(g.Commands, " "))
	t := &table{head: []string{"INTERFACE", "MAC", "ADDRESSES"}}
	for _, n := range g.Interfaces {
		t.rows = append(t.rows, []string{clean(n.Name), dash(n.MAC), dash(clean(strings.Join(n.Addresses, " ")))})
	}
	if len(t.rows) > 0 {
		s.title("Interfaces")
		s.table(t)
	}
}

// showGuest adds screen, cloud-init and what the agent said to a VM's sections.
func showGuest(s *sections, o *api.VM) {
	s.field("Display", string(o.Spec.Display))
	if c := o.Spec.CloudInit; c != nil {
		s.field("cloud-init", strings.TrimSpace(cmp.Or(string(c.Format), string(api.CloudInitNoCloud))+" "+c.User))
	}
	if g := o.Status.Agent; g != nil {
		s.title("Guest (its own word)")
		s.field("System", g.OS)
		s.field("Hostname", g.Hostname)
		s.field("Addresses", strings.Join(g.Addresses, " "))
		s.field("Agent", g.Version)
	}
}

func thawsAt(t *time.Time) string {
	if t == nil {
		return ""
	}
	return ", until " + t.Local().Format(time.TimeOnly) + " at the latest"
}

func fileSystemTable(list []api.GuestFileSystem) *table {
	t := &table{head: []string{"MOUNT", "TYPE", "DEVICE", "USED", "SIZE", "USE"}}
	for _, fs := range list {
		used, total, share := "-", "-", "-"
		if fs.Total > 0 {
			used, total, share = fs.Used.String(), fs.Total.String(), fmt.Sprintf("%.0f%%", 100*float64(fs.Used)/float64(fs.Total))
		}
		t.rows = append(t.rows, []string{clean(fs.Mount), dash(clean(fs.Type)), dash(clean(fs.Device)), used, total, share})
	}
	return t
}

// guestExit is the exit code of a command in a guest, which is ours, too.
type guestExit struct{ code int }

// Error implements error.
func (e *guestExit) Error() string {
	return fmt.Sprintf("the command in the guest ended with %d", e.code)
}

func (a *app) execCmd() *cobra.Command {
	var env []string
	var seconds int
	var input bool
	cmd := &cobra.Command{
		Use: "exec NAME -- COMMAND...", Short: "Run a command in a guest through its agent (administrators)",
		Long: `Runs a program in the guest, as the guest agent's user, which usually is root,
and prints what it printed. There is no shell in between: for one, run
sh -c 'COMMAND'. Its exit code is that of muster, so that 1 to 5 may come from
either: errors of muster begin with "muster:". The command is in the audit log,
its input is not. It goes on in the guest when --seconds are over.`,
		Example: `  muster vm exec web1 -- uname -a
  echo hello | muster vm exec web1 --input -- sh -c 'cat > /tmp/hello'`,
		ValidArgsFunction: a.completeNames(api.KindVM),
		Args: func(cmd *cobra.Command, words []string) error {
			if len(words) == 0 {
				return usagef("%s: NAME is missing", cmd.CommandPath())
			}
			if len(words) < 2 {
				return usagef("%s: COMMAND is missing", cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, words []string) error {
			in := api.GuestExec{Command: words[1:], Env: env, Seconds: seconds}
			if input {
				b, err := io.ReadAll(io.LimitReader(a.In, api.MaxExecInput+1))
				if err != nil {
					return fmt.Errorf("read stdin: %w", err)
				}
				in.Input = b
			}
			if err := in.Validate(); err != nil {
				return usagef("vm exec: %v", err)
			}
			var out api.GuestExecResult
			if err := a.vmCall(cmd.Context(), http.MethodPost, words[0], "/agent/exec", &in, &out); err != nil {
				return err
			}
			return a.showExec(&out)
		},
	}
	cmd.Flags().StringArrayVar(&env, "env", nil, "NAME=VALUE for the command's environment (repeatable)")
	cmd.Flags().IntVar(&seconds, "seconds", api.DefaultExecSeconds, "how long the end of the command is waited for, 1-300")
	cmd.Flags().BoolVar(&input, "input", false, "send stdin, at most 512 KiB")
	return cmd
}

func (a *app) showExec(out *api.GuestExecResult) error {
	if a.structured() {
		if err := a.printValue(out); err != nil {
			return err
		}
	} else {
		if _, err := a.guestOut().Write(out.Stdout); err != nil {
			return err
		}
		if _, err := a.Err.Write(a.tame(out.Stderr)); err != nil {
			return err
		}
		if out.Truncated {
			a.notice("there was more output than is passed on")
		}
	}
	if out.ExitCode != 0 {
		return &guestExit{code: out.ExitCode}
	}
	return nil
}

// tame makes a guest's errors harmless to a terminal.
func (a *app) tame(b []byte) []byte {
	if a.Shell == nil && !a.OutTTY {
		return b
	}
	var out strings.Builder
	s := bufio.NewScanner(strings.NewReader(string(b)))
	s.Buffer(nil, len(b)+1)
	for s.Scan() {
		out.WriteString(clean(s.Text()) + "\n")
	}
	return []byte(out.String())
}

func (a *app) passwordCmd() *cobra.Command {
	var user string
	cmd := &cobra.Command{
		Use: "password NAME", Short: "Change the password of a user of a guest through its agent", Args: args("NAME"),
		Long: `Changes a password inside the guest. It is read from the terminal, without being
shown, or from stdin; it is never an argument, and nothing of it is stored or
logged.`,
		Example:           "  muster vm password web1 --user root\n  pwgen 20 1 | muster vm password web1 --user admin",
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			if user == "" {
				return usagef("vm password: --user is missing")
			}
			password, err := a.readSecret(fmt.Sprintf("New password of %s in %s: ", user, names[0]))
			if err != nil {
				return err
			}
			in := api.GuestPassword{User: user, Password: password}
			if err := in.Validate(); err != nil {
				return usagef("vm password: %v", err)
			}
			if err := a.vmCall(cmd.Context(), http.MethodPost, names[0], "/agent/password", &in, nil); err != nil {
				return err
			}
			a.say("%s: password of %s changed", names[0], user)
			return nil
		},
	}
	cmd.Flags().StringVar(&user, "user", "", "user of the guest")
	return cmd
}

// readSecret reads a line that is not shown.
func (a *app) readSecret(prompt string) (string, error) {
	if a.Secret != nil && a.Shell == nil {
		fmt.Fprint(a.Err, prompt)
		b, err := a.Secret()
		fmt.Fprintln(a.Err)
		return string(b), err
	}
	if a.InTTY {
		return "", usagef("a password is not typed here, where it would be seen; send it to stdin")
	}
	line, err := bufio.NewReader(io.LimitReader(a.In, 2*api.MaxGuestPassword)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("read the password from stdin: %w", err)
	}
	return strings.TrimRight(line, "\r\n"), nil
}

func (a *app) freezeCmd() *cobra.Command {
	var seconds int
	cmd := &cobra.Command{
		Use: "freeze NAME", Short: "Stop all writes to the file systems of a guest for a while", Args: args("NAME"),
		Long: `Writes out and freezes the file systems of the guest through its agent, so that
its disks are consistent. They are thawed by muster vm thaw, and by themselves
after --seconds, or when the node's daemon starts again.`,
		Example:           "  muster vm freeze web1 --seconds 30",
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			in := api.GuestFreeze{Seconds: seconds}
			if seconds < 1 || in.Validate() != nil {
				return usagef("--seconds: is %d; give 1 to %d", seconds, api.MaxFreezeSeconds)
			}
			return a.freezing(cmd.Context(), names[0], "/agent/freeze", &in)
		},
	}
	cmd.Flags().IntVar(&seconds, "seconds", api.DefaultFreezeSeconds, "thaw by itself after this time, 1-600")
	return cmd
}

func (a *app) thawCmd() *cobra.Command {
	return &cobra.Command{
		Use: "thaw NAME", Short: "Let the file systems of a frozen guest go on", Args: args("NAME"),
		Example:           "  muster vm thaw web1",
		ValidArgsFunction: a.completeNames(api.KindVM),
		RunE: func(cmd *cobra.Command, names []string) error {
			return a.freezing(cmd.Context(), names[0], "/agent/thaw", &struct{}{})
		},
	}
}

func (a *app) freezing(ctx context.Context, name, sub string, in any) error {
	var out api.GuestFrozen
	if err := a.vmCall(ctx, http.MethodPost, name, sub, in, &out); err != nil {
		return err
	}
	if a.structured() {
		return a.printValue(&out)
	}
	if out.Frozen {
		a.say("%s: %d file systems are frozen%s", name, out.FileSystems, thawsAt(out.ThawsAt))
	} else {
		a.say("%s: %d file systems are thawed", name, out.FileSystems)
	}
	return nil
}
