// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package task

import (
	"fmt"
	"strings"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

// maxNamed is how many VMs are named as left.
const maxNamed = 5

// leftToDo says what a task that reboots nodes has not done by its deadline, what becomes
// of that, and the remedy. It is empty for other tasks.
func leftToDo(v *configdb.View, what target) (string, error) {
	switch {
	case what.reboot != nil:
		return leftOfReboot(v, what.reboot, "muster node "+string(what.reboot.Spec.Action)+" "+what.reboot.Spec.Node)
	case what.rolling != nil:
		return leftOfRolling(v, what.rolling)
	}
	return "", nil
}

// leftOfReboot gets the command that tries again what was given up.
func leftOfReboot(v *configdb.View, r *api.Reboot, again string) (string, error) {
	s := &r.Spec
	switch r.Status.Step {
	case api.RebootLeaving:
		return fmt.Sprintf("node %s has its command and runs no other boot yet; see to its host, or if it is to stay as it is: muster node maintenance off %s", s.Node, s.Node), nil
	case api.RebootReturning, api.RebootOff:
		if len(r.Status.Stopped) == 0 {
			return "", nil
		}
		return fmt.Sprintf("not started again yet: %s; that is tried further: muster vm ls", names(v, r.Status.Stopped)), nil
	}
	bindings, _ := configdb.Bindings.List(v) // what cannot be read is not counted
	var left []string
	for i := range bindings {
		if bindings[i].Spec.NodeID == r.Meta.ID {
			left = append(left, bindings[i].Meta.ID)
		}
	}
	on := "no VM is left on node " + s.Node
	if len(left) > 0 {
		on = fmt.Sprintf("still on node %s: %s", s.Node, names(v, left))
	}
	return fmt.Sprintf("%s; it is given up before its command; see to what holds it up, and try again: %s", on, again), nil
}

// names are those of VMs, some of them if they are many.
func names(v *configdb.View, ids []string) string {
	var out []string
	for _, id := range ids[:min(len(ids), maxNamed)] {
		if vm, err := configdb.VMs.Get(v, id); err == nil {
			out = append(out, "vm "+vm.Meta.Name)
		} else {
			out = append(out, "vm "+id)
		}
	}
	if n := len(ids) - len(out); n > 0 {
		out = append(out, fmt.Sprintf("and %d more", n))
	}
	return strings.Join(out, ", ")
}

func leftOfRolling(v *configdb.View, r *api.RollingReboot) (string, error) {
	const again = "muster cluster reboot --rolling --continue"
	st := &r.Status
	var said []string
	if len(st.Done) > 0 {
		said = append(said, "rebooted: "+strings.Join(st.Done, ", "))
	}
	if st.Current != "" {
		rb, err := configdb.Reboots.Get(v, st.Current)
		if api.IgnoreNotFound(err) != nil {
			return "", err
		}
		if err == nil {
			text, err := leftOfReboot(v, &rb, again)
			if err != nil {
				return "", err
			}
			said = append(said, "under way: "+rb.Spec.Node)
			if text != "" {
				said = append(said, text)
			}
		}
	}
	if len(st.Left) > 0 {
		said = append(said, "left: "+strings.Join(st.Left, ", "))
	}
	text := strings.Join(said, "; ")
	if !strings.Contains(text, again) {
		text += "; to go on: " + again
	}
	return strings.TrimPrefix(text, "; "), nil
}
