// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"net/http"
	"strings"
	"testing"

	"github.com/muster-vm/muster/api"
)

func withRecovery(name string, recovery map[string]any) map[string]any {
	body := vmBody(name, api.VMDisk{Size: 64 * api.MiB})
	body["spec"].(map[string]any)["recovery"] = recovery
	return body
}

func TestAPolicyForAWatchdogNeedsOne(t *testing.T) {
	f := newFixture(t)
	a := f.do(call{method: "POST", path: "vms", body: withRecovery("web1", map[string]any{"onWatchdog": "restart"}), role: api.RoleOperator})
	if a.status != http.StatusUnprocessableEntity || !strings.Contains(string(a.body), "has no watchdog") {
		t.Fatal(a.status, string(a.body))
	}
	body := withRecovery("web1", map[string]any{"onWatchdog": "pause"})
	body["spec"].(map[string]any)["watchdog"] = map[string]any{"action": "reset"}
	a = f.do(call{method: "POST", path: "vms", body: body, role: api.RoleOperator})
	if a.status != http.StatusUnprocessableEntity || !strings.Contains(string(a.body), "leaves nothing to look at") {
		t.Fatal(a.status, string(a.body))
	}
	body["spec"].(map[string]any)["watchdog"] = map[string]any{"action": "pause"}
	if a = f.do(call{method: "POST", path: "vms", body: body, role: api.RoleOperator}); a.status != http.StatusAccepted {
		t.Fatal(a.status, string(a.body))
	}
}
