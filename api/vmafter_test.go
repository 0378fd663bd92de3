// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"errors"
	"fmt"
	"testing"
	"time"
)

func TestStartAfterAndFailbackAreChecked(t *testing.T) {
	many := make([]string, MaxAfter+1)
	for i := range many {
		many[i] = fmt.Sprint("vm", i)
	}
	for field, r := range map[string]VMRecovery{
		"spec.recovery.after":                {StartAfter: StartAfter{After: many}},
		"spec.recovery.after[1]":             {StartAfter: StartAfter{After: []string{"a", "A b"}}},
		"spec.recovery.afterCondition":       {StartAfter: StartAfter{AfterCondition: "soon"}},
		"spec.recovery.afterDelaySeconds":    {StartAfter: StartAfter{AfterDelaySeconds: 3601}},
		"spec.recovery.afterWaitSeconds":     {StartAfter: StartAfter{AfterWaitSeconds: -1}},
		"spec.recovery.failback":             {Failback: Failback{Failback: "sometimes"}},
		"spec.recovery.failbackAfterMinutes": {Failback: Failback{FailbackAfterMinutes: -1}},
	} {
		err := r.validate()
		if e := new(Error); CodeOf(err) != CodeInvalid || !errors.As(err, &e) || e.Field != field {
			t.Errorf("%s: %v", field, err)
		}
	}
	s := VMSpec{}
	if a := s.StartAfter(); a.Most() != 0 || a.String() != "" || s.FailsBackAfter() != 0 {
		t.Error("a VM without wishes waits or goes back")
	}
	s.Recovery = &VMRecovery{StartAfter: StartAfter{After: []string{"db1"}, AfterDelaySeconds: 10}, Failback: Failback{Failback: FailbackReturn}}
	if a := s.StartAfter(); a.Most() != 130*time.Second || s.FailsBackAfter() != 10*time.Minute {
		t.Errorf("%v, %v", a.Most(), s.FailsBackAfter())
	}
}
