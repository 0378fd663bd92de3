// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package console

// tellQuorum says above the prompt that the quorum of this node is lost, that the
// loss has changed, or that it is over: once per change.
func (sh *shell) tellQuorum() error {
	ask := sh.s.c.s.cfg.NoQuorum
	if ask == nil {
		return nil
	}
	now := plain(ask())
	if now == sh.told {
		return nil
	}
	sh.told, sh.s.told = now, now != ""
	if now == "" {
		now = "this node has its quorum again"
	}
	return sh.t.show("*** " + now + "\r\n")
}
