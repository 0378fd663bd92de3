// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"encoding/json"
	"net/http"
	"strings"

	"github.com/muster-vm/muster/api"
)

// serveGuest answers for the screen of a VM and for the agent in it.
func (f *fakeCluster) serveGuest(w http.ResponseWriter, r *http.Request, sub string) bool {
	answer := func(v any) {
		b, err := json.Marshal(v)
		if err != nil {
			panic(err)
		}
		f.send(w, http.StatusOK, b)
	}
	switch sub {
	case "screenshot":
		_, _ = w.Write([]byte("\x89PNG picture"))
	case "agent":
		answer(api.GuestAgent{
			VM: "web1", Connected: true, Answering: true, Version: "7.2", Hostname: "in\x1b[31mside", OS: &api.GuestOS{Name: "Debian 12", Kernel: "6.1"},
			Interfaces: []api.GuestInterface{{Name: "eth0", MAC: "52:54:00:00:00:01", Addresses: []string{"10.0.0.7/24"}}}, Commands: []string{"guest-exec"},
		})
	case "agent/filesystems":
		answer(api.GuestFileSystems{VM: "web1", Items: []api.GuestFileSystem{{Mount: "/", Type: "ext4", Device: "vda1", Used: api.GiB, Total: 4 * api.GiB}, {Mount: "/proc", Type: "proc"}}})
	case "agent/exec":
		var in api.GuestExec
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			panic(err)
		}
		out := api.GuestExecResult{Stdout: []byte(strings.Join(in.Command, "|") + "\n" + string(in.Input)), Stderr: []byte("to stderr\n")}
		if in.Command[0] == "fail" {
			out.ExitCode = 42
		}
		f.print("ran " + in.Command[0] + "\n")
		answer(out)
	case "agent/password":
		var in api.GuestPassword
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			panic(err)
		}
		if in.User != "root" || in.Password != "correct horse " {
			f.fail(w, api.Errorf(api.CodeUnsupported, "the guest agent does not offer guest-set-user-password"))
			return true
		}
		w.WriteHeader(http.StatusNoContent)
	case "agent/freeze":
		answer(api.GuestFrozen{VM: "web1", FileSystems: 2, Frozen: true})
	case "agent/thaw":
		answer(api.GuestFrozen{VM: "web1", FileSystems: 2})
	default:
		return false
	}
	return true
}
